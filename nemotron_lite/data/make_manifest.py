"""Write the manifest of the shipped lite model from the packages of this machine.

    python -m nemotron_lite.data.make_manifest [FILE]
    python -m nemotron_lite.data.make_manifest --requirements > versions.txt

The packages are those that this project depends on, with all of its extras, and theirs in turn, as
far as they are installed. Nothing else that happens to be installed is read. Without a FILE, the
manifest of the package itself is replaced. The second command writes the versions of the packages
in the manifest, for `pip install -r versions.txt`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from importlib import metadata
from pathlib import Path

from nemotron_lite.data.corpus import load_corpus
from nemotron_lite.data.manifest import (
    LITE,
    TokenizerSettings,
    as_requirements,
    describe_sources,
    read_manifest,
)
from nemotron_lite.data.mixture import Phase
from nemotron_lite.data.sources import (
    DOCSTRINGS,
    DOCUMENTATION,
    PACKAGES,
    STANDARD_LIBRARY,
    read_sources,
)
from nemotron_lite.data.tokenizer import CHAT_TOKENS
from nemotron_lite.files import atomic_file

_log = logging.getLogger(__name__)

PROJECT = "nemotron-lite"
PHASES = (
    Phase(
        "variety",
        0.0,
        {STANDARD_LIBRARY: 0.45, PACKAGES: 0.35, DOCUMENTATION: 0.10, DOCSTRINGS: 0.10},
    ),
    Phase(
        "quality",
        0.8,
        {STANDARD_LIBRARY: 0.70, PACKAGES: 0.15, DOCUMENTATION: 0.05, DOCSTRINGS: 0.10},
    ),
)
TOKENIZER = TokenizerSettings(vocab_size=4096, special_tokens=CHAT_TOKENS, train_bytes=24_000_000)


def needed_packages(project: str = PROJECT) -> list[str]:
    """Names of the installed distributions that a project needs, with all its extras; sorted.

    Raises:
        importlib.metadata.PackageNotFoundError: the project is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = canonicalize_name(project)
    extras = metadata.metadata(project).get_all("Provides-Extra") or []
    waiting, seen = [(project, frozenset(extras))], set()
    while waiting:
        name, extras_of_it = waiting.pop()
        if (name, extras_of_it) in seen:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            _log.warning("%s is not installed, so its text is left out.", name)
            continue
        seen.add((name, extras_of_it))
        for text in required:
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *extras_of_it)]
            if needed.marker is None or any(map(needed.marker.evaluate, environments)):
                waiting.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return sorted({name for name, _ in seen} - {project})


def make_manifest(path: Path) -> str:
    """Write a manifest; returns what it holds, in a few lines."""
    corpus = load_corpus()
    found = read_sources(corpus, needed_packages())
    manifest = describe_sources(found, corpus, PHASES, TOKENIZER)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
    lines = [
        f"{name}: {sum(p.bytes for p in packages):,} bytes, "
        f"{sum(p.documents for p in packages):,} documents of {len(packages)} packages"
        for name, packages in manifest.sources.items()
    ]
    lines += [
        f"left out, {copy.share:.0%} of its lines are held out: {copy.name} ({copy.source})"
        for copy in found.near_copies
    ]
    return "\n".join([*lines, f"written: {path}"])


def main() -> None:
    """The command."""
    arguments = argparse.ArgumentParser(description="Write the manifest of a training text.")
    arguments.add_argument("file", nargs="?", type=Path, default=LITE, help="the manifest")
    arguments.add_argument(
        "--requirements", action="store_true", help="list its packages for pip; write nothing"
    )
    asked = arguments.parse_args()
    if asked.requirements:
        sys.stdout.write(as_requirements(read_manifest(asked.file)))
    else:
        sys.stdout.write(make_manifest(asked.file) + "\n")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
