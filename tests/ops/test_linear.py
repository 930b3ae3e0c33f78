"""Products by oneDNN against `F.linear`: values, gradients, and which library is used when."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from nemotron_lite import ops
from nemotron_lite.backends import cpu_linear, measured_products, private_torch
from nemotron_lite.layers import BiasedLinear, Linear, plain_weight
from nemotron_lite.model import Nemotron
from tests.compare import relative_rms
from tests.generation.speculative.conftest import SMALL

ONEDNN = pytest.mark.skipif(
    not private_torch.HAS_ONEDNN_LINEAR, reason="this PyTorch has no oneDNN"
)


def _inputs(*rows: int, i: int = 24, o: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(rows))
    return torch.randn(*rows, i, generator=generator), torch.randn(o, i, generator=generator)


@ONEDNN
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (2, 1, 7), (0,)])
@pytest.mark.parametrize("strided", [False, True])
def test_onednn_is_the_product(rows: tuple[int, ...], strided: bool) -> None:
    x, weight = _inputs(*rows)
    if strided:
        x, weight = torch.cat([x, x], -1)[..., ::2], weight.t().contiguous().t()
    exact = F.linear(x.double(), weight.double())
    assert ops.linear(x, weight, impl="cpu").shape == exact.shape
    if exact.numel():
        assert relative_rms(ops.linear(x, weight, impl="cpu"), exact) < 1e-6


@ONEDNN
def test_no_product_gets_a_matrix_with_gaps() -> None:
    """oneDNN would read a slice number by number, hundreds of times slower."""
    whole, wide = torch.randn(300, 64), torch.randn(300, 100)
    assert cpu_linear._without_gaps(whole) is whole
    assert cpu_linear._without_gaps(whole.t()).data_ptr() == whole.data_ptr()
    for slice_ in (wide[:, :64], wide[:, :64].t(), wide[::2]):
        found = cpu_linear._without_gaps(slice_)
        assert found.is_contiguous() and torch.equal(found, slice_)
    x = torch.randn(5, 64)
    with torch.inference_mode():
        found = cpu_linear.product(x, wide[:, :64])
    torch.testing.assert_close(found, F.linear(x, wide[:, :64]))


@ONEDNN
@pytest.mark.parametrize("which", ["both", "x", "weight"])
def test_gradients(which: str) -> None:
    x, weight = _inputs(2, 5)
    leaves = {"x": x, "weight": weight}
    wanted = [leaves[name] for name in ("x", "weight") if which in (name, "both")]
    for leaf in wanted:
        leaf.requires_grad_()
    slope = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((ops.linear(x, weight, impl="cpu") * slope).sum(), wanted)
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (x, weight)]
    exact = torch.autograd.grad(
        (F.linear(*wide) * slope.double()).sum(), [leaf for leaf in wide if leaf.requires_grad]
    )
    for one, other in zip(found, exact, strict=True):
        assert relative_rms(one, other) < 1e-6


@ONEDNN
def test_which_library_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured decides, and only about float32 products on the CPU."""
    asked = []
    monkeypatch.setattr(
        measured_products, "prefers_onednn", lambda rows, numel: asked.append((rows, numel)) or True
    )
    large = torch.empty(1000, 500)
    cases = {
        (1, torch.float32): True, (0, torch.float32): False, (8, torch.float64): False,
        (8, torch.bfloat16): False,
    }  # fmt: skip
    for (rows, dtype), expected in cases.items():
        x = torch.empty(rows, 500, dtype=dtype)
        assert cpu_linear.prefers_onednn(x, large.to(dtype)) is expected, (rows, dtype)
    assert asked == [(1, 500_000)]
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_linear.prefers_onednn(torch.empty(8, 500), large)
        assert ops.linear(torch.zeros(8, 500), torch.zeros(7, 500)).dtype == torch.bfloat16
    monkeypatch.setattr(measured_products, "prefers_onednn", lambda rows, numel: False)
    assert not cpu_linear.prefers_onednn(torch.empty(8, 500), large)


@pytest.fixture
def _prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a copy is the fastest for every product."""
    monkeypatch.setattr(measured_products, "prefers_prepacked", lambda rows, numel: True)


def test_what_is_refused() -> None:
    x, weight = _inputs(3)
    with pytest.raises(ValueError, match="no implementation 'mkl'"):
        ops.linear(x, weight, impl="mkl")
    with pytest.raises(ValueError, match="multiplies float32 on the CPU"):
        ops.linear(x.double(), weight.double(), impl="cpu")


@ONEDNN
@pytest.mark.usefixtures("_prepacked")
def test_a_model_prepared_for_decoding_gives_the_same_logits() -> None:
    model = Nemotron(SMALL, seed=0).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        exact = model(tokens).logits
        assert model.prepare_for_decoding(smallest=1) is model
        used = []
        with pytest.MonkeyPatch.context() as patch:
            layer = sys.modules["nemotron_lite.layers.linear"]
            product = layer.product
            patch.setattr(layer, "product", lambda x, w: used.append(1) or product(x, w))
            torch.testing.assert_close(model(tokens).logits, exact)
        assert len(used) == sum(isinstance(m, Linear) for m in model.backbone.modules()) + 1
        cache = model.empty_cache(1)
        steps = [model(token, cache).logits for token in tokens.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), exact)


@ONEDNN
@pytest.mark.usefixtures("_prepacked")
def test_a_prepacked_copy_is_used_only_while_the_weight_is_unchanged() -> None:
    layer = Linear(8, 8)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def check(layer: Linear) -> None:
        with torch.no_grad():
            exact = F.linear(x.to(layer.weight.dtype), layer.weight)
            torch.testing.assert_close(layer(x.to(layer.weight.dtype)), exact)

    layer.prepare_for_decoding()
    check(layer)
    with torch.no_grad():
        layer.weight.mul_(2)  # raises the version counter
    check(layer)
    layer.prepare_for_decoding()
    layer.load_state_dict({"weight": torch.ones(8, 8)})
    check(layer)
    layer.prepare_for_decoding()
    again = copy.deepcopy(layer)
    assert again._prepacked is None and set(again.state_dict()) == {"weight"}
    check(again)
    check(layer.double())
    y = layer.float()(x)
    assert y.requires_grad, "the copy must not be used if gradients are needed"
    with pytest.raises(ValueError, match="float32 on the CPU"):
        layer.double().prepare_for_decoding()


@pytest.mark.usefixtures("_prepacked")
def test_a_fused_optimizer_step_ends_the_copy() -> None:
    """Fused AdamW changes the weight without raising its version counter."""
    layer, x = Linear(8, 8), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer.prepare_for_decoding()
    layer(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


def biased(i: int = 24, o: int = 40) -> BiasedLinear:
    layer = BiasedLinear(i, o)
    with torch.no_grad():
        layer.init_weights(0.3, generator=torch.Generator().manual_seed(1))
        assert not layer.bias.any() and layer.weight.std() > 0.2
        layer.bias.normal_(generator=torch.Generator().manual_seed(2))
    return layer


@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bias_is_added(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = biased().to(dtype), _inputs(*rows)[0].to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    one_rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    with torch.no_grad():
        assert (layer(x).dtype, layer(x).shape) == (dtype, exact.shape)
        torch.testing.assert_close(layer(x).double(), exact, rtol=one_rounding, atol=1e-6)
        if x.ndim == 2:
            assert torch.equal(layer.product_for(len(x))(x), layer(x))
    assert plain_weight(layer) is None, "the matrix is not all there is to the layer"


def test_gradients_of_a_layer_with_a_bias() -> None:
    layer, x = biased(), _inputs(3, 5)[0].requires_grad_()
    (layer(x) ** 2).sum().backward()
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
    (F.linear(*leaves) ** 2).sum().backward()
    for found, expected in zip((x, layer.weight, layer.bias), leaves, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_bias_under_autocast_has_its_dtype() -> None:
    layer, x = biased(), _inputs(3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        assert torch.equal(found, F.linear(x, layer.weight, layer.bias))
    assert found.dtype == torch.bfloat16


@ONEDNN
@pytest.mark.usefixtures("_prepacked")
def test_a_prepared_copy_is_used_beside_a_bias() -> None:
    layer, x = biased(), _inputs(2)[0]
    layer.prepare_for_decoding()
    assert layer._prepacked is not None
    with torch.no_grad():
        exact = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), exact)
        torch.testing.assert_close(layer.product_for(2)(x), exact)
        layer.bias.mul_(2)  # the copy is of the matrix alone
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert set(copy.deepcopy(layer).state_dict()) == {"weight", "bias"}


@pytest.mark.usefixtures("_prepacked")
def test_a_copy_belongs_to_one_tensor_object() -> None:
    """Another weight may get the address and the version of the old one."""
    layer, x = Linear(8, 8), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    layer.prepare_for_decoding()
    layer.weight = torch.nn.Parameter(torch.ones(8, 8))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


def test_weights_whose_changes_cannot_be_noticed_are_not_copied() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made_here = Linear(8, 8)
    parametrized = Linear(8, 8)
    torch.nn.utils.parametrizations.weight_norm(parametrized)
    for layer in (made_here, parametrized):
        with torch.inference_mode():
            layer.prepare_for_decoding()
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
        assert layer._prepacked is None


def test_training_a_prepared_model_ends_every_copy() -> None:
    """The losses read `lm_head.weight` without calling the layer."""
    model = Nemotron(SMALL, seed=0).prepare_for_decoding(smallest=1)
    model.forward_hidden(torch.tensor([[1, 2, 3]]))
    assert all(m._prepacked is None for m in model.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (1, 0), (5, 0), (0, 24)])
def test_one_row_is_the_product_of_many(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A single row goes another way without gradients, from any strides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., ::2]
    weight = torch.randn(shape[-1], 40, generator=generator).to(dtype)[:, ::2].t()
    with torch.no_grad():
        found = ops.linear(x, weight)
    expected = (x.double() @ weight.double().t()).to(dtype)
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
