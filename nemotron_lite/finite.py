"""Where NaN or infinity began: the first layer of a model whose output is not finite.

One NaN in a weight, or one number that overflows in float16, makes every later number NaN, and the
logits say nothing about its origin. Two ways lead back to it:

    with check_layers(model):              hooks on every module; the first output that is not
        loss = loss_of(model(tokens))      finite raises, with layer, row and token

    find_bad_layer(model, cache, tokens)   afterwards: reads the row again with these hooks, or
                                           looks into weights and cache where that is impossible

The hooks read every output once more, so `check_layers` is for debugging (`generate` has it as an
option of that name). `generate` looks at the logits of each step, which costs next to nothing, and
calls `logits_error` for the message when they are not finite.

A minus infinity that a filter puts into logits is legal; filters come after the model. What a
module returns must be finite.

Left out: gradients. `torch.autograd.detect_anomaly` finds the operation whose gradient is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite.cache import Cache
from nemotron_lite.config import LAYER_KINDS
from nemotron_lite.layers import Block
from nemotron_lite.layers.moe import Router
from nemotron_lite.model import Nemotron

_LAYER = re.compile(r"(?:backbone|mtp)\.layers\.(\d+)\b")
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class BadLayer:
    """The first place in a model where a number is not finite. `str()` of it is a text to show.

    Attributes:
        name: path of the module or of the weight, such as "backbone.layers.3.mixer.o_proj".
        where: "output" of a module, "weight" or "cache".
        found: "NaN", "+inf" or "-inf".
        layer: index in the backbone or in the MTP module; None for embedding, norm and head.
        kind: "mamba", "attention", "moe" or "mlp"; "" where `layer` is None.
        row: of the batch; None for a weight.
        token: position in the tokens of the call; None where it is not known.
        hint: what else is known about the origin, in sentences.
    """

    name: str
    where: str
    found: str
    layer: int | None = None
    kind: str = ""
    row: int | None = None
    token: int | None = None
    hint: str = ""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer} ({self.kind}), "
        row = "" if self.row is None else f", row {self.row}"
        token = "" if self.token is None else f", token {self.token}"
        what = "the output of " if self.where == "output" else f"the {self.where} of "
        return f"{self.found} in {what}{layer}{self.name}{row}{token}. {self.hint}".rstrip()


class NotFiniteError(FloatingPointError):
    """The output of a module is not finite, seen by `check_layers`.

    Attributes:
        place: the first such output.
    """

    def __init__(self, place: BadLayer) -> None:
        self.place = place
        super().__init__(str(place))

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[BadLayer]]:
        return type(self), (self.place,)


@contextmanager
def check_layers(model: nn.Module) -> Iterator[None]:
    """Raise at the first module whose output is not finite, as long as the block runs.

    The selection biases of routers are looked at first: NaN there changes the choice of experts,
    and every output can still be finite.

    It works in every forward pass of `model`, with and without gradients. The model may be wrapped
    (DDP, `torch.compile`).

    Raises:
        NotFiniteError: a FloatingPointError with the module, its layer, the row and the token.
    """
    place = _in_routers(model)
    if place is not None:
        raise NotFiniteError(place)
    watch = _Watch(model)
    handles = [
        module.register_forward_hook(watch.hook(name, module), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_bad_layer(
    model: Nemotron, cache: Cache | None = None, tokens: Sequence[int] | None = None
) -> BadLayer | None:
    """Where NaN or infinity began, looked for after a call that gave it; None if nothing is found.

    Args:
        cache: of the failed call, to look into.
        tokens: all tokens of the failed row from its first, to be read again. It takes as long as
            reading a prompt of this length. Row 0 in the answer is then this row.
    """
    if tokens:
        ids = torch.tensor([list(tokens)], device=model.device)
        depths = 1 if model.mtp is not None and ids.shape[1] > 1 else 0
        try:
            with torch.no_grad(), check_layers(model):
                model(ids, mtp_depths=depths, logits_to_keep=1)
        except NotFiniteError as error:
            return error.place
    return _in_weights(model) or (None if cache is None else _in_cache(cache))


def logits_error(
    model: Nemotron,
    logits: Tensor,
    *,
    row: int,
    step: int,
    cache: Cache | None = None,
    tokens: Sequence[int] | None = None,
) -> FloatingPointError:
    """The error for logits that no token can be chosen from; the caller raises it.

    Args:
        logits: of one row, `v`.
        row: of the batch.
        step: how many tokens were written before.
        cache, tokens: as for `find_bad_layer`; `tokens` are those of this row.
    """
    found = _fault(logits) or "nothing but finite numbers"
    place = find_bad_layer(model, cache, tokens)
    if place is None:
        cause = (
            "The layer is not known: all weights are finite. Call it again with check_layers=True, "
            "which stops at the first layer whose output is not finite."
        )
    else:
        cause = f"It began here: {place}"
    return FloatingPointError(
        f"{found} in the logits of row {row} at step {step}, so no token can be chosen. {cause}"
    )


class _Watch:
    """What the hooks of one `check_layers` remember: the last finite module, and the call's shape.

    Inside a mixture of experts rows and tokens are one axis. The norm before it has seen both.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kinds = _kinds(model)
        self.last = ""
        self.shape = (0, 0)

    def hook(self, path: str, module: nn.Module) -> Any:
        name = _plain(path)

        def check(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.ndim == 3:
                    self.shape = (tensor.shape[0], tensor.shape[1])
                fault = _fault(tensor)
                if fault:
                    given = any(_fault(part) for part in _tensors([args, kwargs]))
                    raise NotFiniteError(self.place(name, module, tensor, fault, given))
            self.last = name

        return check

    def place(
        self, name: str, module: nn.Module, output: Tensor, fault: str, bad_input: bool
    ) -> BadLayer:
        row, token = self.position(output)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        faults = [f"{part} has {found}" for part, tensor in own if (found := _fault(tensor))]
        if faults:
            hint = f"Its weight {faults[0]}."
        elif bad_input:
            after = f"after {self.last}, " if self.last else ""
            hint = f"Its input is not finite either: this began {after}in what computes the input."
        else:
            hint = f"Its input and its own weights are finite; the output is in {output.dtype}."
        return BadLayer(name, "output", fault, *_layer(name, self.kinds), row, token, hint)

    def position(self, output: Tensor) -> tuple[int | None, int | None]:
        """Row and token of the first number of an output that is not finite, where known."""
        if output.ndim < 2:
            return None, None
        wrong = ~output.isfinite()
        if output.ndim > 2:
            first = wrong.flatten(2).any(-1).nonzero()[0].tolist()
            return first[0], first[1]
        place, (rows, tokens) = int(wrong.any(-1).nonzero()[0]), self.shape
        if len(output) == rows * tokens:
            return divmod(place, tokens)
        return (place if len(output) == rows else None), None


def _in_weights(model: nn.Module) -> BadLayer | None:
    """The first parameter or buffer, in the order of the computation, that is not finite."""
    kinds = _kinds(model)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        fault = _fault(tensor)
        if fault:
            name = _plain(path)
            return BadLayer(name, "weight", fault, *_layer(name, kinds))
    return None


def _in_routers(model: nn.Module) -> BadLayer | None:
    """The first router with a selection bias that is not finite."""
    kinds = _kinds(model)
    for path, module in model.named_modules():
        if isinstance(module, Router):
            bias = module.e_score_correction_bias
            fault = "" if bias.is_meta else _fault(bias)
            if fault:
                name = _plain(f"{path}.e_score_correction_bias")
                return BadLayer(name, "weight", fault, *_layer(name, kinds))
    return None


def _in_cache(cache: Cache) -> BadLayer | None:
    """The first layer whose cache of tokens that a row has read is not finite."""
    for part, caches, pattern, lengths in (
        ("backbone", cache.layers, cache.pattern, cache.lengths),
        ("mtp", cache.mtp, cache.mtp_pattern, cache.mtp_lengths),
    ):
        for i, (layer, letter) in enumerate(zip(caches, pattern, strict=True)):
            for row, length in enumerate(lengths.tolist() if layer is not None else ()):
                assert layer is not None
                for name, tensor in layer.saved_tensors(length).items():
                    fault = _fault(tensor[row])
                    if fault:
                        hint = f"This began in {name!r} of this layer, or in a layer before it."
                        path, kind = f"{part}.layers.{i}", LAYER_KINDS[letter]
                        return BadLayer(path, "cache", fault, i, kind, row, None, hint)
    return None


def _fault(tensor: Tensor) -> str:
    """NaN, +inf or -inf, whichever is in a tensor; "" if all its numbers are finite."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return ""
    values = tensor.detach()
    if values.is_mkldnn or values.layout != torch.strided:
        values = values.to_dense()
    if values.dtype.itemsize == 1:  # FP8 has no comparisons
        values = values.float()
    low, high = (float(end) for end in torch.aminmax(values))
    if low != low:
        return "NaN"
    if high == float("inf"):
        return "+inf"
    return "-inf" if low == float("-inf") else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _kinds(model: nn.Module) -> dict[str, str]:
    """Path of each layer, and its kind."""
    return {
        _plain(path): LAYER_KINDS[module.kind]
        for path, module in model.named_modules()
        if isinstance(module, Block)
    }


def _layer(name: str, kinds: Mapping[str, str]) -> tuple[int | None, str]:
    """Index and kind of the layer that a module or weight belongs to."""
    found = _LAYER.match(name)
    return (None, "") if found is None else (int(found[1]), kinds.get(found[0], ""))


def _plain(path: str) -> str:
    """A path without the names that wrappers add; "model" for the model itself."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS) or "model"
