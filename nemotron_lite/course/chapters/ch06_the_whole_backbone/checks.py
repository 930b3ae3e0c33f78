"""Checks of chapter 06's exercises.

A block and a model are compared with the package's, which have the same weights: `layers.Block` and
`Nemotron`. Checkpoints are dicts of small tensors that are made here, with the names of the hub,
and counts are compared with the ledger. Sizes differ wherever they can, so that no two widths are
mistaken for each other.

Answers are only called, with configs, tensors and dicts, so they may run in another process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import layers, ledger
from nemotron_lite.config import PRESETS, NemotronConfig
from nemotron_lite.course.exercises import close, gradients, keeps_inputs, raises, strided
from nemotron_lite.model import Nemotron

Answer = Callable[..., Any]


def tiny(pattern: str, **changes: Any) -> NemotronConfig:
    """A model that runs in milliseconds; it has a latent and a shared expert."""
    sizes: dict[str, Any] = dict(
        vocab_size=13, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=7, moe_latent_size=5,
        moe_shared_expert_intermediate_size=10, routed_scaling_factor=2.5, initializer_range=0.3,
    )  # fmt: skip
    return NemotronConfig(pattern, **(sizes | changes))


def _with_random_norms(module: Any) -> Any:
    """Norms with weights of their own: with ones a forgotten weight would change nothing."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return module


def _pair(found: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise AssertionError(f"{what} must return two results, found {type(found).__name__}.")
    return found[0], found[1]


def _load(mine: Any, package: Any) -> Any:
    """Load the package's weights into the learner's module; a wrong name or shape is named."""
    wanted = {name: list(value.shape) for name, value in package.state_dict().items()}
    found = {name: list(value.shape) for name, value in mine.state_dict().items()}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not missing, f"there is no weight {missing[0]!r} (yours are {sorted(found)[:4]} …)"
    assert not extra, f"there is a weight {extra[0]!r}, which the package does not have"
    for name, shape in wanted.items():
        assert found[name] == shape, f"{name} has shape {found[name]}; expected {shape}"
    mine.load_state_dict(package.state_dict())
    return mine


def _weights_are_kept(mine: Any, package: Any) -> None:
    """Every weight still has its value after all of them are loaded: none is shared."""
    found = mine.state_dict()
    for name, value in package.state_dict().items():
        close(found[name], value, what=f"after loading, {name}", rtol=0, atol=0)


def _same_gradients(mine: Any, package: Any) -> None:
    """After both have run backward: the gradient of each weight."""
    expected = dict(package.named_parameters())
    for name, parameter in mine.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}: look for .detach()"
        right = expected[name].grad
        close(parameter.grad, right, what=f"the gradient of {name}", rtol=1e-3, atol=1e-4)


# 06.block


def _blocks(answer: Answer, letter: str, **changes: Any) -> tuple[Any, Any]:
    """The learner's block and the package's, with the same weights."""
    config = tiny(letter, **changes)
    package = layers.Block(config, letter, "block")
    with torch.no_grad():
        package.init_weights(0.3, 1.0)
    _with_random_norms(package)
    return _load(answer(config, letter), package), package


def _stream(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, 16)


def block_names(answer: Answer) -> None:
    for letter in "M*E":
        _weights_are_kept(*_blocks(answer, letter))


def block_values(answer: Answer) -> None:
    for letter in "E*M":
        mine, package = _blocks(answer, letter)
        x = strided(_stream(2, 7))
        got = keeps_inputs(lambda x, mine=mine: mine(x)[0], x, what="the block")
        what = f"the stream after a block of kind {letter}"
        close(got, package(x).detach(), what=what, rtol=1e-3, atol=1e-4, dtype=True)


def block_eps(answer: Answer) -> None:
    mine, package = _blocks(answer, "E", norm_eps=0.5)
    x = 0.3 * _stream(1, 4)
    got, _ = _pair(mine(x), "forward")
    close(got, package(x).detach(), what="with norm_eps=0.5, the stream", rtol=1e-3, atol=1e-4)


def block_caches(answer: Answer) -> None:
    for letter in "M*E":
        mine, _ = _blocks(answer, letter)
        before = mine.empty_cache(2)
        _, after = _pair(mine(_stream(2, 3), before), "forward")
        for cache, name in ((before, "empty_cache"), (after, "forward, called with it,")):
            if letter == "E":
                assert cache is None, f"{name} returns a cache for E, which has none."
            else:
                assert cache is not None, f"{name} returns no cache for {letter}."


def block_pieces(answer: Answer) -> None:
    for letter in "*ME":
        mine, package = _blocks(answer, letter)
        x = _stream(2, 8)
        cache, parts = mine.empty_cache(2), []
        for piece in x.split((4, 1, 3), dim=1):
            part, cache = _pair(mine(piece, cache), "forward")
            parts.append(part)
        what = f"the stream of 4 + 1 + 3 tokens through a block of kind {letter}"
        expected = package(x).detach()
        close(torch.cat(parts, dim=1), expected, what=what, rtol=1e-3, atol=1e-4)
    # M returns a cache also where none was given: a text may begin without one.
    mine, package = _blocks(answer, "M")
    x = _stream(2, 6)
    _, cache = _pair(mine(x[:, :4]), "forward")
    part, _ = _pair(mine(x[:, 4:], cache), "forward")
    what = "the stream of the last 2 of 6 tokens, after the cache of a call without a cache"
    close(part, package(x).detach()[:, 4:], what=what, rtol=1e-3, atol=1e-4)


def block_gradients(answer: Answer) -> None:
    for letter in "M*E":
        mine, package = _blocks(answer, letter)
        x = torch.randn(2, 5, 16)
        gradients(lambda x, mine=mine: mine(x)[0], package, (x,), what=f"kind {letter}", atol=1e-4)
        for block in (mine, package):
            block.zero_grad()
        mine(x)[0].square().sum().backward()
        package(x).square().sum().backward()
        _same_gradients(mine, package)


# 06.backbone


def _models(answer: Answer, pattern: str, **changes: Any) -> tuple[Any, Nemotron]:
    """The learner's model and the package's, with the same weights."""
    package = Nemotron(tiny(pattern, **changes), seed=int(torch.randint(2**31, ())))
    _with_random_norms(package)
    return _load(answer(package.config), package), package


def _tokens(*shape: int) -> Tensor:
    return torch.randint(13, shape)


def _expected(package: Nemotron, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return package(tokens).logits


def _same_logits(mine: Any, package: Nemotron, tokens: Tensor, what: str) -> None:
    logits, _ = _pair(mine(tokens), "forward")
    close(logits, _expected(package, tokens), what=what, rtol=1e-3, atol=1e-3)


def backbone_names(answer: Answer) -> None:
    for pattern in ("E", "MEM*E"):
        _weights_are_kept(*_models(answer, pattern))


def backbone_ends(answer: Answer) -> None:
    mine, package = _models(answer, "*")
    with torch.no_grad():  # a layer that adds nothing
        block: Any = package.backbone.layers[0]
        block.mixer.o_proj.weight.zero_()
    mine.load_state_dict(package.state_dict())
    what = "with one layer that adds nothing, the tensor of logits"
    _same_logits(mine, package, _tokens(2, 5), what)


def backbone_order(answer: Answer) -> None:
    for pattern in ("M", "E", "*", "MM", "ME*", "*EM", "MEM*E"):
        mine, package = _models(answer, pattern)
        _same_logits(mine, package, _tokens(2, 7), f"the tensor of logits of {pattern!r}")


def backbone_eps(answer: Answer) -> None:
    mine, package = _models(answer, "E", norm_eps=0.5)
    _same_logits(mine, package, _tokens(1, 4), "with norm_eps=0.5, the tensor of logits")


def backbone_caches(answer: Answer) -> None:
    pattern = "MEM*E"
    mine, _ = _models(answer, pattern)
    caches = mine.empty_caches(2)
    _, after = _pair(mine(_tokens(2, 3), caches), "forward")
    for found, name in ((caches, "empty_caches"), (after, "forward")):
        assert isinstance(found, list | tuple), f"{name} must give a list of caches."
        assert len(found) == 5, f"{name} gives {len(found)} caches for 5 layers."
        kinds = "".join(
            "-" if one is None else kind for one, kind in zip(found, pattern, strict=True)
        )
        assert kinds == "M-M*-", f"{name}: layers with a cache are {kinds!r}; expected 'M-M*-'."


def backbone_pieces(answer: Answer) -> None:
    mine, package = _models(answer, "MEM*E*")
    tokens = _tokens(2, 8)
    caches, parts = mine.empty_caches(2), []
    for piece in tokens.split((3, 1, 1, 3), dim=1):
        logits, caches = _pair(mine(piece, caches), "forward")
        parts.append(logits)
    expected = _expected(package, tokens)
    what = "the tensor of logits of 3 + 1 + 1 + 3 tokens"
    close(torch.cat(parts, dim=1), expected, what=what, rtol=1e-3, atol=1e-3)


def backbone_write(answer: Answer) -> None:
    for prompt, count in ((5, 1), (1, 4), (4, 7)):
        mine, package = _models(answer, "MEM*E")
        tokens = _tokens(3, prompt)
        text = tokens
        for _ in range(count):
            best = _expected(package, text)[:, -1:].argmax(-1)
            text = torch.cat([text, best], dim=1)
        got = keeps_inputs(lambda tokens, mine=mine, n=count: mine.write(tokens, n), tokens)
        what = f"the text of {count} tokens after prompts of {prompt}"
        close(got, text[:, prompt:], what=what, rtol=0, atol=0)


def backbone_gradients(answer: Answer) -> None:
    mine, package = _models(answer, "ME*")
    tokens = _tokens(2, 8)
    for logits in (mine(tokens)[0], package(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    _same_gradients(mine, package)


# 06.checkpoint_tensors

Named = dict[str, Tensor]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _split(answer: Answer, *arguments: Any) -> tuple[Named, Named]:
    found = _pair(answer(*arguments), "checkpoint_tensors")
    for part in found:
        if not isinstance(part, dict):
            raise AssertionError(f"expected two dicts, found a {type(part).__name__} in the pair.")
    return found


def _same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not missing, f"{what}: there is no {missing[0]!r} (yours are {sorted(found)[:4]} …)"
    assert not extra, f"{what}: {extra[0]!r} should not be there"
    for name, value in expected.items():
        close(found[name], value, what=f"{what}: {name}", rtol=0, atol=0, dtype=True)


def _plain() -> Named:
    """Tensors that keep their names, of several dtypes."""
    return {
        "backbone.embeddings.weight": _random(5, 3).bfloat16(),
        "backbone.layers.0.norm.weight": _random(3),
        "backbone.layers.0.mixer.A_log": _random(4),
        "backbone.layers.1.mixer.shared_experts.up_proj.weight": _random(6, 3).half(),
        "lm_head.weight": _random(5, 3).bfloat16(),
    }


def tensors_one_file(answer: Answer) -> None:
    plain = _plain()
    found, mtp = _split(answer, {"model.safetensors": plain})
    _same_tensors(found, plain, "one file without an index")
    assert not mtp, f"{sorted(mtp)} is no tensor of an MTP module."


def tensors_shards(answer: Answer) -> None:
    plain, names = (
        _plain(),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    )
    weight_map = {name: names[i % 2] for i, name in enumerate(plain)}
    shards = {
        file: {name: plain[name] for name in plain if weight_map[name] == file} for file in names
    }
    found, _ = _split(answer, shards, weight_map)
    _same_tensors(found, plain, "two files")
    # What an earlier save has left: other values under the same names, and a name of its own.
    for file in names:
        old = {name: _random(2) for name in plain if weight_map[name] != file}
        shards[file] = old | shards[file] | {"backbone.layers.7.norm.weight": _random(3)}
    found, _ = _split(answer, shards, weight_map)
    _same_tensors(found, plain, "two files that hold tensors which the index does not name there")


def tensors_missing(answer: Answer) -> None:
    plain = _plain()
    number = random.randint(2, 9)
    gone = f"model-0000{number}-of-00009.safetensors"
    here = "model-00001-of-00009.safetensors"
    weight_map = dict.fromkeys(plain, here) | {"backbone.norm_f.weight": gone}
    raises(
        answer, {here: plain}, weight_map,
        error=FileNotFoundError, what=f"without {gone}", match=gone,
    )  # fmt: skip


def tensors_prefixes(answer: Answer) -> None:
    plain = _plain()
    memory = {name.replace("backbone.", "model."): value for name, value in plain.items()}
    found, _ = _split(answer, {"model.safetensors": memory})
    _same_tensors(found, plain, "names that begin with model.")


def tensors_experts(answer: Answer) -> None:
    sizes = {"up_proj": (3, 2), "down_proj": (2, 3)}
    expected: Named = {}
    stored: Named = {}
    for layer in (1, 3):
        for matrix, shape in sizes.items():
            stack = _random(12, *shape)
            stem = f"backbone.layers.{layer}.mixer.experts"
            expected[f"{stem}.{matrix}"] = stack
            stored |= {f"{stem}.{e}.{matrix}.weight": stack[e] for e in range(12)}
    names = random.sample(sorted(stored), len(stored))
    found, _ = _split(answer, {"model.safetensors": {name: stored[name] for name in names}})
    _same_tensors(found, expected, "12 experts in two layers")
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: random.choice(files) for name in names}
    shards = {file: {n: stored[n] for n in names if weight_map[n] == file} for file in files}
    found, _ = _split(answer, shards, weight_map)
    _same_tensors(found, expected, "12 experts in two layers and three files")


def tensors_stacked(answer: Answer) -> None:
    stacks = {
        "layers.1.mixer.experts.up_proj": _random(3, 4, 2),
        "layers.1.mixer.experts.down_proj": _random(3, 2, 4),
        "layers.1.mixer.shared_experts.down_proj.weight": _random(2, 4),
    }
    for prefix in ("backbone.", "model."):
        stored = {prefix + name: value for name, value in stacks.items()}
        found, _ = _split(answer, {"model.safetensors": stored})
        expected = {"backbone." + name: value for name, value in stacks.items()}
        _same_tensors(found, expected, f"experts stacked under {prefix}")


def tensors_mtp(answer: Answer) -> None:
    plain, stack = _plain(), _random(11, 3, 2)
    stem = "mtp.layers.1.mixer.experts"
    module = {"mtp.layers.0.eh_proj.weight": _random(3, 6), "mtp.layers.0.norm.weight": _random(3)}
    experts = {f"{stem}.{e}.up_proj.weight": stack[e] for e in random.sample(range(11), 11)}
    found, mtp = _split(answer, {"model.safetensors": plain | module | experts})
    _same_tensors(found, plain, "the tensors of the model")
    _same_tensors(mtp, module | {f"{stem}.up_proj": stack}, "the tensors of the MTP module")


# 06.count


def _config(pattern: str) -> NemotronConfig:
    """Sizes that differ from call to call."""
    return tiny(
        pattern,
        vocab_size=random.randint(50, 99),
        hidden_size=random.randint(20, 40),
        n_routed_experts=random.randint(8, 16),
        num_experts_per_tok=random.randint(2, 5),
        moe_latent_size=random.choice((None, random.randint(4, 9))),
    )


def _counted(answer: Answer, config: NemotronConfig, part: int, what: str) -> None:
    parameters = ledger.parameters(config)
    name = ("total", "active")[part]
    expected = (parameters.backbone, parameters.active)[part]
    found = _pair(answer(config), "count")[part]
    close(found, expected, what=f"{what}: {name} parameters", rtol=0, atol=0)


def count_outside(answer: Answer) -> None:
    for letter in "*M":
        _counted(answer, _config(letter), 0, f"a model of one layer, {letter!r}")


def count_layers(answer: Answer) -> None:
    for pattern in ("MM", "MEM*E", "*M*M", "EEE"):
        _counted(answer, _config(pattern), 0, f"the pattern {pattern!r}")


def count_active(answer: Answer) -> None:
    for pattern in ("*", "E", "MEM*E"):
        _counted(answer, _config(pattern), 1, f"the pattern {pattern!r}")


def count_published(answer: Answer) -> None:
    for name in ("nano", "super"):
        for part in (0, 1):
            _counted(answer, PRESETS[name], part, name.capitalize())


# 06.seconds_per_token

Work = tuple[float, float, float]


def _expected_seconds(pattern: str, work: Mapping[str, Work], rates: Work) -> float:
    parts = [work[part] for part in (*pattern, "head")]
    return sum(m / rates[0] + max(r / rates[1], f / rates[2]) for m, r, f in parts)


def _timed(answer: Answer, pattern: str, work: dict[str, Work], rates: Work, what: str) -> None:
    expected = _expected_seconds(pattern, work, rates)
    close(answer(pattern, work, rates), expected, what=what, rtol=1e-6, atol=0)


def _about(number: float) -> float:
    return number * random.uniform(0.8, 1.25)


def seconds_one_layer(answer: Answer) -> None:
    nothing = (0.0, 0.0, 0.0)
    rates = (_about(3.0), _about(50.0), _about(700.0))
    for bound, layer in (
        ("reading is slower", (_about(6.0), _about(400.0), _about(900.0))),
        ("computing is slower", (_about(6.0), _about(60.0), _about(9000.0))),
        ("making is slower than both", (_about(90.0), _about(60.0), _about(900.0))),
    ):
        _timed(
            answer,
            "M",
            {"M": layer, "head": nothing},
            rates,
            f"the time of one layer in which {bound}",
        )


def seconds_pattern(answer: Answer) -> None:
    rates = (_about(3.0), _about(50.0), _about(700.0))
    work = {part: (_about(6.0), _about(400.0), _about(900.0)) for part in ("M", "E", "*", "head")}
    for pattern in ("M", "MEM*E", "EE*EE"):
        _timed(answer, pattern, work, rates, f"the time of the pattern {pattern!r} and the head")


def seconds_slower(answer: Answer) -> None:
    rates = (_about(3.0), _about(50.0), _about(700.0))
    work = {
        "M": (_about(1.0), _about(400.0), _about(900.0)),
        "*": (_about(1.0), _about(60.0), _about(9000.0)),
        "head": (_about(1.0), _about(300.0), _about(500.0)),
    }
    what = "where M waits for memory and * for arithmetic, the time of the pattern 'M*M'"
    _timed(answer, "M*M", work, rates, what)


def seconds_ready(answer: Answer) -> None:
    work = {part: (_about(6.0), _about(400.0), _about(900.0)) for part in ("M", "E", "head")}
    rates = (math.inf, _about(50.0), _about(700.0))
    _timed(answer, "ME", work, rates, "with an infinite rate of making, the time")
