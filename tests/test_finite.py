"""Where NaN or infinity began: every module of a model is found when its weight is broken."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from nemotron_lite import generate
from nemotron_lite.config import LAYER_KINDS, NemotronConfig
from nemotron_lite.finite import (
    BadLayer,
    NotFiniteError,
    check_layers,
    find_bad_layer,
    logits_error,
)
from nemotron_lite.layers import ForwardContext
from nemotron_lite.model import Nemotron
from tests.test_model import TINY, _tokens

CONFIG = TINY.replace(mtp_pattern="*E", mtp_depths=1)


def build(config: NemotronConfig = CONFIG) -> Nemotron:
    return Nemotron(config, seed=1).eval()


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return build()


def matrices(model: nn.Module) -> list[str]:
    """Every weight whose numbers all tokens read."""
    skipped = ("embeddings", "experts", "conv1d")  # read by some tokens; used by another module
    return [name for name, _ in model.named_parameters() if not any(s in name for s in skipped)]


@pytest.mark.parametrize("name", matrices(build()))
def test_a_broken_weight_is_found_in_its_layer(model: Nemotron, name: str) -> None:
    model = copy.deepcopy(model)
    model.get_parameter(name).data.fill_(float("nan"))
    with pytest.raises(NotFiniteError) as caught, check_layers(model), torch.no_grad():
        model(_tokens(2, 6), mtp_depths=1)
    place = caught.value.place
    parts = name.split(".")
    if "layers" in parts:
        layer = ".".join(parts[: parts.index("layers") + 2])
        assert place.layer == int(parts[parts.index("layers") + 1])
        assert place.kind == LAYER_KINDS[str(model.get_submodule(layer).kind)]
        assert place.name.startswith(layer)
    else:
        assert place.layer is None and place.name == name.rpartition(".")[0]
    assert (place.row, place.token) == (0, 0) and place.where == "output"


def test_the_row_and_the_token_are_named(model: Nemotron) -> None:
    tokens = _tokens(3, 7).clamp(min=2)
    tokens[1, 4] = 1
    bad = copy.deepcopy(model)
    bad.backbone.embeddings.weight.data[1, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="row 1, token 4") as caught, check_layers(bad):
        bad(tokens)
    assert caught.value.place.name == "backbone.embeddings"
    # Inside a mixture of experts rows and tokens are one axis.
    moe = CONFIG.pattern.index("E")
    bad = copy.deepcopy(model)
    seen = []

    def spoil(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        output = output.clone()
        output[1 * 7 + 4] = float("inf")
        return output

    bad.backbone.layers[moe].mixer.shared_experts.up_proj.register_forward_hook(spoil)
    with pytest.raises(NotFiniteError) as caught, check_layers(bad):
        bad(tokens)
    place = caught.value.place
    assert len(seen) == 1 and len(seen[0]) == 2
    assert (place.layer, place.kind, place.row, place.token) == (moe, "moe", 1, 4)
    assert place.found == "+inf"


def test_a_scan_that_overflows_is_between_two_modules(model: Nemotron) -> None:
    bad, mamba = copy.deepcopy(model), CONFIG.pattern.index("M")
    bad.backbone.layers[mamba].mixer.D.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError) as caught, check_layers(bad):
        bad(_tokens(1, 5))
    assert caught.value.place.name == f"backbone.layers.{mamba}.mixer.norm"
    assert f"after backbone.layers.{mamba}.mixer.conv1d" in str(caught.value)


def test_it_works_with_gradients_steps_drafts_and_the_mtp_module_s_last_token() -> None:
    model = build()
    with check_layers(model):
        model(_tokens(2, 6), mtp_depths=1).logits.sum().backward()
        cache = model.empty_cache(2, mtp=True)
        hidden = model(_tokens(2, 6), cache).hidden
        model(_tokens(2, 1), cache)
        model(_tokens(2, 3), cache, draft=True)
        cache.accept(1)
        assert model.mtp is not None
        embedded = model.backbone.embed(_tokens(2, 6))
        model.mtp(hidden, embedded, cache.mtp, ForwardContext(last_only=True))
        model.mtp.layers[0].mixer.k_proj.weight.data.fill_(float("nan"))
        with pytest.raises(NotFiniteError, match=r"layer 0 \(attention\), mtp\.layers\.0\.mixer"):
            model.mtp(hidden, embedded, cache.mtp, ForwardContext(last_only=True))
    # Outside of the block nothing is checked, and no hook is left.
    model.mtp(hidden, embedded, cache.mtp, ForwardContext(last_only=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error(model: Nemotron) -> None:
    with pytest.raises(KeyError), check_layers(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_found_afterwards(model: Nemotron) -> None:
    assert find_bad_layer(model) is None
    assert find_bad_layer(model, tokens=[1, 2, 3]) is None
    bad = copy.deepcopy(model)
    bad.lm_head.weight.data[5] = float("nan")
    for tokens in (None, [1, 2, 3]):
        place = find_bad_layer(bad, tokens=tokens)
        assert place is not None and place.name.startswith("lm_head") and place.found == "NaN"
    single = find_bad_layer(bad, tokens=[4])  # too short for the MTP module
    assert single is not None and single.name == "lm_head"
    bias = copy.deepcopy(model)
    moe = CONFIG.pattern.index("E")
    bias.backbone.layers[moe].mixer.gate.e_score_correction_bias[0] = float("-inf")
    assert find_bad_layer(bias) == BadLayer(
        f"backbone.layers.{moe}.mixer.gate.e_score_correction_bias", "weight", "-inf", moe, "moe"
    )


ROUTERS = [name for name, _ in build().named_buffers() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_broken_bias_of_a_router_is_found_before_any_call(
    model: Nemotron, name: str, value: str
) -> None:
    """It changes the choice of experts only, so that every output is still finite."""
    bad = copy.deepcopy(model)
    bad.get_buffer(name)[1] = float(value)
    with torch.no_grad():
        out = bad(_tokens(2, 6), mtp_depths=1)
    assert out.logits.isfinite().all() and out.mtp_logits[0].isfinite().all()
    with pytest.raises(NotFiniteError) as caught, check_layers(bad):
        pytest.fail("the block does not begin")
    place = caught.value.place
    index = int(name.split(".")[name.split(".").index("layers") + 1])
    assert (place.name, place.where, place.layer, place.kind) == (name, "weight", index, "moe")
    assert place.found == {"nan": "NaN", "inf": "+inf", "-inf": "-inf"}[value]
    assert place.row is None and place.token is None
    assert not any(module._forward_hooks for module in bad.modules())
    with pytest.raises(FloatingPointError, match="e_score_correction_bias"):
        generate(bad, [1, 2, 3], 3, check_layers=True)
    bad.get_buffer(name)[1] = 0.0
    with check_layers(bad):
        bad(_tokens(2, 6), mtp_depths=1)


def test_routers_of_the_backbone_and_of_mtp_are_tested() -> None:
    assert {name.partition(".")[0] for name in ROUTERS} == {"backbone", "mtp"}


def test_a_model_without_numbers_has_no_broken_bias() -> None:
    with check_layers(Nemotron(CONFIG, device="meta")):
        pass


def test_a_cache_is_looked_into_up_to_the_length_of_each_row(model: Nemotron) -> None:
    cache = model.empty_cache(2, mtp=True)
    model(_tokens(2, 6), cache, lengths=torch.tensor([6, 4]))
    assert find_bad_layer(model, cache) is None
    attention, mamba = CONFIG.pattern.index("*"), CONFIG.pattern.index("M")
    kv = cache.layers[attention]
    assert kv is not None
    kv.v[0, 0, 6] = kv.v[1, 0, 4] = float("nan")  # beyond the rows' lengths: never read
    assert find_bad_layer(model, cache) is None
    kv.v[1, 0, 3] = float("inf")
    place = find_bad_layer(model, cache)
    assert place is not None
    assert (place.layer, place.row, place.found, place.where) == (attention, 1, "+inf", "cache")
    state = cache.layers[mamba]
    assert state is not None
    state.ssm[0, 0, 0, 0] = float("nan")
    place = find_bad_layer(model, cache)
    assert place is not None and (place.layer, place.kind, place.row) == (mamba, "mamba", 0)


def test_the_error_for_logits(model: Nemotron) -> None:
    bad = copy.deepcopy(model)
    bad.lm_head.weight.data[5] = float("nan")
    logits = bad(torch.tensor([[1, 2, 3]])).logits[0, -1]
    error = logits_error(bad, logits, row=2, step=7, tokens=[1, 2, 3])
    assert type(error) is FloatingPointError
    text = str(error)
    assert "NaN in the logits of row 2 at step 7" in text and "lm_head" in text
    unknown = str(logits_error(model, torch.full((4,), float("-inf")), row=0, step=0))
    assert "-inf in the logits" in unknown and "check_layers=True" in unknown


def test_the_error_can_be_sent_to_another_process() -> None:
    place = BadLayer("lm_head", "output", "NaN", row=1, token=2)
    again = pickle.loads(pickle.dumps(NotFiniteError(place)))
    assert again.place == place and str(again) == "NaN in the output of lm_head, row 1, token 2."


def test_a_wrapped_model_and_low_precision_weights_are_looked_through(model: Nemotron) -> None:
    wrapped = nn.ModuleDict({"module": copy.deepcopy(model)})
    inner = wrapped["module"]
    inner.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="output of lm_head, row 0"), check_layers(wrapped):
        inner(_tokens(1, 3))
    model = copy.deepcopy(model)
    model.register_buffer("scale", torch.tensor([float("nan")]).to(torch.float8_e4m3fn))
    model.register_buffer("codes", torch.tensor([255], dtype=torch.uint8))
    model.register_buffer("nothing", torch.empty(0))
    place = find_bad_layer(model)
    assert place is not None and place.name == "scale"
