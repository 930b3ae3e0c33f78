"""The manifest of a training text: every source with its packages, versions, licences and hashes.

A model that is shipped has to say what it was trained on, and in such a way that somebody else can
have the same text. The manifest is a JSON file:

    sources     name; packages with version, licence, documents, bytes and SHA-256 of what they gave
    phases      when they begin, and the weights of the sources
    held_out    name and SHA-256 of every file that is never trained on
    tokenizer   its settings

`compare` says in what way the text of this machine differs from a manifest.

    manifest = read_manifest()                   the shipped model's
    python -m nemotron_lite.data.make_manifest   writes one from the packages of this machine

Left out: the texts themselves. They are on every machine that has the same packages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemotron_lite.data.corpus import Corpus
from nemotron_lite.data.mixture import Phase, check_phases
from nemotron_lite.data.sources import PYTHON, SOURCES, FoundSources, PackageText
from nemotron_lite.input_files import FileError, read_json

FORMAT = 1
LITE = Path(__file__).parent / "manifests" / "lite.json"
_SHOWN = 6  # differences in a message


class ManifestError(ValueError):
    """The text of this machine is not that of the manifest. The message says what differs."""


@dataclass(frozen=True)
class Package:
    """What one package gives to one source."""

    name: str
    version: str
    licence: str
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerSettings:
    """How the tokenizer is trained: `train_tokenizer` on at most `train_bytes` of the sources."""

    vocab_size: int
    special_tokens: tuple[str, ...]
    train_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a model is trained on.

    Attributes:
        sources: the packages of each source.
        phases: the weights of the sources during a run.
        held_out: name and SHA-256 of every file that is never trained on.
        tokenizer: its settings.
    """

    sources: Mapping[str, tuple[Package, ...]]
    phases: tuple[Phase, ...]
    held_out: Mapping[str, str]
    tokenizer: TokenizerSettings

    @property
    def packages(self) -> list[str]:
        """Names of all packages, without Python itself; sorted, as they are read."""
        names = {package.name for packages in self.sources.values() for package in packages}
        return sorted(names - {PYTHON})

    def to_json(self) -> str:
        """The text of the file."""
        sources = {
            name: {
                "documents": sum(package.documents for package in packages),
                "bytes": sum(package.bytes for package in packages),
                "sha256": _sha256_of_all(packages),
                "packages": [asdict(package) for package in packages],
            }
            for name, packages in self.sources.items()
        }
        content = {
            "format": FORMAT,
            "tokenizer": asdict(self.tokenizer),
            "phases": [{**asdict(phase), "weights": dict(phase.weights)} for phase in self.phases],
            "sources": sources,
            "held_out": dict(self.held_out),
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def sha256_of_text(self) -> str:
        """Over all that the text depends on, which is everything but the phases after the first.

        The tokenizer is trained on the sources in the shares of the first phase.
        """
        text = replace(self, phases=self.phases[:1]).to_json()
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str | os.PathLike[str] = LITE) -> Manifest:
    """A manifest; that of the shipped lite model by default.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: no readable manifest.
    """
    content = read_json(path)
    try:
        return manifest_of(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(path, f"is no manifest of a training text ({error})") from error


def manifest_of(content: Mapping[str, Any]) -> Manifest:
    """The manifest in a JSON object.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it has not the layout of a manifest.
    """
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
    tokenizer = content["tokenizer"]
    manifest = Manifest(
        {
            name: tuple(Package(**package) for package in source["packages"])
            for name, source in content["sources"].items()
        },
        tuple(Phase(**phase) for phase in content["phases"]),
        {str(name): str(sha256) for name, sha256 in content["held_out"].items()},
        TokenizerSettings(
            int(tokenizer["vocab_size"]),
            tuple(tokenizer["special_tokens"]),
            int(tokenizer["train_bytes"]),
        ),
    )
    check_phases(manifest.phases, SOURCES)
    for name, source in content["sources"].items():
        if source["sha256"] != _sha256_of_all(manifest.sources[name]):
            raise ValueError(f"the SHA-256 of {name!r} does not fit its packages")
    return manifest


def describe_sources(
    found: FoundSources,
    corpus: Corpus,
    phases: Sequence[Phase],
    tokenizer: TokenizerSettings,
) -> Manifest:
    """The manifest of what was read on this machine."""
    return Manifest(
        {
            source: tuple(_package(text) for text in packages if text.documents)
            for source, packages in found.sources.items()
        },
        tuple(phases),
        {d.name: hashlib.sha256(d.content).hexdigest() for d in corpus.held_out},
        tokenizer,
    )


def compare(wanted: Manifest, here: Manifest) -> list[str]:
    """What differs on this machine, one text for each difference; empty if all is equal."""
    differences = []
    if dict(wanted.held_out) != dict(here.held_out):
        differences.append("the held-out files of the standard library are others")
    for source, packages in wanted.sources.items():
        found = {package.name: package for package in here.sources.get(source, ())}
        for package in packages:
            other = found.get(package.name)
            if other is None:
                differences.append(f"{package.name} {package.version} is missing ({source})")
            elif other.version != package.version:
                differences.append(
                    f"{package.name} {other.version} is installed, not {package.version} ({source})"
                )
            elif (other.sha256, other.documents) != (package.sha256, package.documents):
                differences.append(f"{package.name} {package.version} has other files ({source})")
    return differences


def refuse(differences: Sequence[str], wanted: Manifest) -> ManifestError:
    """The error that names differences, and says how to get the same text."""
    shown = "; ".join(differences[:_SHOWN])
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    python = next(
        (p.version for packages in wanted.sources.values() for p in packages if p.name == PYTHON),
        "",
    )
    return ManifestError(
        f"the text of this machine is not that of the manifest: {shown}{more}. Install the "
        "versions of the manifest (python -m nemotron_lite.data.make_manifest --requirements lists "
        f"them for pip), with Python {python}; or give strict=False to train on what is here, "
        "which gives another model."
    )


def _package(text: PackageText) -> Package:
    return Package(
        text.name, text.version, text.licence, len(text.documents), text.num_bytes, text.sha256()
    )


def _sha256_of_all(packages: Sequence[Package]) -> str:
    lines = "".join(f"{package.name} {package.version} {package.sha256}\n" for package in packages)
    return hashlib.sha256(lines.encode()).hexdigest()


def as_requirements(manifest: Manifest) -> str:
    """The packages with their versions, as pip reads them."""
    versions: dict[str, Any] = {
        package.name: package.version
        for packages in manifest.sources.values()
        for package in packages
        if package.name != PYTHON
    }
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
