"""What a run is made of, written into its checkpoints: text, tokenizer, sizes, options, versions.

A run that is resumed with another text, another tokenizer or other options is another run. Its
losses no longer mean what the log says, and its finished model may get a tokenizer that its weights
never saw. So a resume compares the fingerprint in the checkpoint with that of the present call:

    model.*              the sizes of the model      never accepted: the weights would not fit
    tokenizer            SHA-256 of its JSON         never accepted: token ids mean other things
    text                 `data.fingerprint`          accepted by name
    the options          of `TrainConfig`            accepted by name, some always (`FREE`)
    python, torch, ...   versions, device            reported, never refused

With other versions the losses are the same up to rounding, but usually not bit for bit.

A source of batches without a `fingerprint` has the text None. It cannot be compared, and
neither can a tokenizer that one of the two calls does not know. The resume says so and goes on.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch

import nemotron_lite
from nemotron_lite.data.batches import BatchSource
from nemotron_lite.model import Nemotron
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.errors import ResumeError

# Options that change nothing about the updates, or only where the run ends.
FREE = frozenset(
    {
        "max_seconds",
        "save_every",
        "save_every_seconds",
        "keep_checkpoints",
        "eval_every",
        "eval_batches",
        "gradient_checkpointing",
        "merge_every",
        "merge_windows",
    }
)
# Options that older versions did not have, with the value that gives what those did.
ADDED = {"optimizer": "adamw"}
_MODEL = "model."
_NEVER_PREFIXES = (_MODEL, "tokenizer")
_SHOWN = 40  # characters of one value in the table


def run_fingerprint(model: Nemotron, data: BatchSource, config: TrainConfig) -> dict[str, Any]:
    """All that a resume compares, as plain values: `sizes`, `options`, `inputs`, `versions`.

    Raises:
        TypeError: the fingerprint of `data` is no text.
    """
    return {
        "sizes": _plain(asdict(model.config)),
        "options": _plain(config.to_dict()),
        "inputs": {"text": _text(data), "tokenizer": _tokenizer(model, data)},
        "versions": {
            "nemotron_lite": nemotron_lite.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": model.device.type,
        },
    }


def compare_runs(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, allow_changes: Collection[str], folder: str
) -> list[str]:
    """Compare two fingerprints.

    Args:
        saved: of the checkpoint.
        now: of this call.
        allow_changes: names of fields that may differ.
        folder: for the message.

    Returns:
        Sentences about what differs and was accepted: versions, and fields that are allowed.

    Raises:
        ResumeError: something else differs; the message has a table of it.
        ValueError: `allow_changes` names a field that does not exist or is never accepted.
    """
    names = _check_allowed(allow_changes, now)
    inputs = _merged(saved["inputs"], now["inputs"])
    unknown = {name for name, *pair in inputs if None in pair and pair != [None, None]}
    differences = {
        name: (before, after)
        for name, before, after in _pairs(saved, now)
        if before != after and name not in FREE and name not in unknown
    }
    refused = {name: pair for name, pair in differences.items() if name not in names}
    versions = [
        f"{name} was {_shown(before)} and is {_shown(after)} now: losses may differ in the last "
        "digits"
        for name, before, after in _merged(saved["versions"], now["versions"])
        if before != after
    ]
    if refused:
        raise ResumeError(_refusal(refused, folder, versions))
    accepted = [
        f"{name} was {_shown(before)} and is {_shown(after)} now, as allowed"
        for name, (before, after) in differences.items()
    ]
    not_compared = [
        f"the {name} was not compared, because it has no fingerprint on one side"
        for name in sorted(unknown)
    ]
    return [*accepted, *not_compared, *versions]


def _check_allowed(allow_changes: Collection[str], now: Mapping[str, Any]) -> set[str]:
    if isinstance(allow_changes, str):
        raise TypeError(
            f"allow_changes={allow_changes!r}: expected a list of names, such as "
            f"[{allow_changes!r}]."
        )
    possible = {"text", *now["options"]}
    wrong = sorted({str(name) for name in allow_changes} - possible)
    if wrong:
        never = [name for name in wrong if name.startswith(_NEVER_PREFIXES)]
        reason = (
            f"{', '.join(never)} may never change in a run"
            if never
            else f"there is no field {', '.join(wrong)}"
        )
        raise ValueError(
            f"allow_changes (--allow-changed): {reason}; expected some of "
            f"{', '.join(sorted(possible - FREE))}."
        )
    return {str(name) for name in allow_changes}


def _pairs(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    sizes = _merged(saved["sizes"], now["sizes"])
    return [
        *_merged(saved["inputs"], now["inputs"]),
        *_merged({**ADDED, **saved["options"]}, now["options"]),
        *[(_MODEL + name, before, after) for name, before, after in sizes],
    ]


_ABSENT = "(no such field)"


def _merged(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [*now, *(name for name in saved if name not in now)]
    return [(name, saved.get(name, _ABSENT), now.get(name, _ABSENT)) for name in names]


def _refusal(refused: Mapping[str, tuple[Any, Any]], folder: str, versions: list[str]) -> str:
    rows = [("", "in the run", "now")]
    rows += [(name, _shown(before), _shown(after)) for name, (before, after) in refused.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(
        f"  {name:{widths[0]}}  {before:{widths[1]}}  {after}".rstrip()
        for name, before, after in rows
    )
    never = [name for name in refused if name.startswith(_NEVER_PREFIXES)]
    allowed = [name for name in refused if name not in never]
    ways = ["Set this back, or start a new run in another folder (out_dir, --out)"]
    if never:
        ways.append(
            f"{', '.join(never)} can never change in a run. A new run can start from the weights "
            "of this one (--init-from)"
        )
    if allowed and not never:
        options = " ".join(f"--allow-changed {name}" for name in allowed)
        ways.append(f"To continue with the change, give allow_changes={allowed} ({options})")
    if any(_ABSENT in pair for pair in refused.values()):
        ways.append("The run was saved by another version of nemotron_lite")
    ways += [f"Besides, {sentence}" for sentence in versions]
    what = "1 thing differs" if len(refused) == 1 else f"{len(refused)} things differ"
    sentences = " ".join(f"{way}." for way in ways)
    return f"the run in {folder} cannot be resumed like this: {what}.\n{table}\n{sentences}"


def _shown(value: object) -> str:
    text = "unknown" if value is None else str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _text(data: BatchSource) -> str | None:
    found = getattr(data, "fingerprint", None)
    if callable(found):
        found = found()
    if found is not None and not isinstance(found, str):
        raise TypeError(
            f"the fingerprint of {type(data).__name__} is {type(found).__name__}: expected a text "
            "that is the same for the same data and differs for other data."
        )
    return found or None


def _tokenizer(model: Nemotron, data: BatchSource) -> str | None:
    tokenizer = run_tokenizer(model, data)
    if tokenizer is None:
        return None
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def run_tokenizer(model: Nemotron, data: BatchSource) -> Any:
    """The tokenizer of a run: that of the data, or else of the model; None without one."""
    for owner in (data, model):
        tokenizer = getattr(owner, "tokenizer", None)
        if hasattr(tokenizer, "to_str"):
            return tokenizer
    return None


def _plain(value: Any) -> Any:
    """Nested dicts, lists and plain values: equal before and after a file of torch."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
