"""save takes a model out of known wrappers, and refuses every other change before it writes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from nemotron_lite import CheckpointError, Nemotron, NemotronConfig, load, save
from nemotron_lite.checkpoint.model_tree import read_tree
from tests.checkpoint.test_save_atomic import contents
from tests.checkpoint.tiny import TINY

pytestmark = pytest.mark.usefixtures("no_fsync")
Make = Callable[..., Nemotron]
LINEAR = [
    name
    for name, module in Nemotron(TINY, device="meta").named_modules()
    if isinstance(module, nn.Linear)
]
LAYERS = range(len(TINY.pattern))


def refused(model: Any, folder: Path, *names: str) -> str:
    """The error of saving `model`, which names these modules and leaves the folder as it was."""
    before = contents(folder)
    with pytest.raises((CheckpointError, TypeError)) as raised:
        save(model, folder)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    for name in names:
        assert name in str(raised.value)
    assert len(str(raised.value)) < 4000, "a list of thousands of names helps nobody"
    return str(raised.value)


def saved_like(model: Any, plain: Nemotron, folder: Path) -> None:
    """Saving `model` writes, byte for byte, what saving `plain` writes."""
    save(model, folder / "wrapped")
    save(plain, folder / "plain")
    assert contents(folder / "wrapped") == contents(folder / "plain")


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def averaged(model: nn.Module) -> Any:
    return AveragedModel(model)


def data_parallel(model: nn.Module) -> Any:
    return nn.DataParallel(model)


def distributed(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def recomputed(model: nn.Module) -> Any:
    return checkpoint_wrapper(model)


WRAPPERS = [compiled, averaged, data_parallel, distributed, recomputed]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_known_wrapper_is_left_out(
    tmp_path: Path, make: Make, wrap: Any, one_process: None
) -> None:
    saved_like(wrap(make(TINY)), make(TINY), tmp_path)


@pytest.mark.parametrize(
    "wraps", [(compiled, distributed), (distributed, compiled), (recomputed, averaged, compiled)]
)
def test_wrappers_around_wrappers(
    tmp_path: Path, make: Make, wraps: Any, one_process: None
) -> None:
    model: Any = make(TINY)
    for wrap in wraps:
        model = wrap(model)
    saved_like(model, make(TINY), tmp_path)


@pytest.mark.parametrize("wrap", [compiled, recomputed, data_parallel])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_wrapped_in_place(tmp_path: Path, make: Make, wrap: Any, layer: int) -> None:
    model = make(TINY)
    model.backbone.layers[layer] = wrap(model.backbone.layers[layer])
    saved_like(model, make(TINY), tmp_path)


@pytest.mark.parametrize("name", LINEAR)
def test_any_linear_layer_compiled(tmp_path: Path, make: Make, name: str) -> None:
    model = make(TINY)
    model.set_submodule(name, compiled(model.get_submodule(name)))
    assert read_tree(model).problems == []
    assert list(read_tree(model).tensors) == list(model.state_dict()) or name in str(
        list(model.state_dict())
    )
    assert set(read_tree(model).tensors) == set(make(TINY).state_dict())


def test_compiled_in_place(tmp_path: Path, make: Make) -> None:
    model = make(TINY)
    model.compile(backend="eager")
    saved_like(model, make(TINY), tmp_path)


def test_an_average_is_saved_and_not_the_last_weights(tmp_path: Path, make: Make) -> None:
    model = make(TINY)
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.lm_head.weight.add_(2.0)
    average.update_parameters(model)
    save(average, tmp_path / "m")
    expected = make(TINY).lm_head.weight + 1.0
    torch.testing.assert_close(load(tmp_path / "m").lm_head.weight, expected)


def test_a_model_in_training_with_hooks(tmp_path: Path, make: Make) -> None:
    model = make(TINY).train()
    model.lm_head.register_forward_hook(lambda *_: None)
    model.register_state_dict_post_hook(lambda *_: None)
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    saved_like(model, make(TINY), tmp_path)
    assert model.training


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, as peft puts it in."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(torch.ones(2, base.in_features))
        self.lora_B = nn.Parameter(torch.ones(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


class AdaptedLinear(nn.Linear):
    """The same as a subclass: `weight` keeps its name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.lora_A = nn.Parameter(torch.ones(2, base.in_features))


class HiddenAdapter(nn.Linear):
    """The same, and no tensor shows that there is an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.adapter = [torch.ones(2, base.in_features)]


def with_bias(base: nn.Linear) -> nn.Module:
    return nn.Linear(base.in_features, base.out_features)


def resized(base: nn.Linear) -> nn.Module:
    return nn.Linear(base.in_features, base.out_features + 1, bias=False)


def in_a_list(base: nn.Linear) -> nn.Module:
    return nn.Sequential(base, nn.Dropout(0.1))


def parametrized(base: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(base)


def orthogonal(base: nn.Linear) -> nn.Module:
    return parametrizations.spectral_norm(base)


def pruned(base: nn.Linear) -> nn.Module:
    prune.l1_unstructured(base, "weight", 0.5)
    return base


def normed_by_hook(base: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(base)


def emptied(base: nn.Linear) -> nn.Module:
    base.weight = None  # type: ignore[assignment]
    return base


def freed(base: nn.Linear) -> nn.Module:
    base.weight.data.untyped_storage().resize_(0)
    return base


def on_meta(base: nn.Linear) -> nn.Module:
    return base.to("meta")


def in_integers(base: nn.Linear) -> nn.Module:
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    return base


def sparse(base: nn.Linear) -> nn.Module:
    base.weight = nn.Parameter(base.weight.detach().to_sparse())
    return base


def fake(base: nn.Linear) -> nn.Module:
    weight = base.weight.detach()
    with FakeTensorMode() as mode:
        base.weight = nn.Parameter(mode.from_tensor(weight))
    return base


def subclass(base: nn.Linear) -> nn.Module:
    class Tagged(Tensor):
        pass

    base.weight = nn.Parameter(base.weight.detach().as_subclass(Tagged))
    return base


CHANGES = [
    Adapter, AdaptedLinear, HiddenAdapter, with_bias, resized, in_a_list, parametrized, orthogonal,
    pruned, normed_by_hook, emptied, freed, on_meta, in_integers, sparse, fake, subclass,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_linear_layer_is_refused_wherever_it_is(
    saved: Path, make: Make, change: Any
) -> None:
    model = make(TINY)
    for name in LINEAR:
        original = model.get_submodule(name)
        model.set_submodule(name, change(copy.deepcopy(original)))
        assert name in "".join(read_tree(model).problems), name
        if name == "lm_head":
            refused(model, saved, name)
        model.set_submodule(name, original)
    save(model, saved)


def test_the_way_out_works(saved: Path, make: Make) -> None:
    model = make(TINY)
    parametrizations.weight_norm(model.lm_head)
    message = refused(model, saved, "remove_parametrizations")
    call = message[message.index("torch.nn.utils.parametrize") :].splitlines()[0]
    eval(call, {"torch": torch, "model": model})
    save(model, saved)
    model = make(TINY)
    model.mtp = None
    assert 'model.config.replace(mtp_pattern="", mtp_depths=0)' in refused(model, saved, "mtp.")
    model.config = model.config.replace(mtp_pattern="", mtp_depths=0)
    save(model, saved)
    assert load(saved).mtp is None


def add_head(model: Nemotron) -> str:
    model.value_head = nn.Linear(4, 1)
    return "value_head.weight"


def add_parameter(model: Nemotron) -> str:
    model.backbone.layers[0].register_parameter("gain", nn.Parameter(torch.ones(1)))
    return "backbone.layers.0.gain"


def add_buffer(model: Nemotron) -> str:
    model.backbone.register_buffer("positions", torch.ones(3))
    return "backbone.positions"


def rename_head(model: Nemotron) -> str:
    model.head_2 = model.lm_head
    del model.lm_head
    return "lm_head.weight"


def remove_layer(model: Nemotron) -> str:
    del model.backbone.layers[-1]
    return f"backbone.layers.{len(TINY.pattern) - 1}."


def repeat_layer(model: Nemotron) -> str:
    model.backbone.layers.append(model.backbone.layers[0])
    return f"backbone.layers.{len(TINY.pattern)}."


def exchange_layers(model: Nemotron) -> str:
    layers = model.backbone.layers
    layers[0], layers[1] = layers[1], layers[0]
    return "backbone.layers.0."


def fewer_experts(model: Nemotron) -> str:
    experts = model.backbone.layers[1].mixer.experts
    experts.up_proj = nn.Parameter(experts.up_proj[:3].detach())
    return "backbone.layers.1.mixer.experts.up_proj"


def replace_norm(model: Nemotron) -> str:
    model.backbone.norm_f = nn.Identity()
    return "backbone.norm_f"


def layer_norm(model: Nemotron) -> str:
    model.backbone.norm_f = nn.RMSNorm(TINY.hidden_size)  # the same tensors, another eps
    return "backbone.norm_f"


def remove_bias_of_router(model: Nemotron) -> str:
    model.backbone.layers[1].mixer.gate.e_score_correction_bias = None
    return "e_score_correction_bias"


def holds_itself(model: Nemotron) -> str:
    model.backbone.layers[2].parent = model.backbone
    return "backbone.layers.2.parent"


def other_config(model: Nemotron) -> str:
    model.config = model.config.replace(vocab_size=TINY.vocab_size + 1)
    return "lm_head.weight"


def no_config(model: Nemotron) -> str:
    model.config = None
    return "NemotronConfig"


def on_meta_device(model: Nemotron) -> str:
    model.to("meta")
    return "meta device"


@pytest.mark.parametrize(
    "change",
    [
        add_head, add_parameter, add_buffer, rename_head, remove_layer, repeat_layer,
        exchange_layers, fewer_experts, replace_norm, layer_norm, remove_bias_of_router,
        holds_itself, other_config, no_config, on_meta_device,
    ],
)  # fmt: skip
def test_a_changed_tree_is_refused(
    saved: Path, make: Make, change: Callable[[Nemotron], str]
) -> None:
    model = make(TINY)
    refused(model, saved, change(model))


@pytest.mark.parametrize(
    "harmless",
    [
        lambda model: setattr(model, "loss", nn.CrossEntropyLoss()),
        lambda model: setattr(model, "step", 3),
        lambda model: model.register_buffer("mask", torch.ones(2), persistent=False),
        lambda model: model.set_submodule("lm_head", plain_linear(model.lm_head)),
        lambda model: model.requires_grad_(False),
    ],
)
def test_what_is_no_part_of_the_weights_is_left_out(
    tmp_path: Path, make: Make, harmless: Any
) -> None:
    model = make(TINY)
    harmless(model)
    saved_like(model, make(TINY), tmp_path)


def plain_linear(base: nn.Linear) -> nn.Module:
    made = nn.Linear(base.in_features, base.out_features, bias=False)
    made.weight = base.weight
    return made


def test_tied_weights_are_written_as_two_tensors(tmp_path: Path, make: Make) -> None:
    model = make(TINY).eval()
    model.lm_head.weight = model.backbone.embeddings.weight
    save(model, tmp_path / "m")
    tokens = torch.arange(12)[None]
    assert torch.equal(load(tmp_path / "m")(tokens).logits, model(tokens).logits)


def test_a_subclass_of_the_model_is_saved(tmp_path: Path) -> None:
    class Mine(Nemotron):
        pass

    saved_like(Mine(TINY, seed=1), Nemotron(TINY, seed=1), tmp_path)


class OwnForward(Nemotron):
    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(tokens.flip(1), *args, **kwargs)


class OfOwnForward(OwnForward):
    """It inherits the other forward."""


class OwnHead(Nemotron):
    """It has methods of its own, but the same forward."""

    def classify(self, tokens: Tensor) -> Tensor:
        return self(tokens).logits[:, -1, :2]


@pytest.mark.parametrize("kind", [OwnForward, OfOwnForward, OwnHead])
@pytest.mark.parametrize("wrap", [lambda model: model, compiled, averaged])
def test_a_forward_of_a_subclass_is_warned_about(
    tmp_path: Path, kind: type[Nemotron], wrap: Any
) -> None:
    """A file holds weights and no code. A warning is an error in these tests."""
    model = wrap(kind(TINY, seed=1))
    if kind is OwnHead:
        save(model, tmp_path / "m")
    else:
        with pytest.warns(
            UserWarning, match=rf"\.{kind.__name__} has a forward of its own"
        ) as seen:
            save(model, tmp_path / "m")
        assert len(seen) == 1
    found, plain = load(tmp_path / "m"), Nemotron(TINY, seed=1)
    tokens = torch.arange(12)[None]
    assert type(found) is Nemotron
    assert torch.equal(found(tokens).logits, plain(tokens).logits)


class Peft(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def merge_and_unload(self) -> nn.Module:
        return self.base_model


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (nn.Sequential, 'model.get_submodule("0")'),
        (Peft, "save(model.merge_and_unload(), path)"),
        (lambda model: nn.Sequential(nn.Sequential(model), nn.Identity()), '"0.0"'),
        (lambda model: torch.nn.ModuleDict({"policy": model}), '"policy"'),
        (lambda model: model.state_dict(), "load_state_dict"),
        (lambda model: model.backbone, "expected a Nemotron"),
        (lambda model: Nemotron, "the class Nemotron"),
        (lambda model: nn.Linear(2, 2), "expected a Nemotron"),
        (lambda model: None, "expected a Nemotron"),
        (lambda model: "runs/lite", "expected a Nemotron"),
        (lambda model: model(torch.ones(1, 2, dtype=torch.long)), "expected a Nemotron"),
    ],
)
def test_what_is_no_model_is_refused(make: Make, wrap: Any, advice: str) -> None:
    with pytest.raises(TypeError) as raised:
        read_tree(wrap(make(TINY)))
    assert advice in str(raised.value)


def test_a_model_around_a_model_is_refused(saved: Path, make: Make) -> None:
    refused(nn.Sequential(make(TINY)), saved, 'save(model.get_submodule("0"), path)')


def test_sharded_models_are_refused(saved: Path, make: Make, one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,))
    whole = make(TINY)
    fully_shard(whole, mesh=mesh)
    refused(whole, saved, "get_model_state_dict")
    part = make(TINY)
    fully_shard(part.backbone.layers[1], mesh=mesh)
    refused(part, saved, "backbone.layers.1", "get_model_state_dict")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = FullyShardedDataParallel(make(TINY), device_id=torch.device("cpu"))
    refused(old, saved, "get_model_state_dict")
    parallel = make(TINY)
    weight = parallel.lm_head.weight.detach()
    parallel.lm_head.weight = nn.Parameter(DTensor.from_local(weight, mesh))
    refused(parallel, saved, "lm_head.weight (DTensor)", "full_tensor()")


def test_the_advice_for_sharded_models_works(saved: Path, make: Make, one_process: None) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make(TINY)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    plain = Nemotron(model.config)
    plain.load_state_dict(state, assign=True)
    save(plain, saved)
    for name, tensor in make(TINY).state_dict().items():
        assert torch.equal(load(saved).state_dict()[name], tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_and_infinity_are_saved_with_a_warning(
    tmp_path: Path, make: Make, value: float, dtype: torch.dtype
) -> None:
    model = make(TINY, dtype=dtype)
    with torch.no_grad():
        model.backbone.layers[1].mixer.experts.up_proj[4, 2, 3] = value
        model.lm_head.weight[7, 7] = value
    with pytest.warns(UserWarning, match=r"2 tensors hold NaN .*experts\.4\.up_proj"):
        save(model, tmp_path / "m")
    again = load(tmp_path / "m").lm_head.weight
    assert torch.equal(again, model.lm_head.weight) or value != value


def test_packed_and_mixed_models_are_whole(quantized: Path, tmp_path: Path) -> None:
    model = load(quantized, packed=True)
    saved_like(compiled(model), model, tmp_path)
    model.backbone.layers[1].mixer.experts.up_proj.weight = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"another shape.*experts\.up_proj\.weight"):
        save(model, tmp_path / "plain")


def test_any_config_is_its_own_reference(tmp_path: Path) -> None:
    for changes in (
        dict(pattern="M"), dict(pattern="*E"), dict(pattern="E-", mtp_pattern="", mtp_depths=0),
        dict(n_shared_experts=0), dict(moe_latent_size=None), dict(n_groups=1),
    ):  # fmt: skip
        config = TINY.replace(**changes)
        assert read_tree(Nemotron(config, seed=0)).problems == []


def test_the_reference_of_a_large_model_needs_no_memory(make: Make) -> None:
    model = Nemotron(NemotronConfig.from_preset("super"), device="meta")
    tree = read_tree(model)
    assert len(tree.problems) == 1
    assert "meta device" in tree.problems[0]
