"""Grading works on each supported Python that is here, and imports little that could break on one.

On Debian 12's Python 3.11.2 a package that nothing of the course asked for could not compile its
patterns, and everybody got zero points. Grading has since imported neither that package nor those
that bring it along (jsonschema, through nbformat and nbgrader).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_lite.course import exercises
from nemotron_lite.coursework import make

ROOT = Path(__file__).resolve().parents[2]
SAME = f"python{sys.version_info.major}.{sys.version_info.minor}"
# What the grading process may import besides the standard library and this package.
ALLOWED = {"bleach", "jaxtyping", "latex2mathml", "mistune", "numpy", "psutil", "pygments", "torch",
           "torchgen", "tqdm", "typing_extensions", "webencodings", "wadler_lindig"}  # fmt: skip
GRAPH = """
import sys
before = set(sys.modules)
from nemotron_lite.coursework import feedback, grade
feedback.markdown("*a* $x$ `b`"), feedback.harmless("<b>x</b>"), feedback._code("x = 1")
found = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(found - set(sys.stdlib_module_names) - {"nemotron_lite", "__mp_main__"}))
"""


def other_pythons() -> list[Path]:
    """Interpreters of this minor version with another patch: they can use the same packages."""
    found: dict[str, Path] = {}
    for folder in os.environ["PATH"].split(os.pathsep):
        path = Path(folder, SAME)
        if path.is_file() and os.access(path, os.X_OK) and "shims" not in folder:
            ask = [str(path), "-c", "import platform; print(platform.python_version())"]
            version = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
            if version.strip() not in ("", sys.version.split()[0]):
                found.setdefault(version.strip(), path)
    return list(found.values())


def test_the_grading_process_imports_few_packages() -> None:
    run = subprocess.run(
        [sys.executable, "-c", GRAPH], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert set(run.stdout.split()) <= ALLOWED


@pytest.mark.parametrize("python", other_pythons() or [None], ids=str)
def test_the_packages_own_answers_earn_all_points_on_another_python(
    python: Path | None, tmp_path: Path
) -> None:
    if python is None:
        pytest.skip(f"there is no other {SAME} here")
    home = tmp_path / "environment"
    made = subprocess.run([str(python), "-m", "venv", "--without-pip", str(home)], check=False)
    if made.returncode:
        pytest.skip(f"{python} has no venv")
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (home / "lib" / SAME / "site-packages" / "all.pth").write_text(packages)
    chapter = make.chapters()[0]
    (tmp_path / "handed in").mkdir()
    book = make.source_notebook(chapter, exercises.exercises(chapter))
    (tmp_path / "handed in" / "ann.ipynb").write_text(json.dumps(book))
    run = subprocess.run(
        [str(home / "bin" / "python"), "-m", "nemotron_lite.coursework.grade",
         str(tmp_path / "handed in"), "--out", str(tmp_path / "out"), "--jobs", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (one,) = json.loads((tmp_path / "out" / "scores.json").read_text())["submissions"]
    assert (one["points"], one["optional_points"]) == (
        one["max_points"], one["max_optional_points"],
    ), one["message"]  # fmt: skip
    shutil.rmtree(home)
