"""Checkpoint merging: a weighted average of checkpoints that imitates a decay of the learning rate.

In the stable phase of a run (schedule.py) the rate stays at its peak, and the weights keep jumping
around a good point. A decay would calm them, but it costs updates, and after it the stable phase
cannot go on. An average of checkpoints that the stable phase has saved anyway gives nearly the same
weights without a single update.

The weights of the average follow from the shape of the decay. Let theta_0 ... theta_n be
checkpoints at a constant rate, and g_i = theta_i - theta_(i-1) what the updates between two of them
changed. A decay that begins at theta_0 multiplies the rate of each update by a factor. Let f_i be
the mean of the factors of the updates behind g_i. If the gradients stay as they were, the decay
ends at

    theta_0 + sum_i f_i g_i  =  sum_j c_j theta_j        c_j = f_j - f_(j+1),  f_0 = 1,  f_(n+1) = 0

The right side orders the sum by checkpoints. The c_j add up to 1, and none is negative if the
factors only fall. Three shapes:

    constant, f = 1           c_n = 1: the last checkpoint
    linear, f = 1 - x         c_j = 1/n, and about half of that for the first and the last, with
                              many updates between two checkpoints: nearly the mean
    minus-sqrt, 1 - sqrt(x)   c_j falls like 1/sqrt(j): the oldest checkpoints count most, because
                              this decay falls fastest at its start

"If the gradients stay as they were" is the approximation: a real decay sees other weights, so other
gradients.

Super uses the minus-sqrt curve, over windows of 125, 250 and 500 billion tokens, with a checkpoint
every 25 billion. The best of the three windows is 2 to 4 points better than the last checkpoint on
12 benchmarks, and the released base model is itself such a merge (reference sheet 7). The
equation: Tian et al. 2025 (WSM, arXiv 2507.17634), theorem 1.

    model = merge_checkpoints("runs/mine", window=400)              over the last 400 updates
    by_window = merge_windows("runs/mine", [100, 200, 400])         each file is read once

Sums are in float32, whatever the files hold. Beside them, one tensor of a run's file is in memory,
or one model of a folder. The selection bias of a router is averaged like its weights: it balances
the scores that these weights give. With the newest bias instead, the loss stays the same, but the
experts of a merge are loaded less evenly (tests/train/test_snapshots.py measures it). What is no
float is that of the newest checkpoint.

Merging during a run: snapshots.py. Where the rate of a run was constant: merge_plan.py. Left out:
averages on a device, and of models in shards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nemotron_lite.arguments import integer, number
from nemotron_lite.checkpoint import load
from nemotron_lite.checkpoint.tokenizer import read_tokenizer, same_tokens
from nemotron_lite.config import NemotronConfig
from nemotron_lite.model import Nemotron
from nemotron_lite.train.checkpoint_checks import check_weights
from nemotron_lite.train.checkpointing import (
    SNAPSHOTS,
    list_checkpoints,
    read_checkpoint,
    step_of,
)
from nemotron_lite.train.schedule import minus_sqrt

FLOOR = 0.01  # Super's last learning rate, as a fraction of its peak
_MOST = 1 << 53
_SAMPLES = 10_000  # values of the curve between two checkpoints, at most

Curve = Callable[[float], float]


def linear(x: float) -> float:
    """A decay in a straight line, from 1 to 0. Its merge is nearly the mean of the checkpoints."""
    return 1 - x


def merge_weights(
    steps: Sequence[SupportsIndex], *, curve: Curve = minus_sqrt, floor: int | float = FLOOR
) -> tuple[float, ...]:
    """The weight of each checkpoint in a merge; they add up to 1.

    Between two checkpoints, the mean of the curve is over all updates, or over 10,000 places if
    there are more. `steps` may therefore be counted in tokens too.

    Args:
        steps: number of updates before each checkpoint, increasing. The decay that is imitated
            begins at the first one and ends at the last one.
        curve: the factor of the rate at x, the fraction of the decay that is done: from 1 at x = 0
            to 0 at x = 1. As in the schedule, update s of n has x = s/n.
        floor: rate at the end, as a fraction of the peak.

    Raises:
        ValueError: no checkpoints, steps that do not increase, or a curve outside 0 to 1.

    >>> [round(c, 3) for c in merge_weights([0, 100, 200, 300, 400])]
    [0.332, 0.272, 0.178, 0.144, 0.074]
    """
    at = [integer("steps", step, low=0, high=_MOST) for step in steps]
    floor = number("floor", floor, low=0, high=1)
    if not at or any(a >= b for a, b in pairwise(at)):
        raise ValueError(f"steps={at[:8]} does not work: expected increasing numbers of updates.")
    factors = [1.0]
    for before, after in pairwise(at):
        # Each place is the middle of equally many updates; of one update, the update itself.
        places = min(after - before, _SAMPLES)
        each = (after - before) / places
        done = [before - at[0] + 0.5 + (i + 0.5) * each for i in range(places)]
        decay = [curve(min(1.0, updates / (at[-1] - at[0]))) for updates in done]
        if not all(0 <= factor <= 1 for factor in decay):
            raise ValueError(
                f"the curve gives {min(decay):g} to {max(decay):g}: expected factors from 0 to 1."
            )
        factors.append(floor + (1 - floor) * math.fsum(decay) / len(decay))
    factors.append(0.0)
    return tuple(a - b for a, b in pairwise(factors))


def merge_checkpoints(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    window: SupportsIndex | None = None,
    steps: Sequence[SupportsIndex] | None = None,
    until: SupportsIndex | None = None,
    curve: Curve = minus_sqrt,
    floor: int | float = FLOOR,
) -> Nemotron:
    """The weighted average of checkpoints, as a model in float32.

    Args:
        checkpoints: the folder of a run, with its snapshots, or else its checkpoints. Or a list, in
            order: files of a run (`step-00000400.pt`), or folders that `nemotron_lite.load` opens,
            with `steps`.
        window: number of updates from the first checkpoint that counts to the last one; None takes
            all checkpoints, also those of a warm-up or a decay.
        steps: number of updates before each checkpoint of a list. If None, it is read from the
            names, which must all be like `step-00000400.pt`.
        until: the last checkpoint that counts, by its number of updates; None is the newest.
        curve, floor: the decay that is imitated; see `merge_weights`.

    Raises:
        FileNotFoundError: there are no checkpoints.
        ValueError: checkpoints of different models; the message names what differs. Or no
            checkpoint where a window begins or ends.
        ResumeError, CheckpointError: a file is damaged, or holds no model.
    """
    found = _find(checkpoints, steps)
    last = found[-1].step if until is None else integer("until", until, low=0, high=_MOST)
    whole = last - found[0].step if window is None else integer("window", window, low=0)
    return _merge(found, [whole], last, curve, floor)[whole]


def merge_windows(
    checkpoints: str | Path | Sequence[str | Path],
    windows: Iterable[SupportsIndex],
    *,
    steps: Sequence[SupportsIndex] | None = None,
    until: SupportsIndex | None = None,
    curve: Curve = minus_sqrt,
    floor: int | float = FLOOR,
) -> dict[int, Nemotron]:
    """The merges of several windows that end together; each checkpoint is read once.

    Arguments and errors are those of `merge_checkpoints`.

    Returns:
        A model for each window.
    """
    found = _find(checkpoints, steps)
    last = found[-1].step if until is None else integer("until", until, low=0, high=_MOST)
    wanted = [integer("windows", window, low=0) for window in windows]
    return _merge(found, wanted, last, curve, floor)


def merged_state(files: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of the weights in files of one run, by name; float32.

    Raises:
        ResumeError: a file is damaged.
    """
    total: dict[str, Tensor] = {}
    for path, weight in zip(files, weights, strict=True):
        _add(total, read_checkpoint(path, mapped=True)["model"], weight)
    return total


class _Saved(NamedTuple):
    """A checkpoint that was not read yet."""

    step: int
    path: Path


class _Contents(NamedTuple):
    """What a checkpoint holds."""

    config: NemotronConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    companion_files: Mapping[str, bytes]


def _find(
    checkpoints: str | Path | Sequence[str | Path], steps: Sequence[SupportsIndex] | None
) -> list[_Saved]:
    """The checkpoints in order, with their numbers of updates."""
    if isinstance(checkpoints, str | os.PathLike):
        if steps is not None:
            raise ValueError("steps are for a list of checkpoints: a run has them in its names.")
        paths = checkpoints_of(Path(checkpoints))
    else:
        paths = [Path(path) for path in checkpoints]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: expected a checkpoint.")
    named = [step_of(path) for path in paths]
    if steps is not None:
        at = [integer("steps", step, low=0, high=_MOST) for step in steps]
        if len(at) != len(paths):
            raise ValueError(f"{len(at)} steps for {len(paths)} checkpoints: give one for each.")
    else:
        unknown = [str(path) for path, step in zip(paths, named, strict=True) if step < 0]
        if unknown:
            raise ValueError(
                f"the name of {unknown[0]} does not say after how many updates it was saved: give "
                "steps=[...], one number for each checkpoint."
            )
        at = named
    if not at or any(a >= b for a, b in pairwise(at)):
        raise ValueError(
            f"checkpoints after {at[:8]} updates: expected at least one, in increasing order."
        )
    return [_Saved(*pair) for pair in zip(at, paths, strict=True)]


def checkpoints_of(folder: Path) -> list[Path]:
    """The files of a run: its snapshots, or if it has none, its checkpoints."""
    found = list_checkpoints(folder / SNAPSHOTS) or list_checkpoints(folder / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"{folder} has neither snapshots nor checkpoints: expected the folder of a training "
            "run, or a list of checkpoints."
        )
    return found


def steps_inside(at: Sequence[int], window: int, last: int) -> list[int]:
    """Those of the checkpoints `at` that a window ending at `last` merges.

    Raises:
        ValueError: no checkpoint where the window begins or ends.
    """
    for end in (last, last - window):
        if end not in at:
            raise ValueError(
                f"a window of {window:,} updates until {last:,} needs a checkpoint after "
                f"{end:,} updates; there are those after {_listed(at)}."
            )
    return [step for step in at if last - window <= step <= last]


def _merge(
    found: Sequence[_Saved], windows: Sequence[int], last: int, curve: Curve, floor: int | float
) -> dict[int, Nemotron]:
    at = [saved.step for saved in found]
    weights: dict[int, dict[int, float]] = {}
    for window in windows:
        inside = steps_inside(at, window, last)
        shares = merge_weights(inside, curve=curve, floor=floor)
        weights[window] = dict(zip(inside, shares, strict=True))
    sums: dict[int, dict[str, Tensor]] = {window: {} for window in weights}
    first: tuple[Path, _Contents] | None = None
    for step, path in found:
        if not any(step in merge for merge in weights.values()):
            continue
        contents = _read(path)
        first = first or (path, contents)
        _check_same(*first, path, contents)
        for window, merge in weights.items():
            if step in merge:
                _add(sums[window], contents.tensors, merge[step])
    if first is None:
        raise ValueError("windows is empty: give at least one number of updates.")
    return {window: _model(total, contents) for window, total in sums.items()}


def _add(total: dict[str, Tensor], tensors: Mapping[str, Tensor], weight: float) -> None:
    """Add the tensors of a checkpoint to a sum, oldest checkpoint first."""
    for name, tensor in tensors.items():
        value = tensor.detach()
        if not value.is_floating_point():
            total[name] = value.clone()
        elif name in total:
            total[name].add_(value.float(), alpha=weight)
        else:
            total[name] = value.float() * weight


def _read(path: Path) -> _Contents:
    if path.is_dir():
        model = load(path, dtype=torch.float32)
        return _Contents(
            model.config, model.state_dict(), model.tokenizer, dict(model.companion_files)
        )
    saved = read_checkpoint(path, mapped=True)
    config = _config(path, saved)
    with torch.device("meta"):
        check_weights(path, saved["model"], Nemotron(config))
    run = Path(os.path.abspath(path)).parent.parent  # a link stays one: its run is around it
    tokenizer, problems = read_tokenizer(run, config)
    if problems:
        raise ValueError(f"{run}: {'; '.join(problems)}.")
    return _Contents(config, saved["model"], tokenizer, {})


def _config(path: Path, saved: Any) -> NemotronConfig:
    """The sizes that a file of a run has in its fingerprint."""
    try:
        saved["model"].items()
        sizes: dict[str, Any] = dict(saved["fingerprint"]["sizes"])
        lists = {name: tuple(value) for name, value in sizes.items() if isinstance(value, list)}
        return NemotronConfig(**{**sizes, **lists})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a model of this version of nemotron_lite ({error})."
        ) from error


def _check_same(first: Path, one: _Contents, path: Path, other: _Contents) -> None:
    """Refuse to average different models."""
    a, b = asdict(one.config), asdict(other.config)
    differences = [f"{name} is {a[name]} and {b[name]}" for name in a if a[name] != b[name]]
    tokenizers = one.tokenizer, other.tokenizer
    if None not in tokenizers and not same_tokens(*tokenizers):
        differences.append("their tokenizers have different tokens")
    if differences:
        raise ValueError(
            f"{first} and {path} cannot be merged, because they are different models: "
            f"{'; '.join(differences[:5])}. Give checkpoints of one run."
        )


def _model(total: Mapping[str, Tensor], newest: _Contents) -> Nemotron:
    with torch.device("meta"):
        model = Nemotron(newest.config)
    model.load_state_dict(total, assign=True)
    model.tokenizer = newest.tokenizer
    model.companion_files = dict(newest.companion_files)
    return model.eval()


def _listed(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps[-8:]]
    return ("..., " if len(steps) > 8 else "") + ", ".join(shown)
