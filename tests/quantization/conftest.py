"""Models with each kind of layer; one is trained a little, so its modules differ in sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import Nemotron
from tests.checkpoint.tiny import TINY, randomize
from tests.quantization.learnable_text import text


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that several threads would be slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained() -> dict[str, Tensor]:
    """The state_dict of a model after some steps of training on `text`."""
    model = Nemotron(TINY, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(80):
        batch = text(1000 + step)
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.5, "the model has learned: a uniform guess has log 128 = 4.9"
    return model.state_dict()


@pytest.fixture
def fresh(trained: dict[str, Tensor]) -> Callable[[], Nemotron]:
    """Another copy of the trained model."""

    def build() -> Nemotron:
        model = Nemotron(TINY, seed=0)
        model.load_state_dict(trained)
        return model.eval()

    return build


@pytest.fixture
def random_model() -> Nemotron:
    """A model in which no parameter has its initial value."""
    model = Nemotron(TINY, seed=0)
    randomize(model.state_dict().items(), 3)
    for name, buffer in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer.zero_()  # each expert gets tokens
    return model.eval()
