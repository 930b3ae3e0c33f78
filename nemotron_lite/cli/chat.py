"""`nemotron-lite chat`: a conversation with a checkpoint in the terminal.

The answer is shown while it is written, its thinking dimmed. Ctrl-C while the model writes stops
the answer and keeps what was written; the conversation goes on. Ctrl-C at the prompt discards the
line. Ctrl-D ends the program.

Where the input is a file or a pipe, each line is one message, no prompt is shown, and the answers
alone go to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_lite.cli.common import SHIPPED, ModelFolder, app, note, plain_errors, say, write
from nemotron_lite.cli.generate import (
    DEFAULT,
    DEFAULT_DRAFT,
    Compiled,
    SamplingSeed,
    Temperature,
    TopK,
    TopP,
)
from nemotron_lite.cli.inputs import read_model
from nemotron_lite.generation.options import SpeculationOptions

if TYPE_CHECKING:
    from nemotron_lite.generation.chat import Chat, Piece, Reply

HELP = """\
/clear   forget the conversation, except for the system message
/retry   answer the last message again
/think   show the thinking, or hide it
/help    this list
/quit    end the program; Ctrl-D does it too
Ctrl-C   stop the answer; what was written stays part of the conversation"""
TEMPLATE_BYTES = 1 << 20


@app.command()
def chat(
    model: ModelFolder = SHIPPED,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="whether the model thinks first")
    ] = True,
    show_thinking: Annotated[
        bool, typer.Option("--show-thinking/--hide-thinking", help="whether to show it")
    ] = True,
    template: Annotated[
        Path | None, typer.Option(help="Jinja file in place of the model's chat template")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens of an answer")] = 1024,
    temperature: Temperature = DEFAULT.temperature,
    top_p: TopP = DEFAULT.top_p,
    top_k: TopK = DEFAULT.top_k,
    seed: SamplingSeed = 0,
    dtype: Annotated[str | None, typer.Option(help="of the weights: float32 or bfloat16")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="keep quantized weights packed in memory")
    ] = False,
    compiled: Compiled = DEFAULT.compiled,
    draft: Annotated[
        str | None, typer.Option(help="mtp: the MTP module drafts, the backbone verifies")
    ] = None,
) -> None:
    """Talk to a checkpoint that was trained on conversations."""
    with plain_errors():
        if draft not in (None, "mtp"):
            raise ValueError(f"--draft {draft}: expected mtp, or leave this option out.")
        from nemotron_lite.generation.chat import Chat
        from nemotron_lite.input_files import read_text

        source = None if template is None else read_text(template, limit=TEMPLATE_BYTES)
        conversation = Chat(
            read_model(model, dtype, packed=packed),
            system=system,
            thinking=thinking,
            template=source,
            max_new_tokens=max_new_tokens,
            temperature=DEFAULT.temperature if temperature is None else temperature,
            top_p=top_p,
            top_k=top_k or None,
            seed=seed,
            compiled=compiled,
            speculation=None
            if draft is None
            else SpeculationOptions(draft_length=DEFAULT_DRAFT.draft_length),
        )
        _Terminal(conversation, show_thinking).run()


class _Terminal:
    """Reads messages and commands, and shows the answers."""

    def __init__(self, chat: Chat, show_thinking: bool) -> None:
        self.chat, self.show_thinking = chat, show_thinking
        if sys.stdin is None:
            raise ValueError("standard input is closed, so there is no message to answer.")
        self.interactive = sys.stdin.isatty()

    def run(self) -> None:
        if self.interactive:
            with suppress(ImportError):  # not every Python has it
                import readline  # noqa: F401, input() then edits the line and has a history
            note("/help lists the commands; Ctrl-D ends.")
        for line in self._lines():
            if line.startswith("/") and self.interactive:
                if line in ("/quit", "/exit"):
                    return
                self._command(line)
            elif line.strip():
                self._show(self.chat.stream(line))

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("\n> " if self.interactive else "")
            except EOFError:
                if self.interactive:
                    say()
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                say()  # behind the ^C that the terminal shows

    def _command(self, line: str) -> None:
        if line == "/clear":
            self.chat.clear()
            note("The conversation is forgotten.")
        elif line == "/think":
            self.show_thinking = not self.show_thinking
            note(f"Thinking is {'shown' if self.show_thinking else 'hidden'}.")
        elif line == "/retry":
            if any(message["role"] == "user" for message in self.chat.messages):
                self._show(self.chat.retry())
            else:
                note("There is no message yet.")
        else:
            if line != "/help":
                say(f"{line}: no such command.")
            say(HELP)

    def _show(self, pieces: Generator[Piece]) -> None:
        part = None
        try:
            for piece in pieces:
                if piece.part == "thinking" and not (self.show_thinking and self.interactive):
                    continue
                if part == "thinking" and piece.part == "content":
                    write("\n\n")
                part = piece.part
                write(piece.text, style="dim" if part == "thinking" else "")
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        finally:
            pieces.close()
        write("\n")
        if self.interactive and self.chat.reply is not None:
            note(_summary(self.chat.reply))


def _summary(reply: Reply) -> str:
    """One line about a reply: how it ended, and how fast it was."""
    ended = {"length": "cut at --max-new-tokens, ", "interrupted": "stopped, "}
    reused = f" (and {reply.reused_tokens:,} known)" if reply.reused_tokens else ""
    return (
        f"{ended.get(reply.stop_reason, '')}{reply.tokens:,} tokens, "
        f"{reply.tokens_per_second:,.1f} tokens/s; read {reply.prompt_tokens:,}{reused} "
        f"in {reply.prompt_seconds:.2f} s"
    )
