r"""How the commands behave in a shell: pipes, locales, terminals, signals, and one line an error.

All cases run in one subprocess, which forks for each (`shell_driver.py`). A case is an entry of
`CASES`; what it must give stands beside it. Control characters are written as escapes here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nemotron_lite import __version__
from nemotron_lite.cli.terminal import visible

ROOT = Path(__file__).resolve().parents[2]
ODD = "[bold]x[/] :bug: \\[y] \x1b[31mred\x1b[0m\r\n\x07é漢🙂 " + "long " * 60
SPEED = r"[\d,.]+ tokens/s\n"


class Case(NamedTuple):
    """Arguments and conditions of a command, and what it must write: a text or a pattern."""

    args: list[str]
    code: int = 0
    stdout: str | re.Pattern[str] = ""
    stderr: str | re.Pattern[str] = ""
    more: dict[str, Any] = {}  # noqa: RUF012, never changed


def generate(prompt: str = "x", *more: str) -> list[str]:
    return ["generate", "--model", "m", "--prompt", prompt, *more]


def raw(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


ANY = raw(".*")
NOTHING = ""
ANSWER = "xanswer\n"
C_LOCALE = {"LC_ALL": "C", "PYTHONIOENCODING": None}

CASES = {
    # The version, the help and wrong usage.
    "version": Case(["--version"], 0, f"nemotron-lite {__version__}\n"),
    "help": Case(["--help"], 0, raw(".*Usage: nemotron-lite.*quantize.*")),
    "no arguments": Case([], 2, raw(".*Usage: nemotron-lite.*")),
    "no such command": Case(
        ["geneate"], 2, "", raw("Error: No such command 'geneate'.*'generate'.*\n")
    ),
    "no such option": Case(
        ["info", "--[bold]"], 2, "", raw(r"Error: No such option: --\[bold\][^\n]*\n")
    ),
    "wrong value": Case(
        generate("x", "--seed", ":bug:"), 2, "", raw("Error: [^\n]*--seed[^\n]*\n")
    ),
    "no prompt": Case(
        ["generate", "--model", "m"], 2, "", raw("Error: [^\n]*--prompt-file[^\n]*\n")
    ),
    "two prompts": Case(generate("x", "--prompt-file", "y"), 2, "", raw("Error: [^\n]*\n")),
    # Prompts and answers as they are.
    "plain": Case(generate(), 0, ANSWER, raw(SPEED)),
    "odd prompt and answer": Case(
        generate(ODD), 0, ODD + ODD + "\n", raw(SPEED), {"pieces": list(ODD)}
    ),
    "quiet": Case(generate("x", "--quiet"), 0, ANSWER),
    "quiet before": Case(["-q", *generate()], 0, ANSWER),
    "json": Case(
        generate(ODD, "--json"), 0, raw(r'\{"prompt": ".*\\ud83d\\ude42.*"tokens_per_second".*\}\n')
    ),
    "samples": Case(
        generate("x", "--samples", "2"),
        0,
        raw(r"\n1\. Sample\nxanswer\n\n2\. Sample\nxanswer\n"),
        raw(SPEED),
    ),
    "samples as JSON": Case(
        generate("x", "--samples", "2", "--json"),
        0,
        raw(
            r'(\{"prompt": "x", "text": "answer", "tokens": 2, "stop_reason": "length",[^\n]*\}\n){2}'
        ),
    ),
    "no samples": Case(generate("x", "--samples", "0"), 1, "", raw("Error: --samples 0[^\n]*\n")),
    "wrong temperature": Case(
        generate("x", "--temperature", "-1"), 1, "", raw("Error: temperature=-1[^\n]*\n")
    ),
    "standard input": Case(generate("-", "-q"), 0, ODD + "\nanswer\n", "", {"stdin": ODD + "\n"}),
    "empty standard input": Case(generate("-", "-q"), 0, "answer\n", "", {"stdin": ""}),
    "input that is not UTF-8": Case(
        generate("-"),
        1,
        "",
        "Error: --prompt -: the input is not UTF-8 (byte 2).\n",
        {"stdin": b"ab\xff"},
    ),
    "input is closed": Case(
        generate("-"), 1, "", "Error: --prompt -: standard input is closed.\n", {"closed": [0]}
    ),
    "prompt that is not UTF-8": Case(
        generate("caf\udce9"), 2, "", raw(r"Error: [^\n]*UTF-8 \(position 3\)[^\n]*\n")
    ),
    # Names in errors.
    "odd name in an error": Case(
        ["generate", "--model", "/no/caf\udce9[bold]:bug:", "--prompt", "x"],
        1,
        "",
        "Error: /no/caf\udce9[bold]:bug: is missing\n",
        {"missing": True},
    ),
    # A terminal shows control characters, and styles where they are wanted.
    "terminal": Case(
        generate("a\x1b]0;title\x07b\tc\nd\x9be\r", "-q"),
        0,
        r"a\x1b]0;title\x07b"
        "\tc\nd"
        r"\x9be\x0d"
        r"\x1b[2Jé"
        "\n",
        "",
        {"stdout": "terminal", "pieces": ["\x1b[2J", "é"], "env": {"NO_COLOR": "1"}},
    ),
    "styles": Case(generate("x", "-q"), 0, "\x1b[2mx\x1b[0manswer\n", "", {"stdout": "terminal"}),
    "a dumb terminal": Case(
        generate("x", "-q"), 0, ANSWER, "", {"stdout": "terminal", "env": {"TERM": "dumb"}}
    ),
    "error on a terminal": Case(
        ["generate", "--model", "a\x1bb\udce9", "--prompt", "x"],
        1,
        "",
        "\x1b[1;31mError: a\\x1bb\\xe9 is missing\n\x1b[0m",
        {"missing": True, "stderr": "terminal"},
    ),
    # Locales.
    "C locale": Case(
        generate("é", "-q"),
        0,
        "éé漢\n",
        "",
        {"encoding": "ascii", "env": C_LOCALE, "pieces": ["é漢"]},
    ),
    "C locale, bytes": Case(
        generate("\udcc3\udca9", "-q"), 0, "éanswer\n", "", {"encoding": "ascii", "env": C_LOCALE}
    ),
    "ASCII on request": Case(
        generate("é", "-q"),
        0,
        r"\xe9\u6f22\U0001f642" "\n",
        "",
        {"encoding": "ascii", "env": {"PYTHONIOENCODING": "ascii"}, "pieces": ["漢🙂"]},
    ),
    "Latin 1": Case(
        generate("é", "-q"),
        0,
        "\udce9\udce9\\u6f22\n",
        "",
        {"encoding": "latin-1", "pieces": ["é漢"]},
    ),
    "tables in ASCII": Case(
        ["info", "tiny-super"],
        0,
        re.compile("[ -~\n]+[+]--[ -~\n]+"),
        "",
        {"encoding": "ascii", "env": {"PYTHONIOENCODING": "ascii"}},
    ),
    # Closed pipes and full disks.
    "the reader has gone": Case(generate(), 141, "", "", {"stdout": "gone"}),
    "the reader of a table has gone": Case(["info", "super"], 141, "", "", {"stdout": "gone"}),
    "the reader of the help has gone": Case(["--help"], 1, "", "", {"stdout": "gone"}),
    "the reader of notes has gone": Case(generate(), 0, ANSWER, "", {"stderr": "gone"}),
    "the reader of an error has gone": Case(
        generate(), 1, "", "", {"stderr": "gone", "missing": True}
    ),
    "both readers have gone": Case(generate(), 141, "", "", {"stdout": "gone", "stderr": "gone"}),
    "a full disk": Case(generate(), 1, "", "Error: No space left on device\n", {"stdout": "full"}),
    "a full disk for a table": Case(
        ["info", "super"], 1, "", "Error: No space left on device\n", {"stdout": "full"}
    ),
    "a full disk for notes": Case(generate(), 0, ANSWER, "", {"stderr": "full"}),
    "stdout is closed": Case(generate(), 0, "", raw(SPEED), {"closed": [1]}),
    "stderr is closed": Case(generate(), 0, ANSWER, "", {"closed": [2]}),
    "an error, and stderr is closed": Case(generate(), 1, "", "", {"closed": [2], "missing": True}),
    "all are closed": Case(generate(), 0, "", "", {"closed": [0, 1, 2]}),
    # Widths.
    "one column": Case(
        ["info", "tiny-super"],
        0,
        raw(".*Parameters.*routed experts.*"),
        "",
        {"env": {"COLUMNS": "1"}, "new_process": True},
    ),
    "no number of columns": Case(["--help"], 0, raw(".*Usage.*"), "", {"env": {"COLUMNS": "many"}}),
    "help in one column": Case(
        ["--help"],
        0,
        raw(".*Usage: python -m nemotron_lite.*"),
        "",
        {"env": {"COLUMNS": "1"}, "new_process": True},
    ),
    # Places.
    "no home": Case(generate("x", "-q"), 0, ANSWER, "", {"env": {"HOME": None}}),
    "no such home": Case(generate("x", "-q"), 0, ANSWER, "", {"env": {"HOME": "/nowhere/home"}}),
    "the folder was deleted": Case(
        generate(),
        1,
        "",
        "Error: the current folder no longer exists: go to another one (cd).\n",
        {"no_folder": True},
    ),
    "version in a deleted folder": Case(
        ["--version"], 0, f"nemotron-lite {__version__}\n", "", {"no_folder": True}
    ),
    # Interruptions, errors and notes.
    "Ctrl-C": Case(generate(), 130, "xanswer", "Interrupted.\n", {"signal": "SIGINT"}),
    "a bug": Case(
        generate(),
        1,
        "xanswer",
        raw(r"Error: KeyError: 'first line\\nsecond line' \(a fault of nemotron_lite, in [^\n]*\n"),
        {"raises": "builtins.KeyError"},
    ),
    "memory": Case(
        generate(),
        1,
        "xanswer",
        "Error: the memory does not suffice (first line).\n",
        {"raises": "builtins.MemoryError"},
    ),
    "notes": Case(
        generate(),
        0,
        ANSWER,
        raw(r"Note: logged \[bold\]\nNote: warned\n" + SPEED),
        {"warns": True},
    ),
    "no notes": Case(generate("x", "-q"), 0, ANSWER, "", {"warns": True}),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    cases = []
    for name, case in CASES.items():
        more = dict(case.more)
        if "stdin" in more:
            given = more["stdin"]
            content = given if isinstance(given, bytes) else given.encode()
            more["stdin"] = base64.b64encode(content).decode()
        cases.append({"name": name, "args": case.args, **more})
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "cli" / "shell_driver.py"],
        input=json.dumps(cases), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**environment, "TERM": "xterm", "LC_ALL": "C.UTF-8",
             "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", CASES)
def test_a_command_in_a_shell(results: dict[str, dict[str, Any]], name: str) -> None:
    case, found = CASES[name], results[name]
    for stream, wanted in (("stdout", case.stdout), ("stderr", case.stderr)):
        written = base64.b64decode(found[stream]).decode("utf-8", "surrogateescape")
        if isinstance(wanted, str):
            assert written == wanted
        else:
            assert wanted.fullmatch(written), written
    assert found["code"] == case.code


def test_control_characters_are_shown() -> None:
    every = "".join(map(chr, range(0x100)))
    shown = visible(every)
    assert visible(shown) == shown, "nothing is left to be shown"
    assert [c for c in shown if ord(c) < 32] == ["\t", "\n"]
    assert visible("a\x1b[1m\r\x9b\udce9\ud800é漢🙂") == r"a\x1b[1m\x0d\x9b\xe9\ud800é漢🙂"
