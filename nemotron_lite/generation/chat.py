"""A conversation: messages in, an answer out, the thinking apart from it, nothing read twice.

    chat = Chat(model, system="Answer briefly.")
    reply = chat.send("What is 6 x 7?")          reply.thinking, reply.content
    for piece in chat.stream("And 6 x 8?"):      pieces of text, as they are written
        print(piece.text, end="")

One turn:

    1. the chat template writes all messages as one text (chat_template.py)
    2. what the cache has read of that text already is not read again
    3. the model continues it up to a stop token
    4. what stands between <think> and </think> is the thinking, the rest is the answer

Step 2 has a difficulty. The template of Nemotron leaves the thinking of earlier turns out, so the
text of the next turn does not begin with what the cache has read. An SSM state cannot be cut back.
So a copy of the cache is kept from before the answer: the next turn continues from it and reads the
answer again without its thinking. Where thinking is kept or switched off, the cache itself goes on.
The copy costs as much memory as the cache.

The comparison is one of texts, and the ids that the model wrote stay as they are. Encoding its
answer again could give other ids for the same text, and the cache would be useless.

Source: reference sheet 8.6. Left out: running tools, a bound on the tokens of thinking.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack

from torch import nn

from nemotron_lite.cache import Cache
from nemotron_lite.generation.chat_template import ChatTemplate, ChatTemplateError, without_marks
from nemotron_lite.generation.defaults import default_options, stop_tokens
from nemotron_lite.generation.generate import generate, stream
from nemotron_lite.generation.options import GenerationOptions, GenerationSettings
from nemotron_lite.generation.text_rows import TextRow
from nemotron_lite.wrappers import model_for_inference

OPEN, CLOSE = "<think>", "</think>"

Part = Literal["thinking", "content"]


class Piece(NamedTuple):
    """A piece of a reply: of its thinking or of its content."""

    part: Part
    text: str


@dataclass(frozen=True)
class Reply:
    """What the model wrote in one turn.

    Attributes:
        content: the answer.
        thinking: what stood between the thinking tags; "" without thinking.
        stop_reason: "stop_token", "stop_string", "length" (max_new_tokens was reached) or
            "interrupted".
        tokens: number of tokens written.
        prompt_tokens: number of tokens read before the first one was written.
        reused_tokens: number of tokens of the conversation that the cache had read already.
        prompt_seconds, seconds: time to read the prompt with the first token, and to write the
            other tokens.
    """

    content: str
    thinking: str
    stop_reason: str
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing, without the prompt and its first token; 0 for a single token."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0

    @property
    def message(self) -> dict[str, str]:
        """The reply as a message of the conversation."""
        message = {"role": "assistant", "content": self.content}
        return {**message, "reasoning_content": self.thinking} if self.thinking else message


class ThinkingSplitter:
    """Splits a text that arrives in pieces into its thinking and its content.

    A tag may be cut by the border of two pieces, so the beginning of a tag is held back until the
    next piece. Line breaks at the beginning of a part are left out.

    Args:
        inside: whether the text begins inside the thinking, because the prompt ended in <think>.
    """

    def __init__(self, inside: bool) -> None:
        self.parts: dict[Part, str] = {"thinking": "", "content": ""}
        self._part: Part = "thinking" if inside else "content"
        self._held = ""

    def add(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        text, found = self._held + text, []
        while (tag := min((OPEN, CLOSE), key=lambda tag: text.find(tag) % (1 << 62))) in text:
            before, _, text = text.partition(tag)
            found += self._give(before)
            self._part = "thinking" if tag == OPEN else "content"
        held = max(_overlap(text, tag) for tag in (OPEN, CLOSE))
        self._held = text[len(text) - held :]
        return found + self._give(text[: len(text) - held])

    def end(self) -> list[Piece]:
        """The rest, when no further text comes."""
        held, self._held = self._held, ""
        return self._give(held)

    def _give(self, text: str) -> list[Piece]:
        if not self.parts[self._part]:
            text = text.lstrip("\n")
        self.parts[self._part] += text
        return [Piece(self._part, text)] if text else []


def _overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of `tag` that `text` ends in, without the whole tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


@dataclass
class _Reading:
    """A cache, and the rendered text that it has read."""

    cache: Cache
    text: str = ""


class Chat:
    """A conversation with a model.

    Args:
        model: with a tokenizer, and with a chat template or ChatML's tokens.
        system: the first message; None has none, and the template decides.
        messages: of an earlier conversation, to go on with.
        thinking: whether the template asks for thinking (`enable_thinking`).
        template: a Jinja text in place of the model's own template.
        variables: for the template, such as `{"tools": [...]}`.
        max_new_tokens, options, settings: as those of `generate`. The seed of turn n is `seed + n`.

    Attributes:
        messages: the conversation so far. It may be changed between two turns.

    Raises:
        ChatTemplateError: no tokenizer or template, or messages that it cannot write.
        ValueError, TypeError: options that are wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        thinking: bool = True,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        options: GenerationOptions | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> None:
        if options is not None and not isinstance(options, GenerationOptions):
            raise TypeError(
                f"options of type {type(options).__name__}: expected GenerationOptions; single "
                "options are keywords."
            )
        if isinstance(messages, str | bytes | Mapping):
            raise TypeError("messages must be a list of dicts with role and content.")
        model = model_for_inference(model)
        self.model, self.template = model, ChatTemplate.of(model, template)
        given: dict[str, Any] = dict(settings)
        if max_new_tokens is not None:
            given["max_new_tokens"] = max_new_tokens
        self.options = (options or default_options(model, given)).replace(**given)
        self.variables = {"enable_thinking": thinking, **(variables or {})}
        for name in ("messages", "add_generation_prompt"):
            if name in self.variables:
                raise ChatTemplateError(f"variables may not contain {name!r}, which is set here.")
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        if system is not None:
            self.messages.insert(0, {"role": "system", "content": system})
        self.reply: Reply | None = None
        self._turn, self._writing = 0, False
        self._before: _Reading | None = None  # has read up to the answer
        self._after: _Reading | None = None  # has read the answer too

    def send(self, text: str | Mapping[str, Any]) -> Reply:
        """Say something; returns the model's reply.

        Args:
            text: what the user says, or a whole message, such as a tool's result.

        Raises:
            ChatTemplateError: the template cannot write these messages.
            FloatingPointError: the model's logits are not finite.
        """
        for _ in self.stream(text):
            pass
        assert self.reply is not None
        return self.reply

    def stream(self, text: str | Mapping[str, Any]) -> Generator[Piece]:
        """Say something; returns the pieces of the reply as they are written.

        Afterwards the reply is in `reply`, and in `messages`. If the iterator is closed before its
        end, or Ctrl-C ends it, what was written so far is the reply. If an error ends it, the
        conversation is as it was before the turn.
        """
        if not isinstance(text, str | Mapping):
            raise TypeError(f"{text!r:.60}: expected a text or a message (a dict).")
        said = {"role": "user", "content": text} if isinstance(text, str) else dict(text)
        if self._writing:
            raise ChatTemplateError(
                "a reply is being written: read it to its end, or close it (`pieces.close()`)."
            )
        self._writing, self.reply = True, None
        self.messages.append(said)
        try:
            yield from self._answer()
        except BaseException:
            if self.messages and self.messages[-1] is said:  # there is no reply
                self.messages.pop()
            raise
        finally:
            self._writing = False

    def retry(self) -> Generator[Piece]:
        """Answer the last message of the user again; returns the pieces as `stream` does.

        If an error ends it before a reply was begun, the old reply is still there.

        Raises:
            ChatTemplateError: there is no message of the user.
        """
        before = list(self.messages)
        said = self.take_back()
        if said is None:
            raise ChatTemplateError("there is no message to answer again.")
        kept = len(self.messages)
        try:
            yield from self.stream(said)
        except BaseException:
            if len(self.messages) == kept:
                self.messages[:] = before
            raise

    def take_back(self) -> str | None:
        """Remove the last reply and what the user said before it; returns the latter, or None."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i].get("role") == "user":
                said = self.messages[i]["content"]
                del self.messages[i:]
                return str(said)
        return None

    def clear(self) -> None:
        """Forget the conversation, except for a system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self._before = self._after = self.reply = None

    def _answer(self) -> Generator[Piece]:
        """Write the reply to the last message, and add it to the conversation."""
        started = time.perf_counter()
        options = self.options.replace(seed=_seed_of_turn(self.options.seed, self._turn))
        rendered = self.template.render(self.messages, **self.variables)
        reading = self._take_reading(rendered, options)
        reused = int(reading.cache.lengths[0])
        prompt = self._read_before_the_answer(reading, rendered, options)
        prompt_tokens = int(reading.cache.lengths[0]) - reused + len(prompt)

        tokenizer, most = self.template.tokenizer, options.max_new_tokens
        stop = frozenset(stop_tokens(self.model) if options.stop is None else options.stop)
        row = TextRow(
            tokenizer,
            prompt,
            stop,
            most,
            stop_strings=tuple(options.stop_strings),
            skip_special_tokens=False,
        )
        splitter = ThinkingSplitter(without_marks(rendered).rstrip("\n").endswith(OPEN))
        tokens: list[int] = []
        first, reason = 0.0, "interrupted"
        try:
            with closing(stream(self.model, prompt, options=options, cache=reading.cache)) as steps:
                for token in steps:
                    first = first or time.perf_counter()
                    tokens.append(token)
                    yield from splitter.add(row.add(token))
            yield from splitter.end()
            reason = steps.results.stop_reason
            written = tokenizer.decode(prompt + tokens, skip_special_tokens=False)
            asked = tokenizer.decode(prompt, skip_special_tokens=False)
            self._after = _Reading(reading.cache, rendered + written[len(asked) :])
        except (GeneratorExit, KeyboardInterrupt):
            splitter.end()
            raise
        except BaseException:
            reason = "failed"
            raise
        finally:
            if reason != "failed":
                end, first = time.perf_counter(), first or time.perf_counter()
                self.reply = Reply(
                    content=splitter.parts["content"],
                    thinking=splitter.parts["thinking"].rstrip("\n"),
                    stop_reason=reason,
                    tokens=len(tokens),
                    prompt_tokens=prompt_tokens,
                    reused_tokens=reused,
                    prompt_seconds=first - started,
                    seconds=end - first,
                )
                self.messages.append(self.reply.message)
                self._turn += 1

    def _take_reading(self, rendered: str, options: GenerationOptions) -> _Reading:
        """The cache that has read most of `rendered`; it is no longer kept, as it will change."""
        kept = [self._after, self._before]
        self._after = self._before = None
        for reading in kept:
            if reading is not None and rendered.startswith(reading.text):
                return reading
        cache = self.model.empty_cache(
            1,
            mtp=options.speculation is not None,
            ssm_dtype=options.ssm_dtype,
            ssm_seed=options.ssm_seed,
        )
        return _Reading(cache)

    def _read_before_the_answer(
        self, reading: _Reading, rendered: str, options: GenerationOptions
    ) -> list[int]:
        """Read up to the end of the last message and keep a copy; returns the ids of the rest.

        The rest is what opens the answer. The next turn's text may have something else there.
        """
        closed = self.template.render(self.messages, add_generation_prompt=False, **self.variables)
        start = len(reading.text)
        if not rendered.startswith(closed) or not start <= len(closed) < len(rendered):
            return self.template.encode(rendered[start:])
        if start < len(closed):
            head = self.template.encode(closed[start:])
            generate(self.model, head, 0, options=options, cache=reading.cache)
        self._before = _Reading(reading.cache.clone(), closed)
        return self.template.encode(rendered[len(closed) :])


def _seed_of_turn(seed: int | None, turn: int) -> int | None:
    return None if seed is None else (seed + turn) % (1 << 63)


def chat(model: nn.Module, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Reply:
    """The reply to the last message of a conversation; the arguments are those of `Chat`.

        chat(model, [{"role": "user", "content": "What is 6 x 7?"}], max_new_tokens=64).content

    Raises:
        ChatTemplateError: as `Chat`, and where the last message is not the user's or a tool's.
    """
    if not messages or messages[-1].get("role") not in ("user", "tool"):
        raise ChatTemplateError(
            "the last message must be the user's (or a tool's) for the model to reply to it."
        )
    conversation = Chat(model, messages=messages[:-1], **settings)
    return conversation.send(messages[-1])
