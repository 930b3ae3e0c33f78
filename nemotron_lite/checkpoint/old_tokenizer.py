"""What `save` does with the tokenizer.json that a folder has already.

The old checkpoint and its tokenizer are replaced together: another model's tokenizer must not stay
beside the new weights. But the file may not be part of that checkpoint. A user has put it there, or
has edited it since. Then it is the only one, and it must not be lost.

So the weights say which tokenizer.json was written with them: the header of a weight file has its
SHA-256 in `__metadata__`, where the safetensors format has room for texts.

    the file in the folder              the model has a tokenizer     the model has none
    as the old weights say              replaced                      removed
    any other, and it fits the model    renamed, if it differs        stays
    any other                           renamed, if it differs        renamed

It fits if it can be read and its ids are in the vocabulary; otherwise `load` would refuse the
folder. Renaming comes with a warning that gives the new name.

Left out: whether a tokenizer of the right size is the one that the model was trained with. No file
can tell.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from tokenizers import Tokenizer

from nemotron_lite.checkpoint.tokenizer import TOKENIZER, highest_id, parsed
from nemotron_lite.checkpoint.weight_files import find_files
from nemotron_lite.input_files import FileError, read_bytes

RECORD = "tokenizer_sha256"  # in the `__metadata__` of weight files


class OldTokenizer(NamedTuple):
    """What happens to the tokenizer.json of a folder.

    Attributes:
        stays: it is neither replaced nor removed.
        renamed: the new name and the content of a file that may not be lost; None without one.
    """

    stays: bool = False
    renamed: tuple[str, bytes] | None = None


def checksum(content: bytes) -> str:
    """What `RECORD` says about a tokenizer.json with this content."""
    return hashlib.sha256(content).hexdigest()


def judge(folder: Path, new: Tokenizer | None, vocab_size: int) -> OldTokenizer:
    """Decide about the file in a folder, by the table above.

    A path that is no regular file, or one that this process may not read, stays if the model has no
    tokenizer; `load` then says what is wrong with it.

    Args:
        folder: to save into; it need not exist.
        new: the tokenizer that is saved with the model.
        vocab_size: of the model.
    """
    try:
        content = read_bytes(folder / TOKENIZER)
    except FileNotFoundError:
        return OldTokenizer(stays=os.path.lexists(folder / TOKENIZER) and new is None)
    except FileError:
        return OldTokenizer(stays=new is None)
    if _record(folder) == checksum(content):
        return OldTokenizer()
    old = parsed(content)
    if new is None and old is not None and highest_id(old) < vocab_size:
        return OldTokenizer(stays=True)
    if new is not None and old is not None and _definition(old) == _definition(new):
        return OldTokenizer()
    name = _free_name(folder, content)
    what = "does not fit this model" if new is None else "is not the one of this model"
    warnings.warn(
        f"{folder / TOKENIZER} {what}, and no save of this folder wrote it. It is kept as {name}.",
        stacklevel=3,
    )
    return OldTokenizer(renamed=(name, content))


def _record(folder: Path) -> str | None:
    """What the weights in a folder say about its tokenizer.json; None if they say nothing."""
    try:
        for file in find_files(folder).files[:1]:
            with safe_open(file, framework="pt") as weights:
                return (weights.metadata() or {}).get(RECORD)
    except Exception:  # damaged weights, in any way: then nothing is known
        return None
    return None


def _definition(tokenizer: Tokenizer) -> str:
    """All that decides how it encodes, without truncation and padding, which `load` leaves out."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return str(copy.to_str())


def _free_name(folder: Path, content: bytes) -> str:
    """A name that the folder does not use, or the one under which it has this content already."""
    names = (f"{TOKENIZER}.kept" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
    for name in names:
        if not os.path.lexists(folder / name):
            break
        try:
            if read_bytes(folder / name) == content:
                break
        except (OSError, FileError):
            continue
    return name
