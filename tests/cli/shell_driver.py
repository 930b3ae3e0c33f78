"""Runs commands as programs under odd conditions, many in one process: `python shell_driver.py`.

Starting Python and torch takes seconds, and there are many cases. So this program imports both
once and forks for each case. The child arranges standard input, output and errors as a shell would
have done it, makes Python's streams for them, and calls the application. It then really ends, so
that what the interpreter does at its end is seen too.

Standard input has the list of cases as JSON; the results are printed as JSON. No model is loaded:
`stream` is replaced by one that writes the pieces of the case.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import signal
import sys
import tempfile
import time
import tty
import types
from typing import Any

CASES = json.load(sys.stdin)


def arrange(case: dict[str, Any], files: list[int]) -> None:
    """Replace the file descriptors 0, 1 and 2, and Python's streams for them."""
    sys.stdout.flush()
    stdin = os.open(os.devnull, os.O_RDONLY)
    if "stdin" in case:
        reader, writer = os.pipe()
        os.write(writer, base64.b64decode(case["stdin"]))
        os.close(writer)
        stdin = reader
    os.dup2(stdin, 0)
    for number in (1, 2):
        kind = case.get("stdout" if number == 1 else "stderr", "file")
        if kind == "gone":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)
            os.close(writer)
        elif kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        else:  # a file or a terminal
            os.dup2(files[number - 1], number)
    os.closerange(3, 64)
    for number in case.get("closed", ()):
        os.close(number)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            stream = None
        else:
            raw = open(number, mode + "b", closefd=False)  # noqa: SIM115
            errors = "backslashreplace" if number == 2 else case.get("errors", "strict")
            stream = io.TextIOWrapper(
                raw,
                encoding=case.get("encoding", "utf-8"),
                errors=errors,
                line_buffering=os.isatty(number) or number == 2,
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def replace_model(case: dict[str, Any]) -> None:
    """A model that writes the given pieces, and then does what the case says."""

    class Stream:
        statistics = "statistics"

        def __iter__(self) -> Any:
            yield from case.get("pieces", ["an", "swer"])
            if case.get("signal"):
                os.kill(os.getpid(), getattr(signal, case["signal"]))
                time.sleep(5)
            if case.get("raises"):
                module, _, name = case["raises"].rpartition(".")
                raise getattr(sys.modules[module], name)("first line\nsecond line")
            if case.get("warns"):
                import logging
                import warnings

                logging.getLogger("nemotron_lite.data").warning("logged %s", "[bold]")
                warnings.warn_explicit("warned", UserWarning, "/x/nemotron_lite/y.py", 3)

    import nemotron_lite.cli.generate as command
    from nemotron_lite.generation.options import GenerationOptions

    fake = types.ModuleType("nemotron_lite.generation.generate")
    fake.stream = lambda *_, **__: Stream()  # type: ignore[attr-defined]
    sys.modules[fake.__name__] = fake
    answer = types.SimpleNamespace(
        text="".join(case.get("pieces", ["answer"])), tokens=[1, 2], stop_reason="length"
    )
    fake.generate = lambda *_, num_samples, **__: [answer] * num_samples  # type: ignore[attr-defined]
    defaults = types.ModuleType("nemotron_lite.generation.defaults")
    defaults.default_options = lambda *_: GenerationOptions()  # type: ignore[attr-defined]
    sys.modules[defaults.__name__] = defaults
    if not needs_torch(case):
        sys.modules["torch"] = types.ModuleType("torch")

    def read_model(path: Any, *_: Any, **__: Any) -> Any:
        if case.get("missing"):
            raise ValueError(f"{path} is missing")

    command.read_model = read_model


def finish(child: int, files: dict[str, int]) -> dict[str, Any]:
    """Wait for a child; what it wrote to each of its outputs, and how it ended."""
    started, status, found = time.monotonic(), None, {}
    for name, file in files.items():
        if os.isatty(file):
            found[name] = b"".join(iter(lambda file=file: read_terminal(file), b""))
    while status is None:
        ended, now = os.waitpid(child, os.WNOHANG)
        status = now if ended else None
        if time.monotonic() - started > 60:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    for name, file in files.items():
        if name not in found:
            found[name] = os.pread(file, 1 << 20, 0)
        os.close(file)
    texts = {name: base64.b64encode(content).decode() for name, content in found.items()}
    return {"code": os.waitstatus_to_exitcode(status), **texts}


def read_terminal(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:  # the child has closed its end
        return b""


import typer.rich_utils  # noqa: E402, F401, so that no child has to import it

import nemotron_lite.cli  # noqa: E402


def needs_torch(case: dict[str, Any]) -> bool:
    return "info" in case["args"]


results: dict[str, Any] = {}
# A process that has imported torch takes long to end, so the cases that need it come last.
for case in sorted(CASES, key=needs_torch):
    if needs_torch(case):
        import nemotron_lite.cli.tables  # noqa: F401
    ours, theirs = {}, {}
    for name in ("stdout", "stderr"):
        if case.get(name) == "terminal":
            ours[name], theirs[name] = pty.openpty()
            tty.setraw(theirs[name])  # line feeds come out as they went in
        else:
            theirs[name] = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_APPEND)
            ours[name] = os.dup(theirs[name])
    child = os.fork()
    if child == 0:
        break
    for file in theirs.values():
        os.close(file)
    results[case["name"]] = finish(child, ours)
else:
    sys.stdout.write(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)

for name, value in case.get("env", {}).items():
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
if case.get("no_folder"):
    os.chdir(tempfile.mkdtemp())
    os.rmdir(os.getcwd())
if case.get("new_process"):  # for what is read when modules are imported
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(theirs[name], number)
    os.execv(sys.executable, [sys.executable, "-m", "nemotron_lite", *case["args"]])
arrange(case, [theirs["stdout"], theirs["stderr"]])
replace_model(case)
sys.argv = ["nemotron-lite"]
from nemotron_lite.cli import app  # noqa: E402

app(case["args"], prog_name="nemotron-lite")
