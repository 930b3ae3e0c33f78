"""tests/slow.txt names tests that exist, and leaves fast tests of every package to `make check`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def project_conftest() -> ModuleType:
    """The conftest.py of the project, which no package contains."""
    spec = importlib.util.spec_from_file_location("project_conftest", ROOT / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFTEST = project_conftest()
LISTED = CONFTEST.slow_tests(CONFTEST.SLOW.read_text())


def exists(line: str, root: Path) -> bool:
    """Whether a line of the list names a folder, a file, or a test in a file."""
    path, _, name = line.partition("::")
    if line.endswith("/"):
        return (root / path).is_dir()
    if not (root / path).is_file():
        return False
    return not name or re.search(rf"^def {re.escape(name)}\(", (root / path).read_text(), re.M)


@pytest.mark.parametrize("line", LISTED)
def test_each_line_names_a_test(line: str) -> None:
    assert exists(line, ROOT), f"{line}: correct or remove this line of tests/slow.txt"


FOLDERS = [
    path.name
    for path in sorted((ROOT / "tests").iterdir())
    if path.is_dir()
    and any(path.rglob("test_*.py"))
    and path.name not in ("browser", "notebooks", "cuda")
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_check_runs_something_of_each_folder(folder: str) -> None:
    files = (ROOT / "tests" / folder).rglob("test_*.py")
    ids = [
        f"{path.relative_to(ROOT).as_posix()}::{name}"
        for path in files
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    ]
    assert any(not CONFTEST.is_slow(test, LISTED) for test in ids)


@pytest.mark.parametrize(
    ("test", "slow"),
    [
        ("tests/a/test_x.py::test_one", True),
        ("tests/b/test_y.py::test_one[3]", True),
        ("tests/b/test_z.py::test_one[3]", True),
        ("tests/b/test_z.py::test_one_more", False),
        ("tests/b/test_yy.py::test_one", False),
    ],
)
def test_what_a_line_means(test: str, slow: bool) -> None:
    text = "# why\n\ntests/a/\ntests/b/test_y.py\n  tests/b/test_z.py::test_one\n"
    assert CONFTEST.is_slow(test, CONFTEST.slow_tests(text)) is slow


def test_a_line_that_names_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_one(): ...\n")
    lines = ("test_x.py", "test_x.py::test_one", "test_x.py::test_two", "test_y.py", "gone/")
    assert [line for line in lines if not exists(line, tmp_path)] == list(lines[2:])
