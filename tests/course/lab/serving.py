"""Start the JupyterLab of `make lab` over a folder of the test, and ask it over HTTP.

The server has its own home folder, listens on this machine only, and does not check for news.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "only-for-this-test"
SETTINGS = {
    "apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    "notebook-extension/tracker": {"windowingMode": "none"},  # draw invisible cells too
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}  # fmt: skip
# The command of `make lab`, over another folder than the checkout.
COMMAND = """
import sys
from pathlib import Path
from nemotron_lite.course.lab.__main__ import main
sys.exit(main(sys.argv[2:], root=Path(sys.argv[1])))
"""


@dataclass(frozen=True)
class Server:
    """A running JupyterLab: its address, its process, and the folder of its kernels' files."""

    address: str
    process: subprocess.Popen[bytes]
    runtime: Path

    def ask(self, path: str, content: Any = None, method: str | None = None) -> Any:
        """The answer to a request, as JSON or as text."""
        request = urllib.request.Request(
            f"{self.address}/{path}",
            headers={"Authorization": f"token {TOKEN}"},
            data=None if content is None else json.dumps(content).encode(),
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
            kind = answer.headers.get("Content-Type", "")
        return json.loads(text) if kind.startswith("application/json") and text else text


@contextmanager
def serve(
    root: Path, home: Path, variables: Mapping[str, str | None] | None = None
) -> Iterator[Server]:
    """`make lab` for the chapters in `root/notebooks`, with the user's settings below `home`.

    Args:
        root: the folder of notebooks/ and work/.
        home: a new folder.
        variables: environment variables to set, or with None to remove.
    """
    for name, content in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    places = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME"]
    environment = {**os.environ, **{name: str(home / name.lower()) for name in places}}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(home / "workspaces")
    # The kernels, too, use this checkout and not another that may be installed.
    ours = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in ours if path)
    for name, value in (variables or {}).items():
        environment.pop(name, None)
        environment.update({} if value is None else {name: value})
    for name in places:
        Path(environment[name]).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    log_path = home / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(root), *options],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            server = Server(f"http://127.0.0.1:{port}", process, home / "jupyter_runtime_dir")
            _wait_for(server, log_path)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(server: Server, log: Path, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            server.ask("api")
        except (urllib.error.URLError, OSError):
            if server.process.poll() is not None:
                raise RuntimeError(f"JupyterLab ended:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"JupyterLab was not up after {seconds} s:\n{log.read_text()[-2000:]}")
