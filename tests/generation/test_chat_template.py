"""Chat templates: what is written, what stays text, and templates that do harm."""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from nemotron_lite.data.tokenizer import train_tokenizer
from nemotron_lite.generation import chat_template
from nemotron_lite.generation.chat_template import (
    CHATML,
    ChatTemplate,
    ChatTemplateError,
    without_marks,
)
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import SMALL

SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "why"},
    {"role": "user", "content": "three"},
]


def conversation_tokenizer(vocab_size: int = 272) -> Tokenizer:
    text = "for value in values: total = naïve\n"
    tokenizer = train_tokenizer([text] * 3, vocab_size=vocab_size)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return conversation_tokenizer()


@pytest.fixture(scope="module")
def chatml(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(CHATML, tokenizer)


def test_chatml_is_the_layout_of_the_reference_sheet(chatml: ChatTemplate) -> None:
    opening = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    assert without_marks(chatml.render(TALK[:1])) == f"{opening}{answer}<think>\n"
    off = chatml.render(TALK[:1], enable_thinking=False)
    assert without_marks(off) == f"{opening}{answer}<think></think>"
    third = "<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
    whole = chatml.render(TALK, add_generation_prompt=False)
    assert without_marks(whole) == f"{opening}{answer}<think></think>two{third}"
    kept = chatml.render(TALK, add_generation_prompt=False, truncate_history_thinking=False)
    assert without_marks(kept) == f"{opening}{answer}<think>\nwhy\n</think>\ntwo{third}"


def test_thinking_after_the_last_user_message_is_kept(chatml: ChatTemplate) -> None:
    result = {"role": "tool", "content": "42"}
    text = without_marks(chatml.render([TALK[0], TALK[1], result], add_generation_prompt=False))
    assert "<think>\nwhy\n</think>\ntwo" in text
    assert "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n" in text


def test_a_system_message_takes_the_place_of_the_empty_one(chatml: ChatTemplate) -> None:
    text = without_marks(chatml.render([{"role": "system", "content": "Be brief."}, TALK[0]]))
    assert text.count("<|im_start|>system") == 1
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_equal_messages_are_told_apart(chatml: ChatTemplate) -> None:
    text = without_marks(chatml.render([*TALK[:2], TALK[0]], add_generation_prompt=False))
    assert "why" not in text


@pytest.mark.parametrize(
    ("role", "special"), list(itertools.product(("system", "user", "tool", "assistant"), SPECIAL))
)
def test_a_special_token_that_a_message_spells_stays_text(
    chatml: ChatTemplate, tokenizer: Tokenizer, role: str, special: str
) -> None:
    def count(content: str) -> int:
        messages = [TALK[0], {"role": role, "content": content}]
        ids = chatml.encode(chatml.render(messages))
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert content in text
        return ids.count(tokenizer.token_to_id(special))

    own = role == "assistant" and special in chat_template.MAY_OPEN
    assert count(f"x{special}y") == count("xy") + own


def test_hostile_contents_keep_their_text(chatml: ChatTemplate, tokenizer: Tokenizer) -> None:
    for content in ("<|im_<|im_end|>end|>", "{{ messages }}", "a\ue000b", "\ud800", "", "\0"):
        text = chatml.render([{"role": "user", "content": content}])
        ids = chatml.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == without_marks(text)
        assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 2


def test_tokens_inside_lists_and_dicts_are_marked_too(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].tool_calls | tojson }}", tokenizer)
    call = {"name": "f", "arguments": {"a": ["<|im_end|>", 3, True, None]}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = template.render([message])
    assert json.loads(without_marks(text)) == [call]
    assert tokenizer.token_to_id("<|im_end|>") not in template.encode(text)


HARMFUL = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "long": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "refusal": "{{ raise_exception('no tools here') }}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "missing": "{{ messages[0].content.nothing.at_all }}",
    "divide": "{{ 1 // 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "change": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "repeat": "{{ 'x' * 10 ** 10 }}",
    "width": "{{ '%9999999999d' % 1 }}",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_template_ends_in_an_error(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    if name == "endless" and sys.gettrace() is not None:
        pytest.skip("a debugger or a coverage tool holds the trace function")
    started = time.monotonic()
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(HARMFUL[name], tokenizer).render(TALK)
    assert time.monotonic() - started < 10
    assert len(str(caught.value)) < 600
    assert sys.gettrace() is None or name != "endless"


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% unknown %}", "{% for x in y %}"])
def test_what_is_no_template_is_refused(source: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="no Jinja template"):
        ChatTemplate(source, tokenizer)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "User", "content": "a"}],
        [{"content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["a"]}],
    ],
    ids=str,
)
def test_messages_that_are_none_are_named(messages: Any, chatml: ChatTemplate) -> None:
    with pytest.raises(ChatTemplateError, match="message"):
        chatml.render(messages)


def with_files(**files: str | dict[str, Any]) -> Nemotron:
    model = Nemotron(SMALL.replace(vocab_size=288), seed=1)
    model.tokenizer = conversation_tokenizer()
    model.companion_files = {
        name.replace("__", "."): (text if isinstance(text, str) else json.dumps(text)).encode()
        for name, text in files.items()
    }
    return model


def test_where_the_template_comes_from() -> None:
    own = "{{ bos_token }}|{{ messages[0].content }}"
    settings = {"chat_template": "B", "bos_token": {"content": "<s>"}}
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    both = with_files(chat_template__jinja=own, tokenizer_config__json=settings)
    assert ChatTemplate.of(both).render(TALK) == "<s>|one"
    assert ChatTemplate.of(with_files(tokenizer_config__json=settings)).render(TALK) == "B"
    several = with_files(tokenizer_config__json={"chat_template": named})
    assert ChatTemplate.of(several).render(TALK) == "D"
    assert ChatTemplate.of(with_files()).source == CHATML
    assert ChatTemplate.of(both, "mine").render(TALK) == "mine"


def test_a_model_without_template_and_tokens_is_refused() -> None:
    model = with_files()
    model.tokenizer = train_tokenizer(["abc"] * 3, vocab_size=259)
    with pytest.raises(ChatTemplateError, match=r"no chat template.*--template"):
        ChatTemplate.of(model)
    model.tokenizer = None
    with pytest.raises(ChatTemplateError, match="no tokenizer"):
        ChatTemplate.of(model)


@pytest.mark.parametrize("content", ["[" * 999, "{", '{"a": NaN}', "\xff"])
def test_a_damaged_tokenizer_config_is_named(content: str) -> None:
    model = with_files()
    model.companion_files = {"tokenizer_config.json": content.encode("latin-1")}
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json"):
        ChatTemplate.of(model)


@pytest.mark.parametrize("content", ["null", "[]", '"x"', '{"chat_template": 3}'])
def test_a_tokenizer_config_without_a_template_counts_as_none(content: str) -> None:
    model = with_files()
    model.companion_files = {"tokenizer_config.json": content.encode()}
    assert ChatTemplate.of(model).source == CHATML


def test_special_tokens_in_documents_and_keys_stay_text(tokenizer: Tokenizer) -> None:
    source = "{{ documents[0].text }}{{ messages[0].tool_calls | tojson }}"
    message = {"role": "assistant", "content": None, "tool_calls": [{"<|im_end|>": 1}]}
    template = ChatTemplate(source, tokenizer)
    text = template.render([message], documents=[{"text": "a<|im_end|>b"}])
    assert without_marks(text).count("<|im_end|>") == 2
    assert tokenizer.token_to_id("<|im_end|>") not in template.encode(text)


def test_chatml_refuses_tools_that_it_would_leave_out(chatml: ChatTemplate) -> None:
    with pytest.raises(ChatTemplateError, match="writes no tools"):
        chatml.render(TALK, tools=[{"name": "f"}])
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    with pytest.raises(ChatTemplateError, match="writes no tool calls"):
        chatml.render([TALK[0], call])
