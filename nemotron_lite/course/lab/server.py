"""JupyterLab as a learner needs it: its settings, and what it saves.

**Settings** are files in a folder of ours, which JUPYTER_CONFIG_PATH names. Jupyter reads them
beside the user's own files, which are not changed: a Jupyter started in another way is as before.

- nbgrader is for instructors. It is installed with the tests, and would put a menu and a button
  "Validate" into each notebook; here its parts for the server and for the page are off.
- `style/custom.css` of the course lets figures follow the theme, light or dark. JupyterLab reads
  only one such file, so a user's own `custom.css` is not used in this server.

**What is saved.** A widget lives in its kernel. A saved notebook holds a link to it, and JupyterLab
shows "Error displaying widget: model not found" when that notebook is opened again, although the
figure or the text stands in the same output. So the link is removed as a notebook is saved, and so
is the state of the widgets. The page that is open keeps its live widgets; the file holds the figure
or the text, which is shown when it is reopened.

This works in the server that `make lab` starts. A `jupyter lab` started by hand knows none of it:
widgets of a saved chapter show that error until their cells run again. Hooking into each Jupyter of
the environment would change how a user's other notebooks are saved.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_lite.course import output
from nemotron_lite.course.display import WIDGET
from nemotron_lite.course.progress_store import FOLDER
from nemotron_lite.files import atomic_file

STYLES = Path(__file__).parents[1] / "style"  # holds custom.css
NBGRADER_SERVER_PARTS = ("formgrader", "validate_assignment", "assignment_list", "course_list")
NBGRADER_PAGE_PART = "@jupyter/nbgrader"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"  # in metadata.widgets


def start(root: Path, work: Path, arguments: Sequence[str] = ()) -> None:
    """Run JupyterLab until it is stopped.

    Args:
        root: its root folder, the checkout: the links of the chapters leave `work`.
        work: the folder that it opens, inside `root`.
        arguments: for JupyterLab; they win over ours.
    """
    main = output.import_lab("jupyterlab.labapp").main
    settings = work / FOLDER / "jupyter"
    write_settings(settings)
    prepare_environment(os.environ, settings)
    # JupyterLab quotes this in messages about its use.
    sys.argv[0] = "jupyter-lab"
    main([*options(root, work), *arguments])


def options(root: Path, work: Path) -> list[str]:
    """The command line of JupyterLab; of two values for one option, the later counts."""
    return [
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{work.relative_to(root).as_posix()}",
        "--LabApp.custom_css=True",
    ]


def prepare_environment(environment: MutableMapping[str, str], settings: Path) -> None:
    """Set what the server and the kernels it starts inherit; a value of the user stays."""
    paths = [str(settings), environment.get("JUPYTER_CONFIG_PATH", "")]
    environment["JUPYTER_CONFIG_PATH"] = os.pathsep.join(path for path in paths if path)


def write_settings(folder: Path) -> None:
    """Write Jupyter's settings for a learner: our extension is on, nbgrader's are off."""
    ours = {__name__: True}
    theirs = {f"nbgrader.server_extensions.{part}": False for part in NBGRADER_SERVER_PARTS}
    server = {"ServerApp": {"jpserver_extensions": {**ours, **theirs}}}
    page = {"disabledExtensions": {NBGRADER_PAGE_PART: True}}
    _write_json(folder / "jupyter_server_config.json", server)
    _write_json(folder / "labconfig" / "page_config.json", page)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    """Jupyter asks an extension under which name it is loaded."""
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Called by Jupyter when the server starts: the save hook, and the folder of custom.css."""
    server.contents_manager.register_pre_save_hook(without_widgets)
    server.web_app.settings["static_custom_path"].insert(0, str(STYLES))


def without_widgets(model: dict[str, Any], **_: Any) -> None:
    """Before a notebook is saved, remove what only a running kernel can show.

    Args:
        model: Jupyter's description of the file; its content is changed in place. The page that is
            open has its own copy.
    """
    content = model.get("content")
    if model.get("type") != "notebook" or not isinstance(content, dict):
        return
    content.get("metadata", {}).pop("widgets", None)
    for cell in content.get("cells", ()):
        if "outputs" in cell:
            cell["outputs"] = [kept for kept in map(_without_link, cell["outputs"]) if kept]


def _without_link(output: dict[str, Any]) -> dict[str, Any] | None:
    """The output without its link to a widget; None if nothing else was in it."""
    data = output.get("data")
    if not isinstance(data, dict) or WIDGET not in data:
        return output
    rest = {kind: value for kind, value in data.items() if kind != WIDGET}
    return {**output, "data": rest} if rest else None
