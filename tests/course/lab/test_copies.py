"""The files of work/: copied once, brought up to date, backed up, or left alone with a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nemotron_lite.course.lab import copies
from nemotron_lite.course.lab.__main__ import main, summary

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures go to a folder of the test, not to the one of the user."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter data"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with one chapter of three cells in notebooks/."""
    root = tmp_path / "a checkout"
    (root / "notebooks").mkdir(parents=True)
    chapter(root, "# Zero", "stub", "print(1)")
    return root


def chapter(root: Path, *sources: str, name: str = "00_zero.ipynb") -> None:
    """Write a chapter; its first cell is text, and the ids are a, b, c, …"""
    cells = [
        (new_code_cell if i else new_markdown_cell)(source, id="abcdefg"[i])
        for i, source in enumerate(sources)
    ]
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / name)


def update(root: Path) -> list[copies.Outcome]:
    return copies.update(root / "notebooks", root / "work")


def learner(root: Path, name: str = "00_zero.ipynb", **texts: str) -> None:
    """Change cells of the copy, by id."""
    path = root / "work" / name
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        cell["source"] = texts.get(cell["id"], cell["source"])
    path.write_text(json.dumps(notebook))


def sources(root: Path, name: str = "00_zero.ipynb") -> list[str]:
    return [c.source for c in nbformat.read(root / "work" / name, 4).cells]


def what(outcomes: list[copies.Outcome]) -> dict[str, str]:
    return {outcome.path.name: outcome.what for outcome in outcomes}


def files(root: Path) -> dict[str, bytes]:
    folder = root / "work"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_first_start_copies_chapters_and_the_progress_page(checkout: Path) -> None:
    chapter(checkout, "# Zero, deeper", name="00_zero_deeper.ipynb")
    done = update(checkout)
    assert what(done) == {
        "00_zero.ipynb": "copied", "00_zero_deeper.ipynb": "copied", "progress.ipynb": "copied",
    }  # fmt: skip
    assert sources(checkout) == ["# Zero", "stub", "print(1)"]
    page = nbformat.read(checkout / "work" / "progress.ipynb", 4)
    nbformat.validate(page)
    assert page.cells[1].source.endswith("progress_page()")
    assert summary(done) == "Copied 3 notebooks to work/."


def test_the_next_start_changes_nothing(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    before = files(checkout)
    done = update(checkout)
    assert set(what(done).values()) == {"current"}
    assert files(checkout) == before
    assert summary(done) == "The notebooks in work/ are up to date."


def test_a_new_version_comes_in_and_the_answer_stays(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    chapter(checkout, "# Zero, better", "stub", "print(2)", "more")
    done = update(checkout)
    assert what(done) == {"00_zero.ipynb": "updated", "progress.ipynb": "current"}
    assert sources(checkout) == ["# Zero, better", "answer", "print(2)", "more"]


def test_what_both_changed_is_counted_in_the_line(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    chapter(checkout, "# Zero", "new stub", "print(1)")
    line = summary(update(checkout))
    assert line.endswith(". 1 cell that you changed has a new version, folded below yours")
    assert sources(checkout)[1] == "answer"
    assert "new stub" in sources(checkout)[2]
    learner(checkout, c="answer too")
    chapter(checkout, "# Zero", "newest stub", "print(2)")
    assert "2 cells that you changed have a new version" in summary(update(checkout))


def test_the_copy_is_kept_before_an_update_changes_it(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    before = (checkout / "work" / "00_zero.ipynb").read_bytes()
    chapter(checkout, "# Zero", "stub", "print(2)")
    line = summary(update(checkout))
    (backup,) = (checkout / "work" / ".course" / "backups").iterdir()
    assert backup.read_bytes() == before
    assert str(backup.relative_to(checkout)) in line
    chapter(checkout, "# Zero", "stub", "print(3)")
    update(checkout)
    assert len(list(backup.parent.iterdir())) == 2


def test_an_untouched_copy_needs_no_backup(checkout: Path) -> None:
    update(checkout)
    chapter(checkout, "# Zero", "stub", "print(2)")
    assert summary(update(checkout)) == "00_zero.ipynb: updated"
    assert not (checkout / "work" / ".course" / "backups").exists()


def test_a_backup_that_is_put_back_is_merged_with_its_own_version(checkout: Path) -> None:
    """The copy names its base, so the order of versions does not matter."""
    update(checkout)
    learner(checkout, b="answer")
    chapter(checkout, "# Zero", "stub", "print(2)")
    update(checkout)
    (backup,) = (checkout / "work" / ".course" / "backups").iterdir()
    shutil.copy(backup, checkout / "work" / "00_zero.ipynb")
    assert what(update(checkout))["00_zero.ipynb"] == "updated"
    assert sources(checkout) == ["# Zero", "answer", "print(2)"]


def test_a_deleted_copy_comes_back_fresh(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    (checkout / "work" / "00_zero.ipynb").unlink()
    assert what(update(checkout))["00_zero.ipynb"] == "copied"
    assert sources(checkout) == ["# Zero", "stub", "print(1)"]


def test_without_its_base_nothing_of_the_learners_is_lost(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    shutil.rmtree(checkout / "work" / ".course")
    chapter(checkout, "# Zero, better", "stub", "print(1)")
    update(checkout)
    found = sources(checkout)
    assert found[0] == "# Zero"
    assert "# Zero, better" in found[1]
    assert found[2] == "answer"
    assert "stub" in found[3]


def test_a_damaged_base_counts_as_unknown(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    for base in (checkout / "work" / ".course" / "base").iterdir():
        base.write_text("{")
    chapter(checkout, "# Zero", "stub", "print(1)", "more")
    assert what(update(checkout))["00_zero.ipynb"] == "updated"
    assert [sources(checkout)[i] for i in (0, 1, -1)] == ["# Zero", "answer", "more"]


def without_ids(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        del cell["id"]


def one_id_twice(notebook: dict[str, Any]) -> None:
    notebook["cells"][1]["id"] = "a"


DAMAGE = {
    "not JSON": lambda notebook: None,
    "saved it in format 4.4": lambda notebook: notebook.update(nbformat_minor=4),
    "saved it in format 3": lambda notebook: notebook.update(nbformat=3),
    "'id' is a required property": without_ids,
    "two cells have the id 'a'": one_id_twice,
    "no cells": lambda notebook: notebook.pop("cells"),
    "'source' is a required property": lambda notebook: notebook["cells"][1].pop("source"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_file_that_cannot_be_merged_is_left_alone(checkout: Path, reason: str) -> None:
    update(checkout)
    path = checkout / "work" / "00_zero.ipynb"
    notebook = json.loads(path.read_text())
    DAMAGE[reason](notebook)
    path.write_text("<<<<<<< HEAD" if reason == "not JSON" else json.dumps(notebook))
    chapter(checkout, "# Zero", "stub", "print(2)")
    before = path.read_bytes()
    done = update(checkout)
    assert what(done) == {"00_zero.ipynb": "left alone", "progress.ipynb": "current"}
    assert path.read_bytes() == before
    line = summary(done)
    assert line.startswith("00_zero.ipynb: left as it is, because ")
    assert reason in line
    assert line.endswith(copies.HOW_TO_RESTART)


def wrong_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"stub", b"mine \xff"))


def half_a_character(path: Path) -> None:
    path.write_text(path.read_text().replace("stub", "mine \\ud800"))


def too_deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def many_digits(path: Path) -> None:
    path.write_text('{"cells": [], "metadata": {}, "nbformat": ' + "9" * 5000 + "}")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**27)


def a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.ipynb")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_bytes, "not a text file in UTF-8"),
        (half_a_character, "cannot be written as UTF-8"),
        (too_deep, "nested deeper than 64 levels"),
        (many_digits, "a number of 5,000 digits"),
        (a_folder, "it is a folder"),
        (a_pipe, "it is a named pipe"),
        (a_sparse_file, "has 134,217,728 bytes"),
        (a_link_to_nowhere, "it is a link to a file that is not there"),
        (a_link_to_itself, "it cannot be opened"),
    ],
)
def test_a_copy_that_cannot_be_read_does_not_keep_the_others_from_it(
    checkout: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    chapter(checkout, "# One", name="01_one.ipynb")
    update(checkout)
    path = checkout / "work" / "00_zero.ipynb"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    chapter(checkout, "# Zero", "stub", "print(2)")
    chapter(checkout, "# One, mended", name="01_one.ipynb")
    done = update(checkout)
    assert what(done)["00_zero.ipynb"] == "left alone"
    assert what(done)["01_one.ipynb"] == "updated"
    assert reason in summary(done)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_a_chapter_that_left_the_course_is_named_and_stays(checkout: Path) -> None:
    chapter(checkout, "# One", name="01_one.ipynb")
    update(checkout)
    (checkout / "work" / "02_mine.ipynb").write_text("{}")
    (checkout / "notebooks" / "01_one.ipynb").unlink()
    done = update(checkout)
    assert summary(done) == "01_one.ipynb: no longer a chapter of the course; your copy stays"
    assert sources(checkout, "01_one.ipynb") == ["# One"]


@pytest.mark.parametrize("writes", range(1, 4))
def test_an_interrupted_update_is_repeated_safely(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """It writes the base, the backup and the copy; it is interrupted before each of them."""
    update(checkout)
    learner(checkout, b="answer")
    chapter(checkout, "# Zero", "new stub", "print(2)")
    real, done = copies._write, []

    def write(path: Path, text: str) -> None:
        done.append(path)
        if len(done) == writes:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(copies, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        update(checkout)
    monkeypatch.setattr(copies, "_write", real)
    assert len(done) == writes
    assert sources(checkout) == ["# Zero", "answer", "print(1)"]
    update(checkout)
    found = sources(checkout)
    assert [found[0], found[1], found[3]] == ["# Zero", "answer", "print(2)"]
    assert "new stub" in found[2]
    assert len(found) == 4


def test_two_starts_at_once_update_one_after_the_other(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="answer")
    chapter(checkout, "# Zero", "stub", "print(2)")
    found: list[dict[str, str]] = []
    threads = [threading.Thread(target=lambda: found.append(what(update(checkout)))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(f["00_zero.ipynb"] for f in found) == ["current", "updated"]
    assert sources(checkout) == ["# Zero", "answer", "print(2)"]


def trusted(root: Path) -> bool:
    notebook = nbformat.read(root / "work" / "00_zero.ipynb", 4)
    return bool(NotebookNotary().check_signature(notebook))


def test_a_fresh_copy_is_trusted_and_stays_so(checkout: Path) -> None:
    update(checkout)
    assert trusted(checkout)
    chapter(checkout, "# Zero", "stub", "print(2)")
    update(checkout)
    assert trusted(checkout)


def test_a_copy_from_somebody_else_is_not_trusted_by_an_update(checkout: Path) -> None:
    update(checkout)
    learner(checkout, b="somebody's answer")
    assert not trusted(checkout)
    chapter(checkout, "# Zero", "stub", "print(2)")
    update(checkout)
    assert sources(checkout)[2] == "print(2)"
    assert not trusted(checkout)


def test_a_folder_without_chapters_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(copies.CopyError, match="needs a checkout of the repository"):
        copies.update(tmp_path, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_work_that_cannot_be_written_is_an_error_in_words(checkout: Path, capsys: Any) -> None:
    (checkout / "work").write_text("a file")
    assert main(["--update-only"], root=checkout) == 2
    assert "cannot be copied" in capsys.readouterr().err


def test_update_only_takes_no_arguments_for_jupyter(checkout: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--update-only", "--port", "8899"], root=checkout)
    assert "--update-only starts no JupyterLab" in capsys.readouterr().err
    assert not (checkout / "work").exists()


def test_the_command_copies_every_chapter_and_git_ignores_them(tmp_path: Path) -> None:
    """The real chapters, in a copy of the repository's folder of notebooks."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert main(["--update-only"], root=tmp_path) == 0
    names = {path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert {path.name for path in (tmp_path / "work").glob("[0-9]*.ipynb")} == names
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    status = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "notebooks/" in status.stdout
    assert "work/" not in status.stdout


def test_the_command_starts_without_importing_torch() -> None:
    program = (
        "import sys; sys.argv = ['lab', '--help']\n"
        "import nemotron_lite.course.lab.__main__ as lab, nemotron_lite.course.lab.copies\n"
        "import nemotron_lite.course.lab.server\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
