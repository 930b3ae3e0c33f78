"""`torch.compile` and `torch.export`: equal results, and a bound on graphs and graph breaks.

What can go wrong is nearly all in the tracing, so most cases compile for the backends "eager" and
"aot_eager", which trace (and differentiate) and then run PyTorch's own operators. Two cases use
TorchInductor, the default, which writes C++ and calls the system's compiler.

This file is a program: `tests/test_modules_compile.py` runs it once, in a process of its own. In
the process of the tests every function is wrapped to check the shapes of its arguments, and a
compiler cannot read these wrappers. It prints one JSON line: the traceback of each case, or null.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from nemotron_lite import SpeculationOptions, generate
from nemotron_lite.data import Batch, ConcatenatedDocuments
from nemotron_lite.generation.decode_step import DecodeStep
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from nemotron_lite.train.loss import token_loss
from tests.modules import every_kind, random_tokens

# The forms that a compiler reads sum in another order than the tuned ones.
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=2e-5)


def compiled(model: Nemotron, backend: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend=backend, **options)


def breaks() -> int:
    return sum(counters["graph_break"].values())


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def case_lengths_share_one_graph_with_dynamic_shapes(model: Nemotron) -> None:
    """Static, then dynamic; one more beyond a chunk of the scan, and one more for many pairs."""
    call = compiled(model)
    with torch.no_grad():
        for length in (12, 7, 5, 20, 25, 70, 100, 130, 200, 333):
            tokens = random_tokens(2, length, seed=length)
            torch.testing.assert_close(call(tokens).logits, model(tokens).logits, **CLOSE)
    assert breaks() == 0
    assert graphs() <= 5


def case_decoding_does_not_compile_for_every_position(model: Nemotron) -> None:
    tokens = random_tokens(2, 40)
    call, ours, theirs = compiled(model), model.empty_cache(2, 16), model.empty_cache(2, 16)
    with torch.no_grad():
        for start, end in [(0, 6), *((i, i + 1) for i in range(6, 40))]:
            found = call(tokens[:, start:end], ours).logits
            expected = model(tokens[:, start:end], theirs).logits
            torch.testing.assert_close(found, expected, **CLOSE)
    assert ours.lengths.tolist() == [40, 40]
    assert breaks() == 0
    assert graphs() <= 7  # a prompt, the first steps, and buffers that grow


def case_drafts(model: Nemotron) -> None:
    tokens = random_tokens(2, 12)
    call, ours, theirs = compiled(model), model.empty_cache(2), model.empty_cache(2)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(tokens[:, :4], cache)
        for accepted in (2, 0, 3, torch.tensor([1, 4])):
            found = call(tokens[:, 4:8], ours, draft=True).logits
            expected = model(tokens[:, 4:8], theirs, draft=True).logits
            torch.testing.assert_close(found, expected, **CLOSE)
            ours.accept(accepted)
            theirs.accept(accepted)
        torch.testing.assert_close(
            call(tokens[:, :1], ours).logits, model(tokens[:, :1], theirs).logits, **CLOSE
        )


def case_rows_of_different_lengths_break_the_graph_and_stay_right(model: Nemotron) -> None:
    tokens, lengths = random_tokens(2, 12), torch.tensor([12, 5])
    call, ours, theirs = compiled(model), model.empty_cache(2), model.empty_cache(2)
    with torch.no_grad():
        last = dict(lengths=lengths, logits_to_keep=1)
        torch.testing.assert_close(
            call(tokens, **last).logits, model(tokens, **last).logits, **CLOSE
        )
        assert breaks() == 0, "without a cache nothing asks a tensor for its numbers"
        for cache, run in ((ours, call), (theirs, model)):
            run(tokens, cache, lengths=lengths)
        for i in range(3):
            found, expected = (
                run(tokens[:, i : i + 1], cache).logits
                for run, cache in ((call, ours), (model, theirs))
            )
            torch.testing.assert_close(found, expected, **CLOSE)
    assert ours.lengths.tolist() == theirs.lengths.tolist() == [15, 8]
    assert 0 < breaks() <= 20  # where the keys of rows end is asked in every attention layer


def case_lengths_out_of_range_are_noticed_in_compiled_code(model: Nemotron) -> None:
    call = compiled(model)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="must be 0 to 6"):
        call(random_tokens(2, 6), lengths=torch.tensor([3, 9]))


def case_concatenated_documents(model: Nemotron) -> None:
    tokens = random_tokens(2, 12)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
    found = compiled(model)(tokens, seq_idx=seq_idx).logits
    torch.testing.assert_close(found, model(tokens, seq_idx=seq_idx).logits, **CLOSE)
    assert breaks() == 0


def loss_and_gradients(model: Nemotron, call: Callable[..., Any]) -> list[Tensor]:
    model.zero_grad()
    tokens = random_tokens(2, 16)
    out = call(tokens, mtp_depths=2, router_stats=True, apply_head=False)
    loss = token_loss(out.hidden, out.mtp_hidden, model.lm_head, Batch(tokens), mtp_weight=0.3)
    balance = sum(stats.scores.mean() for stats in out.router)
    (loss.total + balance).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return [loss.total.detach(), *grads]


def case_training_loss_and_gradients(model: Nemotron) -> None:
    found = loss_and_gradients(model, compiled(model, "aot_eager"))
    assert breaks() == 0
    assert graphs() == 1
    for ours, theirs in zip(found, loss_and_gradients(model, model), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def case_fullgraph_works_and_refuses_what_it_cannot_read(model: Nemotron) -> None:
    call, tokens = compiled(model, fullgraph=True), random_tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(call(tokens).logits, model(tokens).logits, **CLOSE)
        half = model.empty_cache(2, ssm_dtype=torch.float16)
        with pytest.raises(Exception, match="float16 hashes a new seed"):
            call(tokens[:, :1], half)


def case_float16_states_run_uncompiled_with_the_same_seeds(model: Nemotron) -> None:
    tokens, call = random_tokens(2, 6), compiled(model)
    ours, theirs = (model.empty_cache(2, ssm_dtype=torch.float16) for _ in range(2))
    with torch.no_grad():
        for i in range(6):
            found, expected = (
                run(tokens[:, i : i + 1], cache).logits
                for run, cache in ((call, ours), (model, theirs))
            )
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert ours.layers[0].rounding_seeds == theirs.layers[0].rounding_seeds


def case_a_cache_from_compiled_inference_mode_continues_outside(model: Nemotron) -> None:
    tokens, call = random_tokens(2, 8), compiled(model)
    ours, theirs = model.empty_cache(2), model.empty_cache(2)
    with torch.inference_mode():
        for run, cache in ((call, ours), (model, theirs)):
            run(tokens[:, :5], cache)
            run(tokens[:, 5:6], cache)
    for start in (6, 7):
        found, expected = (model(tokens[:, start : start + 1], c).logits for c in (ours, theirs))
        torch.testing.assert_close(found, expected, **CLOSE)


def case_bfloat16_and_autocast(model: Nemotron) -> None:
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        exact = model(tokens).logits
        small = copy.deepcopy(model).bfloat16()
        rough = (small(tokens).logits - exact).abs().max()
        assert (compiled(small)(tokens).logits - exact).abs().max() < 2 * rough
        with torch.autocast("cpu", torch.bfloat16):
            rough = (model(tokens).logits - exact).abs().max()
            assert (compiled(model)(tokens).logits - exact).abs().max() < 2 * rough


def case_generate_takes_a_compiled_model(model: Nemotron) -> None:
    prompt = [1, 2, 3]
    expected = generate(model, prompt, max_new_tokens=6, temperature=0.0)
    assert generate(compiled(model), prompt, max_new_tokens=6, temperature=0.0) == expected
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    assert generate(in_place, prompt, max_new_tokens=6, temperature=0.0) == expected
    assert graphs() > 0, "compiled code ran"
    options = SpeculationOptions()
    found = generate(in_place, prompt, max_new_tokens=6, temperature=0.0, speculation=options)
    assert found == expected


def case_copies_for_decoding_are_dropped_by_a_compiled_training_step(_: Nemotron) -> None:
    """A fused optimizer changes weights without a new version: a copy that stayed would be used."""
    model = every_kind()
    model.prepare_for_decoding(smallest=0)
    assert model.lm_head._prepacked is not None
    loss_and_gradients(model, compiled(model))
    assert model.lm_head._prepacked is None


def case_default_mode_decodes(_: Nemotron) -> None:
    model = every_kind(pattern="M*", mtp_pattern="", mtp_depths=0)
    tokens, call = random_tokens(2, 4), torch.compile(model)
    ours, theirs = model.empty_cache(2), model.empty_cache(2)
    with torch.no_grad():
        for i in range(4):
            found, expected = (
                run(tokens[:, i : i + 1], cache).logits
                for run, cache in ((call, ours), (model, theirs))
            )
            torch.testing.assert_close(found, expected, **CLOSE)
    assert breaks() == 0


def case_default_mode_trains(model: Nemotron) -> None:
    found = loss_and_gradients(model, torch.compile(model))
    assert breaks() == 0
    for ours, theirs in zip(found, loss_and_gradients(model, model), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def case_train_runs_what_was_compiled(_: Nemotron) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, 4000)
    data = ConcatenatedDocuments(tokens, np.array([0, 1000]))
    config = TrainConfig(steps=2, seq_len=32, batch_size=2)
    losses, models = [], [every_kind() for _ in range(3)]
    models[2].compile(backend="aot_eager")
    for given in (models[0], compiled(models[1], "aot_eager"), models[2]):
        torch._dynamo.reset()  # or the third model would reuse the code of the second
        before = graphs()
        result = train(given, data, config, progress=False)
        assert (graphs() > before) == (given is not models[0])
        losses.append([record["loss"] for record in result.history])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def case_a_forward_pass_is_exported(model: Nemotron) -> None:
    tokens = random_tokens(2, 12)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            program = torch.export.export(model, (tokens,), strict=False)
            torch.testing.assert_close(
                program.module()(tokens).logits, model(tokens).logits, **CLOSE
            )
            dynamic = {"tokens": {1: torch.export.Dim("t", min=3, max=30)}}
    program = torch.export.export(model, (tokens,), strict=False, dynamic_shapes=dynamic)
    for length in (3, 7, 30):
        other = random_tokens(2, length)
        torch.testing.assert_close(program.module()(other).logits, model(other).logits, **CLOSE)


def case_a_decoding_step_is_exported(model: Nemotron) -> None:
    step, tokens, rows = DecodeStep(model), random_tokens(2, 12), torch.export.Dim("b", max=16)
    cache = model.empty_cache(2, capacity=16)
    model(tokens[:, :6], cache, lengths=torch.tensor([6, 4]))
    lengths, state = step.tensors(cache.clone())
    shapes = {"tokens": {0: rows}, "lengths": {0: rows}, "state": [{0: rows} for _ in state]}
    given = (tokens[:, :1], lengths, state)
    program = torch.export.export(step, given, strict=False, dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "nemotron" in str(n.target)], "only ATen"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    before = [tensor.clone() for tensor in state]
    first = state
    for i in range(6, 12):
        logits, state = run(tokens[:, i : i + 1], lengths, state)
        lengths = lengths + 1
        with torch.no_grad():
            expected = model(tokens[:, i : i + 1], cache).logits[:, 0]
        torch.testing.assert_close(logits, expected, **CLOSE)
    for old, same in zip(before, first, strict=True):
        assert torch.equal(old, same), "the state that was given is not changed"
    alone, _ = run(tokens[:1, :1], lengths[:1], [tensor[:1] for tensor in state])
    both, _ = step(tokens[:, :1], lengths, state)
    torch.testing.assert_close(alone, both[:1], **CLOSE)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        run(tokens[:, :1], lengths + 16, state)


def case_what_cannot_be_exported_says_why(model: Nemotron) -> None:
    tokens = random_tokens(2, 1)
    with pytest.raises(ValueError, match="DecodeStep"):
        torch.export.export(model, (tokens, model.empty_cache(2)), strict=False)
    step = DecodeStep(model)
    with pytest.raises(ValueError, match="ssm_dtype=None"):
        step.tensors(model.empty_cache(2, ssm_dtype=torch.float16))
    lengths, state = step.tensors(model.empty_cache(2))
    with pytest.raises(ValueError, match="one token per row"):
        step(random_tokens(2, 3), lengths, state)
    with pytest.raises(ValueError, match="expected 4"):
        step(tokens, lengths, state[:-1])


CASES = {
    name.removeprefix("case_"): f for name, f in list(globals().items()) if name[:5] == "case_"
}
DEFAULT_MODE = ("default_mode_decodes", "default_mode_trains")  # these call a C++ compiler


def main(names: list[str]) -> None:
    found: dict[str, str | None] = {}
    model = every_kind()
    for name in names:
        torch._dynamo.reset()
        counters.clear()
        try:
            CASES[name](model)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        sys.stderr.write(f"{name}: {'right' if found[name] is None else 'WRONG'}\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
