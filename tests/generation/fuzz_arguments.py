"""Calls of `generate` and `score` with values of every type, from a seed; run as a program.

    python -m tests.generation.fuzz_arguments 1200 7       calls, seed

Each call must give results of the right shape, or raise a TypeError or ValueError that names the
argument. It runs without the tests' own check of types, which would refuse wrong types before the
package sees them. The last line of the output is a summary as JSON.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections import Counter, deque
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from nemotron_lite import Cache, GenerationOptions, Nemotron, NemotronConfig, SpeculationOptions
from nemotron_lite.data.tokenizer import train_tokenizer
from nemotron_lite.generation.defaults import FIELDS, default_options
from nemotron_lite.generation.generate import generate, stream
from nemotron_lite.generation.options import GenerationSettings

SLOW = 5.0  # seconds


class Unprintable:
    """Its repr fails, as that of an object that is half torn down."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Lying(list):
    """A list whose members cannot be read."""

    def __iter__(self) -> Any:
        raise OSError("no members")


INF = float("inf")
WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 65, 10**12, -(10**12), 2**63, 2**64, 10**400,
    -(10**400),
    0.0, 0.5, 1.0, -1.0, 1.5, 3.0, INF, -INF, float("nan"), 5e-324, 1e-45, 1e308,
    "", "a", "3", "\ud800", "é" * 9, "x" * 5000, b"", b"ab", bytearray(b"a"), memoryview(b"a"),
    [], [1], [1, 2], [[]], [[1], [2, 3]], [[1], []], [1, [2]], ["a", "b"], ["a", 1], [None], [1.5],
    [-1], [264], [10**400], [True], (), (1,), ((1, 2), (3,)), {}, {1: 2}, {"a": 1}, {1, 2},
    range(3), range(10**12), iter([1, 2]), deque([1, 2]), object, object(), Unprintable(),
    [Unprintable()], Lying([1]), Fraction(1, 2), 1j, lambda *a: a, Ellipsis, int, [[["a"]]],
    np.int8(3), np.int64(2), np.uint64(2**64 - 1), np.float16(0.5), np.float32(0.9), np.bool_(True),
    np.array(3), np.array([1, 2]), np.array([[1, 2], [3, 4]], np.uint8), np.array([], np.int64),
    np.array([1.5]), np.array(["a"]), np.array([1, None], dtype=object), np.zeros((1, 1, 1), int),
    np.str_("a"), torch.tensor(3), torch.tensor([1, 2]), torch.tensor([[1, 2]], dtype=torch.uint8),
    torch.tensor([[1, 2], [3, 4]], dtype=torch.int16), torch.tensor([1.5]), torch.tensor(INF),
    torch.tensor([]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64),
    torch.tensor(True), torch.zeros(2, device="meta"), torch.tensor([1, 2]).to_sparse(),
    torch.zeros(2, dtype=torch.int64, device="meta"), torch.float16, torch.bfloat16, torch.int8,
    torch.nn.Linear(2, 2), [torch.tensor(1), torch.tensor(2)], [np.array([1, 2]), np.array([3])],
    [torch.tensor([1, 2]), torch.tensor([3])], SpeculationOptions(),
    SpeculationOptions(draft_length=2), GenerationOptions(), GenerationOptions(max_new_tokens=2),
    [lambda t, x: x],
    [lambda t, x: None], [lambda t, x: x[:-1]], [lambda t, x: x * float("nan")],
    [lambda t, x: x - INF], [lambda t, x: x.half()],
]  # fmt: skip
PROMPTS: list[Any] = [
    "a b", ["a", "bc"], [1, 2], [[1], [2, 3]], torch.tensor([3, 4]), np.array([[5, 6]], np.uint8)
]  # fmt: skip
GOOD: dict[str, list[Any]] = {
    "prompts": PROMPTS,
    "max_new_tokens": [0, 1, np.int8(3), torch.tensor(2), 10**12, 2**63 - 1],
    "temperature": [
        0,
        1,
        0.5,
        5e-324,
        1e-45,
        1e-19,
        1e308,
        np.float32(0.7),
        np.float16(1),
        10**300,
    ],
    "top_k": [1, 3, 10**12, np.int64(4), torch.tensor(2), None],
    "top_p": [5e-324, 1e-45, 0.5, 1, np.float32(0.9), torch.tensor(0.3), None],
    "min_p": [0, 5e-324, 0.1, 1, np.float64(0.2), None],
    "repetition_penalty": [1e-3, 0.5, 1, 1.3, 1000, np.float32(1.1), Fraction(3, 2), None],
    "logits_processors": [(), [lambda t, x: x], [lambda t, x: x - 1, lambda t, x: x * 2]],
    "stop": [(), (1, 2), np.array([3, 4]), torch.tensor([5]), {6}, range(9), None],
    "stop_strings": ["a", ("b", "é"), ["value"], {"c"}, ()],
    "seed": [0, -1, -(2**63), 2**64 - 1, np.int64(3), np.uint64(2**64 - 1), torch.tensor(5), None],
    "logprobs": [0, 3, 264, 10**12, np.int8(2), None],
    "prefill_segment": [1, 2, 10**12, np.int64(3), None],
    "ssm_dtype": [torch.float16, torch.float32, None],
    "speculation": [None, SpeculationOptions(), SpeculationOptions(draft_length=np.int64(3))],
    "prepare_weights": [True, False, np.bool_(True)],
    "compiled": [True, False],
    "check_layers": [True, False],
    "options": [None, GenerationOptions(max_new_tokens=np.int64(2), stop_strings="a")],
    "num_samples": [1, 3, np.int64(2), torch.tensor(2), 64, None],
    "return_statistics": [True, np.bool_(False)],
    "return_details": [True, np.bool_(True)],
    "cache": [None],
}
JSON_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2.5, 10**30, 1e300, -1e-300, "", "hot", "1", [], [1], [1, "a"], {},
    {"a": 1},
]  # fmt: skip
OPTIONS = sorted(GenerationSettings.__annotations__)
OTHERS = [
    "prompts", "max_new_tokens", "options", "cache", "num_samples", "return_statistics",
    "return_details",
]  # fmt: skip


def build() -> Nemotron:
    """A model of a few hundred weights with a tokenizer."""
    config = NemotronConfig(
        pattern="ME*", vocab_size=264, hidden_size=8,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        mamba_num_heads=2, mamba_head_dim=4, ssm_state_size=4, n_groups=1, chunk_size=16,
        n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, moe_latent_size=8,
        moe_shared_expert_intermediate_size=8, mtp_pattern="*E", mtp_depths=2,
        initializer_range=0.5,
    )  # fmt: skip
    model = Nemotron(config, seed=0)
    model.tokenizer = train_tokenizer(["a b c value é\n"] * 9, vocab_size=264)
    return model


def call_with(random_: random.Random, model: Nemotron) -> dict[str, Any]:
    """Arguments of one call: mostly right ones, and one to three of any kind."""
    arguments: dict[str, Any] = dict(
        prompts=random_.choice(PROMPTS), max_new_tokens=random_.choice([0, 1, 3]), seed=0
    )
    if random_.random() < 0.3:
        arguments["speculation"] = SpeculationOptions(draft_length=2)
    if random_.random() < 0.2:
        arguments["cache"] = model.empty_cache(random_.choice([1, 2]), mtp=random_.random() < 0.7)
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        name = random_.choice([*OPTIONS, *OTHERS])
        arguments[name] = random_.choice(GOOD[name] if random_.random() < 0.6 else WRONG)
    most = arguments["max_new_tokens"]
    endless = most is None or (isinstance(most, int) and most > 64)
    if endless:  # absurd lengths must not allocate; every token of the vocabulary ends the row
        arguments["stop"] = range(264)
    return arguments


def rows_of(prompts: Any) -> int | None:
    """How many prompts there are; None for one that stands alone."""
    if isinstance(prompts, str):
        return None
    if isinstance(prompts, torch.Tensor | np.ndarray):
        texts = str(prompts.dtype).startswith("<U")
        return None if prompts.ndim == 1 and not texts else len(prompts)
    first = prompts[0] if len(prompts) else 0
    alone = not isinstance(first, str | list | tuple) and not getattr(first, "ndim", 0)
    return None if alone else len(prompts)


def is_right(result: Any, arguments: dict[str, Any]) -> bool:
    """Whether a result has the shape that its arguments ask for."""
    if bool(arguments.get("return_statistics")):
        if not isinstance(result, tuple) or len(result) != 2:
            return False
        result = result[0]
    rows = rows_of(arguments["prompts"])
    given = [result] if rows is None else result
    if rows is not None and (not isinstance(result, list) or len(result) != rows):
        return False
    samples = arguments.get("num_samples")
    if samples is not None:
        if any(not isinstance(row, list) or len(row) != int(samples) for row in given):
            return False
        given = [sample for row in given for sample in row]
    if bool(arguments.get("return_details")):
        return all(type(row).__name__ == "GenerationResult" for row in given)
    text = isinstance(arguments["prompts"], str) or (
        rows is not None and rows > 0 and isinstance(arguments["prompts"][0], str)
    )
    if text:
        return all(isinstance(row, str) for row in given)
    return all(isinstance(row, list) and all(type(t) is int for t in row) for row in given)


def names_an_argument(error: Exception, arguments: dict[str, Any]) -> bool:
    """Whether a message says which argument is wrong."""
    text = str(error)
    if isinstance(error, UnicodeError):
        return False
    return (
        "prompt" in text
        or any(name in text for name in arguments if name != "seed")
        or "seed=" in text
    )


def main(calls: int, seed: int) -> None:
    """Make the calls, and print every one that went wrong and a summary."""
    torch.set_num_threads(1)
    random_, model, counts = random.Random(seed), build(), Counter[str]()
    generate(model, [1, 2], 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = 0.0
    for number in range(calls):
        arguments = call_with(random_, model)
        started = time.perf_counter()
        try:
            if random_.random() < 0.15:
                for name in ("return_statistics", "return_details"):
                    arguments.pop(name, None)
                list(stream(model, **arguments))
                verdict = "streamed"
            else:
                right = is_right(generate(model, **arguments), arguments)
                verdict = "right" if right else "WRONG SHAPE"
        except (TypeError, ValueError, FloatingPointError) as error:
            named = names_an_argument(error, arguments)
            verdict = "refused" if named else f"UNNAMED {type(error).__name__}: {str(error)[:200]}"
        except Exception as error:
            verdict = f"RAW {type(error).__name__}: {str(error)[:200]}"
        seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        if seconds > SLOW:
            verdict = f"SLOW {seconds:.1f} s"
        counts[verdict.split()[0]] += 1
        if verdict.split()[0].isupper():
            shown = {}
            for name, value in arguments.items():
                try:
                    shown[name] = "cache" if isinstance(value, Cache) else repr(value)[:80]
                except Exception:
                    shown[name] = type(value).__name__
            sys.stdout.write(f"{number}: {verdict}\n    {shown!a}\n")
    for name in (*FIELDS, "do_sample", "eos_token_id"):
        for value in JSON_VALUES:
            model.companion_files["generation_config.json"] = json.dumps({name: value}).encode()
            try:
                default_options(model)
            except ValueError as error:
                if f"generation_config.json: {name}" not in str(error):
                    sys.stdout.write(f"generation_config.json {name}={value}: {error}\n")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    summary = {"counts": counts, "slowest": slowest, "grown": grown}
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
