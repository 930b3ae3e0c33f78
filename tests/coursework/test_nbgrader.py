"""nbgrader's own commands work on the folder of the coursework, as an instructor runs them."""

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
from tests.coursework.conftest import Fresh

CHAPTER = make.chapters()[0]
NAME = f"chapter_{CHAPTER}"


@pytest.mark.xdist_group("nbgrader")
def test_nbgrader_makes_grades_and_explains_an_assignment(fresh: Fresh, tmp_path: Path) -> None:
    shutil.copytree(fresh.root / "source" / NAME, tmp_path / "source" / NAME)
    shutil.copy(make.exercises_folder() / "nbgrader_config.py", tmp_path)
    programs = Path(sys.executable).parent
    root = make.CHECKOUT
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths,
        "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def nbgrader(*words: str) -> None:
        done = subprocess.run(
            [str(programs / "nbgrader"), *words], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    nbgrader("generate_assignment", NAME)
    made = (tmp_path / "release" / NAME / f"{NAME}.ipynb").read_text()
    assert (
        json.loads(made)["cells"]
        == json.loads(fresh.texts[f"release/{NAME}/{NAME}.ipynb"])["cells"]
    )
    for student, text in (("ann", fresh.texts[f"source/{NAME}/{NAME}.ipynb"]), ("bob", made)):
        path = tmp_path / "submitted" / student / NAME / f"{NAME}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    nbgrader("autograde", NAME)
    nbgrader("generate_feedback", NAME)
    nbgrader("export", "--to", "grades.csv")
    rows = [line.split(",") for line in (tmp_path / "grades.csv").read_text().splitlines()]
    score, most = rows[0].index("score"), rows[0].index("max_score")
    found = {
        row[rows[0].index("student_id")]: (float(row[score]), float(row[most])) for row in rows[1:]
    }
    points = sum(e.points for e in exercises.exercises(CHAPTER))
    assert found == {"ann": (points, points), "bob": (0, points)}
    page = (tmp_path / "feedback" / "ann" / NAME / f"{NAME}.html").read_text()
    assert exercises.exercises(CHAPTER)[0].title in page
