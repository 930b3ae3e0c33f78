"""The part of the coursework that imports nbgrader: it makes release/ from source/.

    python nbgrader_worker.py < job.json       {"root": folder, "assignments": ["chapter_01"]}

It runs in a process of its own, because nbgrader takes seconds to import and changes the settings
of the process. `make grade` does not use nbgrader.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any


def course_config(root: Path) -> Any:
    """nbgrader's settings for the course in the folder `root`."""
    from traitlets.config import Config

    from nemotron_lite.coursework.nbgrader_settings import apply

    config = Config()
    apply(config)
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.db_url = f"sqlite:///{root / 'gradebook.db'}"
    return config


def release(job: dict[str, Any]) -> None:
    """Make release/ and the gradebook of the assignments named in the job."""
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory

    config = course_config(Path(job["root"]))
    for assignment in job["assignments"]:
        place = CourseDirectory(config=config, assignment_id=assignment)
        GenerateAssignment(coursedir=place, config=config).start()


def main() -> int:
    """Read a job from stdin and do it."""
    # nbgrader runs alembic by name, which PATH may lack if the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # jsonschema builds this grammar of web addresses at import, which takes longer than making an
    # assignment, and nothing here checks an address. None in sys.modules makes the import fail.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    release(json.load(sys.stdin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
