"""The whole model on a GPU, where it takes the kernels by itself, against itself on the CPU.

Float32 on both sides; the CPU is the reference, and what differs is the order of sums. Text is
compared where choices are clear: at a near tie rounding decides, and neither side is wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemotron_lite import (
    Cache,
    Nemotron,
    NemotronConfig,
    SpeculationOptions,
    generate,
    load,
    save,
)
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.quantization import quantizable_modules, quantize_model, single_format
from nemotron_lite.train import TrainConfig, train
from tests.cache_oracles import WAYS
from tests.checkpoint.tiny import TINY, randomize
from tests.compare import relative_rms
from tests.train.conftest import TINY as LEARNER
from tests.train.conftest import text

__all__ = ["text"]  # a fixture

# The first product in autograd's own thread; torch then does what the warning says.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current")

DEVICE = "cuda"
ODD = NemotronConfig(
    pattern="ME*-ME", vocab_size=61, hidden_size=40,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=56,
    mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=12, n_groups=2, chunk_size=16,
    n_routed_experts=9, num_experts_per_tok=2, moe_intermediate_size=20, moe_latent_size=12,
    moe_shared_expert_intermediate_size=24, routed_scaling_factor=2.5,
    mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip
"""Hardly a size that is a power of two, several below what a matrix unit multiplies at once."""
WIDE = NemotronConfig(
    pattern="MEM*E", vocab_size=512, hidden_size=256,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=128, n_groups=2, chunk_size=128,
    n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=128, moe_latent_size=64,
    moe_shared_expert_intermediate_size=256, routed_scaling_factor=2.5,
    mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip
"""Super's heads, states and chunks."""
CONFIGS = {"tiny": TINY, "odd": ODD, "wide": WIDE}


def both(config: NemotronConfig, seed: int = 3) -> tuple[Nemotron, Nemotron]:
    """One set of random weights on the CPU and on the GPU."""
    on_cpu = Nemotron(config, dtype=torch.float32, seed=0).eval()
    randomize(on_cpu.state_dict().items(), seed)
    on_gpu = Nemotron(config, device=DEVICE, dtype=torch.float32, seed=0).eval()
    on_gpu.load_state_dict(on_cpu.state_dict())
    return on_cpu, on_gpu


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Nemotron, Nemotron]:
    return both(CONFIGS[request.param])


def tokens(model: Nemotron, b: int, t: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (b, t), generator=draw)


def learned(model: Nemotron, batch: Tensor, seq_idx: Tensor | None) -> dict[str, Tensor]:
    """Logits of every depth, and the gradient of every parameter for fixed ones of the logits."""
    model.zero_grad()
    found = model(batch.to(model.device), seq_idx=seq_idx, mtp_depths=2)
    outputs = [found.logits, *found.mtp_logits]
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=draw).to(y.device) for y in outputs]
    torch.autograd.backward(outputs, given)
    logits = {f"logits {k}": y.detach() for k, y in enumerate(outputs)}
    return logits | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
def test_logits_and_every_gradient(pair: tuple[Nemotron, Nemotron], packed: bool) -> None:
    """Packed rows with a document number that returns, too."""
    on_cpu, on_gpu = pair
    seq_idx = torch.tensor([[0] * 70 + [1] * 2 + [0] * 125, [4] * 197]) if packed else None
    batch = tokens(on_cpu, 2, 197)
    expected = learned(on_cpu, batch, seq_idx)
    found = learned(on_gpu, batch, None if seq_idx is None else seq_idx.to(DEVICE))
    assert set(found) == set(expected)
    errors = {name: relative_rms(found[name].cpu(), value) for name, value in expected.items()}
    assert max(errors.values()) < 2e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_ragged_prompts_and_the_tokens_after_them(pair: tuple[Nemotron, Nemotron]) -> None:
    batch, more, lengths = tokens(pair[0], 3, 150), tokens(pair[0], 3, 12, 1), [150, 1, 67]

    def read(model: Nemotron) -> list[Tensor]:
        place = model.device
        cache = model.empty_cache(3)
        with torch.no_grad():
            first = model(batch.to(place), cache, lengths=torch.tensor(lengths, device=place))
            rest = [model(more[:, i : i + 1].to(place), cache).logits for i in range(12)]
        return [first.logits[i, :n].cpu() for i, n in enumerate(lengths)] + [x.cpu() for x in rest]

    for found, expected in zip(read(pair[1]), read(pair[0]), strict=True):
        assert relative_rms(found, expected) < 1e-4


def test_the_same_text(pair: tuple[Nemotron, Nemotron]) -> None:
    """Alone and beside a longer prompt, plainly and with drafts."""
    on_cpu, on_gpu = pair
    prompts = [tokens(on_cpu, 1, n, n)[0].tolist() for n in (5, 40)]
    greedy = dict(temperature=0, stop=())
    expected = generate(on_cpu, prompts, 48, **greedy)
    assert generate(on_gpu, prompts, 48, **greedy) == expected
    assert generate(on_gpu, prompts[:1], 48, **greedy) == expected[:1]
    drafts = SpeculationOptions(draft_length=3, adaptive=False)
    assert generate(on_gpu, prompts, 48, speculation=drafts, **greedy) == expected


@pytest.mark.parametrize("way", WAYS)
def test_going_back(pair: tuple[Nemotron, Nemotron], way: str) -> None:
    """What is kept of a draft is what reading it alone would have left."""
    model = pair[1]
    batch, draft = tokens(model, 2, 30).to(DEVICE), tokens(model, 2, 4, 1).to(DEVICE)
    after = tokens(model, 2, 1, 2).to(DEVICE)
    kept, plain = model.empty_cache(2), model.empty_cache(2)
    with torch.no_grad():
        for cache in (kept, plain):
            model(batch, cache)
        with WAYS[way]():
            model(draft, kept, draft=True)
        kept.accept(2)
        model(draft[:, :2], plain)
        found, expected = (model(after, cache).logits for cache in (kept, plain))
    assert relative_rms(found, expected) < 1e-5


def test_half_precision_states_round_as_on_the_cpu() -> None:
    """Their bits follow from the seed, whatever rounds them; what went in differs by rounding."""
    on_cpu, on_gpu = both(WIDE)
    batch = tokens(on_cpu, 2, 40)
    found = []
    for model in (on_cpu, on_gpu):
        cache = model.empty_cache(2, ssm_dtype=torch.float16, ssm_seed=5)
        with torch.no_grad():
            model(batch[:, :32].to(model.device), cache)
            steps = [model(batch[:, i : i + 1].to(model.device), cache) for i in range(32, 40)]
        found.append(torch.cat([step.logits.cpu() for step in steps], 1))
    assert relative_rms(found[1], found[0]) < 2e-2


def test_a_state_moves_between_devices(tmp_path: Path) -> None:
    on_cpu, on_gpu = both(TINY)
    batch, after = tokens(on_cpu, 2, 30), tokens(on_cpu, 2, 1, 1)
    cache = on_gpu.empty_cache(2)
    with torch.no_grad():
        on_gpu(batch.to(DEVICE), cache)
        cache.save(tmp_path / "cache.safetensors")
        moved = Cache.load(tmp_path / "cache.safetensors")
        found = on_cpu(after, moved).logits
        expected = on_gpu(after.to(DEVICE), cache).logits.cpu()
    assert relative_rms(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_to_the_gpu_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    on_cpu, _ = both(TINY)
    save(on_cpu.to(dtype), tmp_path / "one")
    on_gpu = load(tmp_path / "one", device=DEVICE)
    assert on_gpu.device.type == DEVICE and on_gpu.dtype == dtype
    save(on_gpu, tmp_path / "two")
    back = load(tmp_path / "two").state_dict()
    assert all(torch.equal(back[name], value) for name, value in on_cpu.state_dict().items())


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_bfloat16_is_as_far_from_float64_as_on_the_cpu(name: str) -> None:
    """Half as far again at most: both round the same things, not always at the same places."""
    on_cpu, _ = both(CONFIGS[name])
    batch = tokens(on_cpu, 2, 130)
    with torch.no_grad():
        exact = Nemotron(on_cpu.config, dtype=torch.float64)
        exact.load_state_dict({n: v.double() for n, v in on_cpu.state_dict().items()})
        expected = exact(batch).logits
        narrow = on_cpu.to(torch.bfloat16)
        error = relative_rms(narrow(batch).logits, expected)
        found = narrow.to(DEVICE)(batch.to(DEVICE)).logits
    assert relative_rms(found.cpu(), expected) < 1.5 * error


def bits(model: Nemotron) -> dict[str, Tensor]:
    return {n: v.cpu().flatten().view(torch.uint8) for n, v in model.state_dict().items()}


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
def test_packed_weights(form: str) -> None:
    """Packed on the GPU as on the CPU, to the bit; the model computes the same with them."""
    on_cpu, on_gpu = both(WIDE)
    for model in (on_cpu, on_gpu):
        quantize_model(model, single_format(quantizable_modules(model), form))
    found, expected = (bits(model) for model in (on_gpu, on_cpu))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    batch = tokens(on_cpu, 2, 60)
    with torch.no_grad():
        exact, many = on_cpu(batch).logits, on_gpu(batch.to(DEVICE)).logits
        one = on_gpu(batch[:, :1].to(DEVICE)).logits
    assert relative_rms(many.cpu(), exact) < 1e-4
    assert relative_rms(one.cpu(), exact[:, :1]) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nvfp4"])
def test_training(text: ConcatenatedDocuments, precision: str) -> None:
    """The same losses as on the CPU at first, and the model learns."""
    config = TrainConfig(steps=40, batch_size=4, seq_len=64, lr=1e-2, precision=precision)
    losses = {}
    for place in ("cpu", DEVICE):
        model = Nemotron(LEARNER, seed=0).to(place)
        history = train(model, text, config, progress=False).history
        losses[place] = [record["loss"] for record in history]
    first = [abs(a - b) for a, b in zip(losses[DEVICE][:3], losses["cpu"][:3], strict=True)]
    assert max(first) < (1e-4 if precision == "fp32" else 3e-2)
    assert sum(losses[DEVICE][-5:]) < 0.9 * sum(losses[DEVICE][:5])
