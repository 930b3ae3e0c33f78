r"""Chat templates: the messages of a conversation as the token ids that a model was trained on.

A model reads one text, not messages. Its chat template, a small Jinja program that is released with
the weights, writes the roles, the turns and the place where the answer begins:

    <|im_start|>user\nWhat is 6 x 7?<|im_end|>\n<|im_start|>assistant\n<think>\n

A model that was trained with one layout answers badly to another. So the folder's own template is
taken: `chat_template.jinja`, or `chat_template` in tokenizer_config.json. A model without one,
whose tokenizer has the tokens <|im_start|> and <|im_end|>, gets `CHATML`, the layout of Nemotron 3.

Two kinds of hostile text are met here:

    contents     A message may spell a special token: "<|im_end|>\n<|im_start|>system ...". Such a
                 text is encoded as ordinary text, never as the special token. Only the template
                 can write special tokens, and an assistant's message its thinking and tool tags.
    templates    They are programs from the internet. They run in Jinja's sandbox, which hides
                 Python's internals, for at most `SECONDS`, and write at most `CHARACTERS`.

Source: reference sheet 8.6. Left out: a bound on the memory of a template, parsing of tool calls.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nemotron_lite.input_files import parse_json
from nemotron_lite.model import Nemotron

ROLES = ("system", "user", "assistant", "tool")
SECONDS = 10.0
CHARACTERS = 64 << 20
# In an assistant's message.
MAY_OPEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<parameter=", "</parameter>")
_SPLIT = "\ue000"  # private use: put inside a special token's text, and taken out when encoding

CHATML = r"""
{%- if tools -%}
{{ raise_exception("ChatML here writes no tools: give the model's own chat template") }}
{%- endif -%}
{%- set turns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}{%- set turns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role != "system" -%}
{{ "<|im_start|>system\n<|im_end|>\n" }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{%- if message.tool_calls -%}
{{ raise_exception("ChatML here writes no tool calls: give the model's own chat template") }}
{%- endif -%}
{%- set keep = truncate_history_thinking is false or loop.index0 > turns.last_user -%}
{{ "<|im_start|>assistant\n<think>" }}
{%- if keep and message.reasoning_content -%}
{{ "\n" ~ message.reasoning_content ~ "\n</think>\n" }}
{%- else -%}
{{ "</think>" }}
{%- endif -%}
{{ (message.content or "") ~ "<|im_end|>\n" }}
{%- elif message.role == "tool" -%}
{{ "<|im_start|>user\n<tool_response>\n" ~ message.content ~ "\n</tool_response><|im_end|>\n" }}
{%- else -%}
{{ "<|im_start|>" ~ message.role ~ "\n" ~ message.content ~ "<|im_end|>\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\n<think>" ~ ("</think>" if enable_thinking is false else "\n") }}
{%- endif -%}
"""


class ChatTemplateError(ValueError):
    """A model has no chat template, or its template cannot write these messages."""


class ChatTemplate:
    """A Jinja chat template and the tokenizer whose special tokens it writes.

    Args:
        source: the Jinja text.
        tokenizer: of the model.
        variables: what the template may read besides the messages, such as `bos_token`.

    Raises:
        ChatTemplateError: `source` is no Jinja template.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.variables = dict(variables or {})
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        self._special = _special_texts(tokenizer)
        try:
            source.encode()
            self._template = environment.from_string(source)
        except Exception as error:  # it is compiled to Python, which may refuse it too
            raise ChatTemplateError(
                f"the chat template is no Jinja template: {str(error)[:300]}."
            ) from error

    @classmethod
    def of(cls, model: Nemotron, source: str | None = None) -> ChatTemplate:
        """The template of a loaded model.

        Args:
            source: a Jinja text that is used in place of the model's own.

        Raises:
            ChatTemplateError: the model has no tokenizer, or neither a template nor the tokens of
                ChatML.
        """
        if model.tokenizer is None:
            raise ChatTemplateError(
                "this model has no tokenizer (model.tokenizer is None), so messages cannot be "
                "encoded: put tokenizer.json into the checkpoint folder."
            )
        settings = _tokenizer_config(model)
        if source is None:
            source = _stored_template(model, settings)
        if source is None:
            if {"<|im_start|>", "<|im_end|>"} - set(_special_texts(model.tokenizer)):
                raise ChatTemplateError(
                    "this model has no chat template (chat_template.jinja, or chat_template in "
                    "tokenizer_config.json), and its tokenizer has no <|im_start|> and <|im_end|>:"
                    " it was not trained on conversations. Give a template (--template FILE), or "
                    "continue a text with generate."
                )
            source = CHATML
        variables = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(settings.get(name))) is not None
        }
        return cls(source, model.tokenizer, variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation; special tokens that messages spell are marked.

        `encode` turns it into ids. Without the marks it is what the template wrote.

        Args:
            messages: each with `role` and `content`; an assistant's may have `reasoning_content`.
            add_generation_prompt: whether to open the assistant's next turn.
            variables: for the template: `enable_thinking`, `tools`, `documents`, ...

        Raises:
            ChatTemplateError: a message without a role or content, or an error of the template.
        """
        if isinstance(messages, str | bytes | Mapping):
            raise ChatTemplateError("messages must be a list of dicts with role and content.")
        marked = [self._checked(i, message) for i, message in enumerate(messages)]
        if not marked:
            raise ChatTemplateError("there are no messages: give at least one.")
        if "messages" in variables:
            raise ChatTemplateError("`messages` is no variable: give it as the messages.")
        given = {**self.variables, **_mark(variables, self._special)}
        pieces, length = [], 0
        try:
            with _time_limit(SECONDS):
                for piece in self._template.generate(
                    messages=marked, add_generation_prompt=add_generation_prompt, **given
                ):
                    length += len(piece)
                    if length > CHARACTERS:
                        raise ChatTemplateError(
                            f"the chat template wrote more than {CHARACTERS:,} characters."
                        )
                    pieces.append(piece)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatTemplateError(
                f"the chat template cannot write these messages: {str(error)[:300] or type(error)}."
            ) from error
        return "".join(pieces)

    def encode(self, text: str) -> list[int]:
        """The token ids of a rendered text, or of a part of it."""
        parts = text.split(_SPLIT)
        encoded = self.tokenizer.encode_batch(parts, add_special_tokens=False)
        return [token for part in encoded for token in part.ids]

    def _checked(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a message, with the special tokens in its texts marked."""
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise ChatTemplateError(
                f"message {index} has the role {str(role)[:40]!r}: expected a dict with role "
                f"({', '.join(ROLES)}) and content."
            )
        content = message.get("content")
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise ChatTemplateError(
                f"message {index} ({message['role']}) has a content of type "
                f"{type(content).__name__}: expected text."
            )
        special = self._special
        if message["role"] == "assistant":
            special = [t for t in special if not (t.startswith(MAY_OPEN) or t.endswith(MAY_OPEN))]
        return {key: _mark(value, special) for key, value in message.items()}


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which one operation cannot take for ever or fill the memory.

    `9 ** 9 ** 9` and `"x" * 10 ** 10` are single operations of Python, which no time limit ends.
    """

    intercepted_binops = frozenset(["**", "*", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute it, unless the result would be too long."""
        if operator == "**" and not (_is_small(left) and _is_small(right) and abs(right) < 100):
            raise TemplateError("powers of large numbers are not computed")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    if len(text) * times > CHARACTERS:
                        raise TemplateError("a text is repeated too often")
                elif isinstance(text, int) and not _is_small(text):
                    raise TemplateError("products of large numbers are not computed")
        if operator == "%" and isinstance(left, str) and re.search(r"[0-9]{4}|[*]", left):
            raise TemplateError("a text is formatted with a width that is too large")
        return super().call_binop(context, operator, left, right)


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1 << 64


def without_marks(text: str) -> str:
    """A rendered text without the marks of `ChatTemplate.render`."""
    return text.replace(_SPLIT, "")


def _mark(value: Any, special: Sequence[str]) -> Any:
    """`value` with each special token's text split, inside lists and dicts too."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # half a character, which no tokenizer can read
            value = value.encode(errors="replace").decode()
        value = value.replace(_SPLIT, "")
        for text in special:
            while text in value:  # again, because two of them may share a character
                value = value.replace(text, text[0] + _SPLIT + text[1:])
        return value
    if isinstance(value, Mapping):
        return {_mark(key, special): _mark(item, special) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(item, special) for item in value]
    return value


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that the tokenizer turns into one token wherever they stand; longest first.

    Line breaks around them are left out: the template could write them beside a content.
    """
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    cores = {text.strip() for text in added}
    return sorted((text for text in cores if len(text) > 1), key=lambda t: (-len(t), t))


def _tokenizer_config(model: Nemotron) -> dict[str, Any]:
    content = model.companion_files.get("tokenizer_config.json")
    if content is None:
        return {}
    try:
        found = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ChatTemplateError(f"tokenizer_config.json is no readable JSON: {error}.") from error
    return found if isinstance(found, dict) else {}


def _stored_template(model: Nemotron, settings: Mapping[str, Any]) -> str | None:
    content = model.companion_files.get("chat_template.jinja")
    if content is not None:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ChatTemplateError(f"chat_template.jinja is not UTF-8: {error}.") from error
    found = settings.get("chat_template")
    if isinstance(found, list):  # several templates, each with a name
        by_name = {
            str(item.get("name")): item.get("template") for item in found if isinstance(item, dict)
        }
        found = by_name.get("default") or next(iter(by_name.values()), None)
    return found if isinstance(found, str) else None


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object with it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As transformers writes it: no HTML escapes, characters as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError from the next line of Python that runs after `seconds`.

    A template's loop runs as Python lines, so a trace function can end it. A debugger's or a
    coverage tool's trace function is left in place, and then there is no limit.
    """
    if sys.gettrace() is not None:
        yield
        return
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, value: Any) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise TimeoutError(f"it ran for more than {seconds:g} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
