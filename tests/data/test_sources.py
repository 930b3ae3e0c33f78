"""Sources: which files of packages are read, and that nothing held out is among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nemotron_lite.data import load_corpus, read_manifest, sources
from nemotron_lite.data.corpus import Corpus, Document
from nemotron_lite.data.manifest import describe_sources
from nemotron_lite.data.sources import (
    DOCSTRINGS,
    DOCUMENTATION,
    LONGEST_FILE,
    PACKAGES,
    STANDARD_LIBRARY,
    FoundSources,
    read_sources,
)
from tests.data.packages import code, corpus_of, install, prose


def names(found: FoundSources, source: str) -> set[str]:
    return {document.name for document in found.documents(source)}


def test_every_source_is_read_with_version_licence_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = code(1) + f'\ndef documented():\n    """{prose(1)}"""\n'
    install(tmp_path, "alpha", {"alpha/a.py": module, "alpha/guide.md": prose(2)}, readme=prose(3))
    found = read_sources(corpus_of(3), ["alpha"])
    assert names(found, PACKAGES) == {"alpha/alpha/a.py"}
    assert names(found, DOCUMENTATION) == {"alpha/alpha/guide.md", "alpha/METADATA"}
    (docstrings,) = found.documents(DOCSTRINGS)
    assert docstrings.content.decode() == prose(1).strip() + "\n"
    assert len(found.documents(STANDARD_LIBRARY)) == 3
    (package,) = found.sources[PACKAGES]
    assert (package.name, package.version, package.licence) == ("alpha", "1.5", "MIT")
    content = hashlib.sha256(module.encode()).hexdigest()
    assert package.sha256() == hashlib.sha256(f"alpha/alpha/a.py\n{content}\n".encode()).hexdigest()
    assert not found.missing
    assert not found.near_copies


LEFT_OUT = {
    "beta/tests/a.py": code(10),
    "beta/_vendor/other/a.py": code(11),
    "beta/table.py": "TABLE = [" + "1, " * 500 + "]\n" + code(12),
    "beta/digits.py": "".join(f"{i}, 0x{i:08x}, 1234567890,\n" for i in range(200)),
    "beta/long.py": code(13, lines=LONGEST_FILE // 30),
    "beta/short.py": "x = 1\n",
    "beta/binary.py": code(14) + "\0",
    "beta/data.json": code(15),
    "beta/LICENSE.txt": prose(16),
    "beta/requirements-dev.txt": prose(17),
    "../outside.py": code(18),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_files_that_are_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "site"
    monkeypatch.syspath_prepend(place)
    install(place, "beta", {"beta/good.py": code(20), name: LEFT_OUT[name]})
    found = read_sources(corpus_of(2), ["beta", "not-there"])
    assert names(found, PACKAGES) == {"beta/beta/good.py"}
    assert names(found, DOCUMENTATION) <= {"beta/METADATA"}
    assert found.missing == ["not-there"]


def test_files_that_no_text_editor_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "gamma", {"gamma/good.py": code(1), "gamma/syntax.py": "def (\n" + code(2)})
    (tmp_path / "gamma" / "latin.py").write_bytes(code(3).encode() + b"# \xe9\n")
    record = tmp_path / "gamma-1.5.dist-info" / "RECORD"
    record.write_text(record.read_text() + "gamma/latin.py,,\ngamma/gone.py,,\n")
    found = read_sources(corpus_of(2), ["gamma"])
    assert names(found, PACKAGES) == {"gamma/gamma/good.py", "gamma/gamma/syntax.py"}
    record.unlink()
    assert not read_sources(corpus_of(2), ["gamma"]).documents(PACKAGES)


@pytest.mark.parametrize("known", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("source", [PACKAGES, DOCUMENTATION, STANDARD_LIBRARY])
def test_near_copies_of_held_out_files_are_left_out(
    known: float, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    held_out = code(99, lines=100)
    lines = [*held_out.splitlines()[: round(100 * known)], *code(98, lines=100).splitlines()]
    copy = "\n".join(lines[:100]) + "\n"
    library = corpus_of(2)
    files = {"delta/copy.py" if source == PACKAGES else "delta/copy.md": copy}
    if source == STANDARD_LIBRARY:
        files = {}
        library = Corpus((*library.train, Document("copy.py", copy.encode())), ())
    install(tmp_path, "delta", files)
    corpus = Corpus(library.train, (Document("secret.py", held_out.encode()),))
    found = read_sources(corpus, ["delta"])
    is_read = any(name.endswith(("copy.py", "copy.md")) for name in names(found, source))
    assert is_read == (known <= 0.2)
    assert [copy.share for copy in found.near_copies] == ([] if is_read else [known])


def test_duplicates_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    changed = code(1) + code(4, lines=20)
    install(tmp_path, "one", {"one/a.py": code(1), "one/b.py": code(1), "one/c.py": code(2)})
    library = code(1000) + "\n"
    install(tmp_path, "two", {"two/a.py": changed, "two/b.py": library, "two/d.py": code(3)})
    found = read_sources(corpus_of(1), ["one", "two"])  # of which the first file is code(1000)
    assert len(names(found, PACKAGES) & {"one/one/a.py", "one/one/b.py"}) == 1
    assert names(found, PACKAGES) >= {"one/one/c.py", "two/two/d.py"}
    assert len(names(found, PACKAGES)) == 3


def test_a_large_package_gives_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOURCE_LIMIT", 200_000)
    monkeypatch.syspath_prepend(tmp_path)
    files = {f"big/m{i}.py": f'"""{prose(i)}"""\n' + code(i, lines=400) for i in range(30)}
    install(tmp_path, "big", files)
    found = read_sources(corpus_of(1), ["big"])
    (package,) = found.sources[PACKAGES]
    assert 160_000 < package.num_bytes <= 200_000
    left = {f"big/{name}" for name in files} - names(found, PACKAGES)
    assert left <= names(found, DOCSTRINGS)  # docstrings of the others too
    again = read_sources(corpus_of(1), ["big"])
    assert [p.sha256() for p in again.sources[PACKAGES]] == [package.sha256()]


def test_the_committed_manifest_is_what_the_first_packages_give() -> None:
    """All packages take half a minute; the first ones are read in the same way."""
    manifest = read_manifest()
    corpus = load_corpus()
    first = manifest.packages[:14]
    here = describe_sources(
        read_sources(corpus, first), corpus, manifest.phases, manifest.tokenizer
    )
    compared = 0
    for source, packages in manifest.sources.items():
        found = {package.name: package for package in here.sources[source]}
        for package in packages:
            other = found.get(package.name)
            if other is not None and other.version == package.version:
                assert other == package
                compared += package.documents
    if dict(manifest.held_out) == dict(here.held_out):
        assert compared > 400  # the standard library is the same too
    else:
        assert corpus.held_out  # another Python: the texts of the packages alone are compared
    ours = {document.name for document in corpus.train}
    if here.sources[STANDARD_LIBRARY] == manifest.sources[STANDARD_LIBRARY]:
        assert not ours & set(manifest.held_out)
