"""What a checkpoint must hold before anything in it is used.

A checkpoint may have been written by another version, edited, or made to harm. So every entry is
compared with the model and the optimizer that are to take it: the keys, the types, the shapes and
dtypes of tensors, and the ranges of numbers. The first problems are listed in one error, and the
model, the optimizer and torch's random state are as they were.

    step, tokens, seconds      counts that fit together and the name of the file
    fingerprint                nested plain values (fingerprint.py compares them)
    model                      the model's own names, shapes and dtypes; no NaN or infinity
    parameters, optimizer      AdamW's moments (for Muon's matrices, the momentum) of the same
                               parameters in the same order
    rng, device_rng            states that a generator accepts
    best                       the best validation so far, or None

The options of the optimizer (learning rate, betas, ...) come from the config and not from the file.
Those in the file are only checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_lite.model import Nemotron
from nemotron_lite.train.checkpointing import step_of
from nemotron_lite.train.errors import ResumeError

FORMAT = 2  # raise it when the entries change
_KEYS = {
    "format", "model", "parameters", "optimizer", "rng", "fingerprint", "step", "tokens", "seconds",
    "best",
}  # fmt: skip
_PARTS = ("sizes", "options", "inputs", "versions")  # of a fingerprint
_ADAMW, _MUON = {"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum"}
_MOST = 1 << 53
_LISTED = 5  # problems in a message


def check_outline(path: Path, saved: Any) -> None:
    """Check all that does not depend on the model: keys, counts and fingerprint.

    Raises:
        ResumeError: not a checkpoint of this version, or a wrong value.
    """
    problems = _Problems(path)
    if not isinstance(saved, dict):
        problems.add(f"it holds {_type(saved)}, expected a dict")
        problems.stop()
    if type(saved.get("format")) is not int or saved["format"] != FORMAT:
        raise ResumeError(
            f"{path} was not written by this version of nemotron_lite (format "
            f"{_value(saved.get('format'))}, expected {FORMAT}): resume with the version that "
            "wrote it, or start a new run in another folder."
        )
    problems.keys("the checkpoint", saved, _KEYS, optional={"device_rng"})
    problems.stop()
    step, tokens, seconds = saved["step"], saved["tokens"], saved["seconds"]
    if type(step) is not int or step != step_of(path):
        problems.add(f"step is {_value(step)}, but the file's name says {step_of(path)}")
    if type(tokens) is not int or not 0 <= tokens <= _MOST:
        problems.add(f"tokens is {_value(tokens)}, expected an integer from 0 to {_MOST}")
    if not _is_number(seconds) or seconds < 0:
        problems.add(f"seconds is {_value(seconds)}, expected a number of at least 0")
    _check_best(problems, saved["best"])
    fingerprint = saved["fingerprint"]
    if (
        not isinstance(fingerprint, dict)
        or set(fingerprint) != set(_PARTS)
        or any(type(part) is not dict for part in fingerprint.values())
    ):
        problems.add(f"fingerprint is {_value(fingerprint)}, expected dicts of {_PARTS}")
    else:
        _check_plain(problems, "fingerprint", fingerprint)
    problems.stop()


def check_contents(
    path: Path, saved: Mapping[str, Any], model: Nemotron, optimizer: torch.optim.Optimizer
) -> None:
    """Check weights, moments and random states against the objects that will take them.

    Args:
        saved: has passed `check_outline`.

    Raises:
        ResumeError: something does not fit.
    """
    problems = _Problems(path)
    _check_weights(problems, saved["model"], model)
    _check_optimizer(problems, saved, model, optimizer)
    _check_random_state(problems, "rng", saved["rng"], torch.device("cpu"))
    if model.device.type == "cuda":
        _check_random_state(problems, "device_rng", saved.get("device_rng"), model.device)
    problems.stop()


def check_weights(path: Path, saved: Any, model: Nemotron) -> None:
    """Check weights alone: names, shapes, dtypes, no NaN or infinity.

    Args:
        saved: the entry "model" of a file.
        model: of these sizes; it may be on the meta device.

    Raises:
        ResumeError: something does not fit.
    """
    problems = _Problems(path)
    _check_weights(problems, saved, model)
    problems.stop()


class _Problems:
    """What is wrong with one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, text: str) -> None:
        self.found.append(text)

    def stop(self) -> None:
        """Raise if anything was found."""
        if not self.found:
            return
        more = len(self.found) - _LISTED
        listed = "; ".join(self.found[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise ResumeError(f"{self.path} does not hold a usable checkpoint: {listed}.")

    def keys(
        self, what: str, found: Mapping[Any, Any], expected: set[str], *, optional: set[str]
    ) -> None:
        """Compare the keys of a dict; the order does not matter."""
        missing = sorted(expected - set(found))
        extra = sorted(_value(key) for key in set(found) - expected - optional)
        if missing:
            self.add(f"{what} has no {_names(missing)}")
        if extra:
            self.add(f"{what} has {_names(extra)}, which nothing needs")

    def tensor(
        self,
        name: str,
        value: object,
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        finite: bool = True,
    ) -> bool:
        """Compare one tensor; True if it can be used."""
        if type(value) not in (Tensor, torch.nn.Parameter):
            self.add(f"{name} is {_type(value)}, expected a tensor")
            return False
        assert isinstance(value, Tensor)
        if value.layout != torch.strided or value.device.type != "cpu":
            self.add(f"{name} is not a dense tensor on the CPU")
        elif value.shape != shape:
            self.add(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        elif value.dtype != dtype:
            self.add(f"{name} is {value.dtype}, expected {dtype}")
        elif finite and value.is_floating_point() and not bool(value.isfinite().all()):
            self.add(f"{name} has NaN or infinity")
        else:
            return True
        return False


def _check_weights(problems: _Problems, saved: Any, model: Nemotron) -> None:
    if not isinstance(saved, dict):
        problems.add(f"model is {_type(saved)}, expected a dict of tensors")
        return
    own = model.state_dict()
    problems.keys("model", saved, set(own), optional=set())
    for name, tensor in own.items():
        if name in saved and isinstance(tensor, Tensor):
            problems.tensor(name, saved[name], tensor.shape, tensor.dtype)


def _check_optimizer(
    problems: _Problems,
    saved: Mapping[str, Any],
    model: Nemotron,
    optimizer: torch.optim.Optimizer,
) -> None:
    names = parameter_names(model, optimizer)
    trained, state = saved["parameters"], saved["optimizer"]
    if not isinstance(trained, dict) or [*map(_key, trained)] != names:
        problems.add("parameters are not those of this model, in its order")
        return
    if not isinstance(state, dict) or set(state) != {"state", "param_groups"}:
        problems.add(f"optimizer is {_value(state)}, expected a dict of state and param_groups")
        return
    _check_groups(problems, state["param_groups"], optimizer.state_dict()["param_groups"])
    moments = state["state"]
    if not isinstance(moments, dict):
        problems.add(f"optimizer.state is {_type(moments)}, expected a dict")
        return
    expected = {i for i, name in enumerate(names) if trained[name] is True}
    if set(moments) != expected or any(type(key) is not int for key in moments):
        problems.add("optimizer.state does not have one entry for each trained parameter")
        return
    tensors = [
        (p, _MUON if group.get("orthogonal") else _ADAMW)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    memory: dict[int, str] = {}
    for index in sorted(expected):
        _check_moments(problems, names[index], moments[index], *tensors[index], saved["step"])
        _check_memory(problems, names[index], moments[index], memory)


def _check_moments(
    problems: _Problems,
    name: str,
    entry: Any,
    parameter: Tensor,
    wanted: set[str],
    run_step: int,
) -> None:
    if not isinstance(entry, dict):
        problems.add(f"the moments of {name} are {_type(entry)}, expected a dict")
        return
    problems.keys(f"the optimizer's entry of {name}", entry, wanted, optional=set())
    if not set(entry) >= wanted:
        return
    what = f"step of {name}"
    if problems.tensor(what, entry["step"], torch.Size([]), torch.float32):
        step = float(entry["step"])
        # The optimizer counts in float32, which stops at 2^24.
        if step != int(step) or not 0 < step <= max(run_step, 1):
            problems.add(f"{what} is {step:g}, expected a whole number from 1 to {run_step}")
    for key in sorted(wanted - {"step"}):
        what, value = f"{key} of {name}", entry[key]
        if not problems.tensor(what, value, parameter.shape, parameter.dtype):
            continue
        # The update goes through memory, not through indices: an expanded tensor ends early.
        if value.stride() != parameter.stride():
            problems.add(f"{what} is not laid out in memory like the parameter")
        elif key == "exp_avg_sq" and bool((value < 0).any()):
            problems.add(f"{what} has negative numbers")


def _check_memory(problems: _Problems, name: str, entry: Any, memory: dict[int, str]) -> None:
    """Each moment must have its own memory; `memory` collects what is taken."""
    for key in sorted(_ADAMW | _MUON) if isinstance(entry, dict) else ():
        value = entry.get(key)
        if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
            address = value.untyped_storage().data_ptr()
            owner = memory.setdefault(address, f"{key} of {name}")
            if owner != f"{key} of {name}":
                problems.add(f"{key} of {name} shares its memory with {owner}")


def _check_groups(problems: _Problems, saved: Any, own: list[dict[str, Any]]) -> None:
    """Their parameters must be the same; the other options are not used, but must be plain."""
    if not isinstance(saved, list) or len(saved) != len(own):
        problems.add("optimizer.param_groups are not those of this optimizer")
        return
    for number, (group, mine) in enumerate(zip(saved, own, strict=True)):
        what = f"optimizer.param_groups[{number}]"
        listed = group.get("params") if isinstance(group, dict) else None
        plain = isinstance(listed, list) and all(type(index) is int for index in listed)
        if not plain or listed != mine["params"]:
            problems.add(f"{what} does not list the parameters of this model")
            continue
        for name, value in group.items():
            if name != "params" and name in mine and not _same_kind(value, mine[name]):
                problems.add(f"{what}.{name} is {_value(value)}, expected {_type(mine[name])}")


def _same_kind(value: Any, own: Any) -> bool:
    if isinstance(own, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(own)
            and all(_same_kind(a, b) for a, b in zip(value, own, strict=True))
        )
    if _is_number(own):
        return _is_number(value) and value >= 0
    return type(value) is type(own)


def _check_random_state(problems: _Problems, name: str, state: Any, device: torch.device) -> None:
    generator = torch.Generator(device)
    if not problems.tensor(name, state, generator.get_state().shape, torch.uint8):
        return
    try:
        generator.set_state(state)
    except RuntimeError:
        problems.add(f"{name} is no state of torch's random generator")


def _check_best(problems: _Problems, best: Any) -> None:
    if best is None:
        return
    if (
        not isinstance(best, dict)
        or set(best) != {"step", "loss"}
        or type(best["step"]) is not int
        or not 0 <= best["step"] <= _MOST
        or not _is_number(best["loss"])
    ):
        problems.add(f"best is {_value(best)}, expected None or a step and a loss")


def _check_plain(problems: _Problems, name: str, value: Any, depth: int = 8) -> None:
    if isinstance(value, dict | list) and depth:
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(value, dict) and type(key) is not str:
                problems.add(f"{name} has the key {_value(key)}, expected a text")
            _check_plain(problems, name, item, depth - 1)
    elif type(value) is int and value.bit_length() > 64:
        problems.add(f"{name} holds an integer of more than 64 bits")
    elif value is not None and type(value) not in (str, int, float, bool):
        problems.add(f"{name} holds {_type(value)}, expected plain values")


def parameter_names(model: Nemotron, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order of its groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= _MOST
    return type(value) is float and math.isfinite(value)


def _key(key: object) -> object:
    return key if isinstance(key, str) else None


def _names(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(name[:100] for name in names[:_LISTED]) + (
        f" and {more} more" if more > 0 else ""
    )


def _type(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _value(value: object) -> str:
    try:
        shown = repr(value)
    except Exception:  # an integer of more digits than Python prints
        shown = f"a value of type {type(value).__name__}"
    return shown if len(shown) <= 60 else shown[:59] + "…"
