"""Where a checkpoint lies on this disk: a folder, a shipped model, a folder of the hub's cache, or
a hub id.

A name without a separator that is no folder here is that of a model that comes with the package:
`lite` (`shipped_models.py`).

Programs of Hugging Face keep downloads in a cache, by default ~/.cache/huggingface/hub:

    models--nvidia--NAME/
        refs/main                   a text file: the commit that "main" was at the last download
        snapshots/<commit>/         one folder for each commit; its files are links to
        blobs/<hash>                the content

`resolve` accepts what users have at hand: the folder of a checkpoint, the folder of a model in that
cache, or the id `nvidia/NAME` (with `@REVISION` for a branch, a tag or a commit). Nothing is
downloaded. If the model is not on this disk, the error says how to download it. A local folder of
the same name is preferred to the cache, as in transformers.

Source: the layout that huggingface_hub documents ("Understand caching") and its variables
HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME. The few lines here read it without that package: it reads
its variables once, when it is imported, and finds single files instead of folders. Left out:
downloading.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nemotron_lite import shipped_models
from nemotron_lite.cache_file import is_cache_file
from nemotron_lite.checkpoint.errors import CheckpointError, printable, shorten
from nemotron_lite.input_files import FileError, read_text

_HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint.

    Args:
        path_or_id: a folder; the name of a shipped model; a folder `models--ORG--NAME` of the hub's
            cache, or an `ORG/NAME` or `ORG/NAME@REVISION` that this cache holds. `~` at the start
            is the home folder.

    Raises:
        CheckpointError: there is no such folder, it is a file, or it holds only GGUF files. The
            message says what to do.
    """
    path = Path(path_or_id)
    if str(path).startswith("~"):
        path = path.expanduser()
    try:
        folder = _find(path)
        _refuse_gguf(folder)
    except (OSError, ValueError) as error:  # too long, no permission, a zero byte
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, [f"it cannot be opened ({printable(str(error))})"]) from error
    return folder


def _find(path: Path) -> Path:
    if path.is_dir():
        # A checkpoint may have a folder of that name too; a cache folder has no config.json.
        is_cache = (path / "snapshots").is_dir() and not (path / "config.json").exists()
        return _snapshot(path, None) if is_cache else path
    if path.exists():
        raise CheckpointError(path, [_is_a_file(path)])
    if shipped := shipped_models.folder(str(path)):
        return shipped
    if hub_id := _HUB_ID.fullmatch(str(path)):
        organization, name, revision = hub_id.groups()
        cached = cache_folder() / f"models--{organization}--{name}"
        if (cached / "snapshots").is_dir():
            return _snapshot(cached, revision)
    raise CheckpointError(path, [_is_missing(path)])


def cache_folder() -> Path:
    """The folder of the hub's cache, as the environment says now."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(name):
            return _expand(value)
    if value := os.environ.get("HF_HOME"):
        return _expand(value) / "hub"
    return _expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expand(folder: str) -> Path:
    return Path(os.path.expandvars(folder)).expanduser()


def _snapshot(cached: Path, revision: str | None) -> Path:
    """The snapshot of a revision ("main" if None) in a folder `models--ORG--NAME`."""
    snapshots = cached / "snapshots"
    there = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    wanted = revision or "main"
    if ".." not in wanted.split("/"):
        try:
            commit = read_text(cached / "refs" / wanted, limit=1024).strip()
        except (FileNotFoundError, FileError):  # no such branch or tag
            commit = wanted
        if commit in there:
            return snapshots / commit
    matching = [name for name in there if _COMMIT.fullmatch(wanted) and name.startswith(wanted)]
    if len(matching) == 1:
        return snapshots / matching[0]
    if revision is None and len(there) == 1:  # downloaded by its commit, or copied without refs
        return snapshots / there[0]
    name = _hub_name(cached)
    raise CheckpointError(
        cached,
        [
            f"the cache of the hub has no revision {printable(wanted)!r} of {name}; it has the "
            f"commits {shorten(there) or '(none)'}. Give one of them, {name}@COMMIT, or download "
            f"it: `hf download {name} --revision {printable(wanted)}`"
        ],
    )


def _hub_name(cached: Path) -> str:
    match = _CACHED.fullmatch(cached.name)
    return f"{match[1]}/{match[2]}" if match else "OWNER/NAME"


def _refuse_gguf(folder: Path) -> None:
    """Refuse a folder of GGUF files that has no safetensors.

    Raises:
        CheckpointError: names the way.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf and not any(name.endswith((".safetensors", ".index.json")) for name in names):
        raise CheckpointError(folder, [f"it holds only GGUF files ({shorten(gguf)}): {_GGUF}"])


_GGUF = (
    "GGUF is the format of llama.cpp, and this package reads safetensors. Take the release that it "
    "was made from, for example with `hf download OWNER/NAME --local-dir DIR`; or run this file "
    "with llama.cpp"
)


def _is_a_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return f"it is a GGUF file: {_GGUF}"
    if is_cache_file(path):
        return "it is a cache that `Cache.save` wrote, and holds no weights: `Cache.load` opens it"
    if path.name == "config.json" or path.suffix == ".safetensors":
        return (
            "it is a file; a model is a folder with config.json and weights: give the folder that "
            f"holds it, {path.parent}"
        )
    return f"it is a file; give the folder that holds it, {path.parent}"


def _is_missing(path: Path) -> str:
    if left := sorted(path.absolute().parent.glob(f".{_literal(path.name)}.old-*")):
        return f"it is missing, but an interrupted save left the old one as {left[-1]}: rename it"
    if _looks_like_hub_id(path):
        name, _, revision = str(path).partition("@")
        option = f" --revision {revision}" if revision else ""
        return (
            f"there is no such folder, and the cache of the hub ({cache_folder()}) does not hold "
            "this model. Nothing is downloaded here: download it first, into the cache with "
            f"`hf download {name}{option}`, or into a folder with "
            f"`hf download {name}{option} --local-dir DIR`"
        )
    shipped = shorten(shipped_models.names()) or "none"
    if len(path.parts) == 1 and path.name:
        start = f"there is neither a folder nor a shipped model of this name (shipped: {shipped})"
    else:
        start = f"there is no such folder; the shipped models have plain names ({shipped})"
    return (
        f"{start}. `make run` trains a small model and saves it as runs/small; "
        f"`hf download OWNER/NAME --local-dir {path}` downloads a published one"
    )


def _literal(name: str) -> str:
    """A name in which `glob` sees no patterns."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _looks_like_hub_id(path: Path) -> bool:
    """Whether this is rather ORG/NAME on the hub than a place on this disk."""
    if _HUB_ID.fullmatch(str(path)) is None:
        return False
    return path.parts[0] not in ("runs", ".", "..") and not path.parent.is_dir()
