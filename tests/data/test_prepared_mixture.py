"""Manifests and the texts that they describe: the same here, or an error that says what differs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron_lite.data import (
    CHAT_TOKENS,
    Manifest,
    ManifestError,
    MixtureData,
    Phase,
    chat_ids,
    decode,
    load_corpus,
    open_mixture,
    prepared_mixture,
    read_manifest,
)
from nemotron_lite.data.make_manifest import PHASES, needed_packages
from nemotron_lite.data.manifest import (
    LITE,
    TokenizerSettings,
    as_requirements,
    compare,
    describe_sources,
)
from nemotron_lite.data.sources import DOCSTRINGS, PACKAGES, SOURCES, STANDARD_LIBRARY, read_sources
from nemotron_lite.input_files import FileError
from tests.data.packages import code, corpus_of, install, prose

SETTINGS = TokenizerSettings(vocab_size=300, special_tokens=CHAT_TOKENS, train_bytes=20_000)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two packages and a small standard library."""
    place = tmp_path / "site"
    monkeypatch.syspath_prepend(place)
    for i, name in enumerate(("alpha", "beta")):
        module = f'"""{prose(i)}"""\n' + code(i)
        install(place, name, {f"{name}/a.py": module}, readme=prose(10 + i))
    monkeypatch.setattr(prepared_mixture, "load_corpus", lambda: corpus_of(3))
    return place


@pytest.fixture
def manifest(site: Path) -> Manifest:
    corpus = corpus_of(3)
    found = read_sources(corpus, ["alpha", "beta"])
    return describe_sources(found, corpus, PHASES, SETTINGS)


def text_of(data: MixtureData, source: str) -> str:
    return decode(data.tokenizer, data.train.sources[source].tokens)


def test_a_mixture_holds_the_sources_and_is_kept(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.json"
    path.write_text(manifest.to_json())
    assert read_manifest(path) == manifest
    data = open_mixture(path, batches=10, cache=tmp_path / "c")
    corpus = corpus_of(3)
    assert text_of(data, STANDARD_LIBRARY) == "".join(d.content.decode() for d in corpus.train)
    assert set(data.train.sources) == set(SOURCES)
    assert prose(0).strip() in text_of(data, DOCSTRINGS)
    (held_out,) = data.held_out.documents
    assert decode(data.tokenizer, held_out).encode() == corpus.held_out[0].content
    assert data.held_out.num_bytes == len(corpus.held_out[0].content)
    assert data.tokenizer.get_vocab_size() == 300
    assert chat_ids(data.tokenizer)["start"] == 1
    assert data.manifest == manifest
    monkeypatch.setattr(prepared_mixture, "read_sources", None)  # not read again
    again = open_mixture(manifest, batches=10, cache=tmp_path / "c")
    assert again.fingerprint() == data.fingerprint()
    kind = dict(batch_size=3, seq_len=20, seed=1)
    assert torch.equal(again.batch(4, **kind).tokens, data.batch(4, **kind).tokens)
    assert open_mixture(manifest, batches=20, cache=tmp_path / "c").fingerprint() != (
        data.fingerprint()
    )
    only = (Phase("all", 0.0, {PACKAGES: 1.0}),)
    other = open_mixture(manifest, batches=10, phases=only, cache=tmp_path / "c")
    assert other.manifest.phases == only
    assert other.fingerprint() != data.fingerprint()


def test_another_vocabulary(manifest: Manifest, tmp_path: Path) -> None:
    data = open_mixture(manifest, batches=1, vocab_size=320, cache=tmp_path)
    assert data.tokenizer.get_vocab_size() == 320
    assert data.manifest.tokenizer == replace(SETTINGS, vocab_size=320)
    with pytest.raises(ValueError, match="vocab_size=271"):
        open_mixture(manifest, batches=1, vocab_size=271, cache=tmp_path)


def change_version(site: Path) -> None:
    (site / "beta-1.5.dist-info").rename(site / "gone")
    install(site, "beta", {"beta/a.py": (site / "beta/a.py").read_text()}, version="2.0")


def remove(site: Path) -> None:
    (site / "beta-1.5.dist-info").rename(site / "gone")


def edit(site: Path) -> None:
    (site / "beta/a.py").write_text(code(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"beta 1.5 is missing"),
        (change_version, r"beta 2.0 is installed, not 1.5"),
        (edit, r"beta 1.5 has other files"),
    ],
)
def test_another_machine_is_refused_or_noted(
    change, message: str, manifest: Manifest, site: Path, tmp_path: Path, caplog
) -> None:
    change(site)
    with pytest.raises(ManifestError, match=message + r".* Install the versions .* strict=False"):
        open_mixture(manifest, batches=1, cache=tmp_path / "c")
    with caplog.at_level(logging.WARNING):
        data = open_mixture(manifest, batches=1, strict=False, cache=tmp_path / "c")
    assert "differs from the manifest" in caplog.text
    assert data.manifest != manifest
    assert data.batch(0, batch_size=2, seq_len=8, seed=0).tokens.shape == (2, 8)
    caplog.clear()
    again = open_mixture(manifest, batches=1, strict=False, cache=tmp_path / "c")
    assert "differs from the manifest" in caplog.text  # said each time, from the cache too
    assert again.fingerprint() == data.fingerprint()


def test_other_held_out_files_are_a_difference(manifest: Manifest) -> None:
    other = replace(manifest, held_out={**manifest.held_out, "held.py": "0" * 64})
    assert compare(manifest, other) == ["the held-out files of the standard library are others"]
    assert compare(manifest, manifest) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("format"),
        lambda m: m.update(format=99),
        lambda m: m.update(sources=[]),
        lambda m: m["phases"].clear(),
        lambda m: m["phases"][0].update(start="0"),
        lambda m: m["phases"][0]["weights"].update(docstrings=9),
        lambda m: m["tokenizer"].pop("train_bytes"),
        lambda m: m["sources"][PACKAGES]["packages"][0].update(version="3"),
        lambda m: m["sources"][PACKAGES]["packages"][0].update(colour="red"),
        lambda m: m.update(held_out=3),
    ],
)
def test_damaged_manifests_are_refused(change, manifest: Manifest, tmp_path: Path) -> None:
    content = json.loads(manifest.to_json())
    change(content)
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"m.json is no manifest of a training text"):
        read_manifest(path)


def test_the_committed_manifest_names_what_the_project_installs() -> None:
    manifest = read_manifest()
    assert manifest.to_json() == LITE.read_text()
    assert set(manifest.sources) == set(SOURCES)
    assert all(p.licence != "" for packages in manifest.sources.values() for p in packages)
    assert "GPL" not in LITE.read_text()
    needed = set(needed_packages())
    assert {"torch", "numpy", "tokenizers", "jinja2"} <= set(manifest.packages) & needed
    sizes = {name: sum(p.bytes for p in found) for name, found in manifest.sources.items()}
    assert 60e6 < sum(sizes.values()) < 90e6
    largest = max(package.bytes for package in manifest.sources[PACKAGES])
    assert largest < 0.05 * sizes[PACKAGES]
    (python,) = manifest.sources[STANDARD_LIBRARY]
    corpus = load_corpus()
    if corpus.train_bytes and np.isclose(python.bytes, corpus.train_bytes, rtol=0.001):
        assert set(manifest.held_out) == {document.name for document in corpus.held_out}


def test_a_manifest_is_the_same_for_every_order_of_the_packages(site: Path) -> None:
    """Also where two packages have the same code, which is taken from one of them."""
    for seed, name in enumerate(("omega", "gamma"), 30):
        install(site, name, {f"{name}/a.py": code(7), f"{name}/b.py": code(seed)})
    corpus = corpus_of(3)
    names = ["omega", "beta", "gamma", "alpha", "beta"]
    texts = [
        describe_sources(read_sources(corpus, order), corpus, PHASES, SETTINGS).to_json()
        for order in (names, names[::-1], set(names))
    ]
    assert texts[0] == texts[1] == texts[2]
    packages = json.loads(texts[0])["sources"][PACKAGES]["packages"]
    assert [(p["name"], p["documents"]) for p in packages] == [
        ("alpha", 1), ("beta", 1), ("gamma", 2), ("omega", 1)
    ]  # fmt: skip


def test_needed_packages_are_those_of_all_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In alphabetical order, each once, under the names that package indexes use."""
    monkeypatch.syspath_prepend(tmp_path)
    needs = {
        "My_Project": ["zeta[fast]", "Alpha.Beta", "mine[all]; extra == 'lab'"],
        "zeta": ["not-there", "quick; extra == 'fast'", "slow; extra == 'other'"],
        "alpha_beta": ["zeta"], "mine": ["my-project[lab]"], "quick": [], "slow": [],
    }  # fmt: skip
    for name, requires in needs.items():
        install(tmp_path, name, {})
        lines = "".join(f"Requires-Dist: {text}\n" for text in requires)
        about = tmp_path / f"{name}-1.5.dist-info" / "METADATA"
        about.write_text(f"Metadata-Version: 2.4\nName: {name}\nProvides-Extra: lab\n{lines}")
    expected = ["alpha-beta", "mine", "quick", "zeta"]
    assert needed_packages("My_Project") == needed_packages("my-project") == expected


def test_the_command_lists_versions_for_pip(manifest: Manifest, tmp_path: Path) -> None:
    assert as_requirements(manifest) == "alpha==1.5\nbeta==1.5\n"
    path = tmp_path / "m.json"
    path.write_text(manifest.to_json())
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_lite.data.make_manifest", path, "--requirements"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alpha==1.5\nbeta==1.5\n"), done.stderr
    assert path.read_text() == manifest.to_json()
