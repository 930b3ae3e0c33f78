"""The command `chat`: lines of a pipe, and a person at a terminal who stops an answer."""

from __future__ import annotations

import os
import pty
import select
import signal
import string
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nemotron_lite import save
from nemotron_lite.cli import app
from nemotron_lite.generation.chat import Chat
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import GREEDY, SMALL
from tests.generation.test_chat_template import conversation_tokenizer

QUICK = ["--max-new-tokens", "12", "--temperature", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes letters, on disk."""
    tokenizer = conversation_tokenizer(vocab_size=257)
    config = SMALL.replace(vocab_size=tokenizer.get_vocab_size(), eos_token_id=0)
    model = Nemotron(config, seed=1).eval()
    letters = [tokenizer.token_to_id(letter) for letter in string.ascii_letters]
    others = torch.ones(config.vocab_size, dtype=torch.bool)
    others[letters] = False
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    path = tmp_path_factory.mktemp("chat") / "model"
    save(model, path, tokenizer)
    return path


def test_lines_of_a_pipe_are_answered_one_by_one(folder: Path) -> None:
    command = ["chat", "--model", str(folder), "--no-thinking", "--system", "Be brief.", *QUICK]
    result = CliRunner().invoke(app, command, input="one\n\ntwo\n")
    assert result.exit_code == 0, result.output
    talk = Chat(
        Nemotron.from_pretrained(folder), system="Be brief.", thinking=False, max_new_tokens=12,
        **GREEDY,
    )  # fmt: skip
    assert result.stdout == "".join(talk.send(said).content + "\n" for said in ("one", "two"))


def test_thinking_is_no_part_of_a_pipe(folder: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "--model", str(folder), *QUICK], input="one\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "\n"


def test_a_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('not for ' ~ messages[0].content) }}")
    command = ["chat", "--model", str(folder), "--template", str(tmp_path / "t.jinja")]
    result = CliRunner().invoke(app, command, input="one\n")
    assert result.exit_code == 1
    assert "not for one" in result.stderr


def test_a_model_without_conversations_is_refused(tmp_path: Path) -> None:
    from nemotron_lite.data.tokenizer import train_tokenizer

    model = Nemotron(SMALL.replace(vocab_size=259), seed=1)
    save(model, tmp_path / "m", train_tokenizer(["abc"] * 3, vocab_size=259))
    result = CliRunner().invoke(app, ["chat", "--model", str(tmp_path / "m")], input="one\n")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr


class Person:
    """Somebody at a terminal."""

    def __init__(self, *command: str) -> None:
        self.screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nemotron_lite", *command],
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    def sees(self, text: str, seconds: float = 60) -> None:
        """Wait until `text` is on the screen, and forget what was before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self.seen[-2000:]!r}"
            if select.select([self.screen], [], [], left)[0]:
                try:
                    self.seen += os.read(self.screen, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    assert text in self.seen, self.seen[-2000:]
        self.seen = self.seen.partition(text)[2]

    def interrupts_until(self, text: str) -> None:
        """Ctrl-C until `text` comes: Python's `input` misses one before it waits for a line."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            with suppress(AssertionError):
                return self.sees(text, seconds=2)
        raise AssertionError(f"{text!r} did not come: {self.seen[-2000:]!r}")

    def types(self, text: str) -> None:
        os.write(self.screen, text.encode())


@pytest.mark.timing
def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path) -> None:
    person = Person(
        "chat", "--model", str(folder), "--no-thinking", "--max-new-tokens", "4000",
        "--temperature", "0",
    )  # fmt: skip
    try:
        person.sees("/help lists the commands")
        person.sees("> ")
        person.types("one\n")
        person.sees("one")
        time.sleep(1.0)
        person.process.send_signal(signal.SIGINT)
        person.sees("stopped, ")
        person.sees("tokens/s")
        person.sees("> ")
        person.types("/clear\n")
        person.sees("forgotten")
        person.sees("> ")
        person.types("/nothing\n")
        person.sees("no such command")
        person.sees("> ")
        person.interrupts_until("> ")  # at the prompt only the line is discarded
        person.types("\x04")
        assert person.process.wait(30) == 0
    finally:
        person.process.kill()
        person.process.wait()
        os.close(person.screen)
