"""A byte-level BPE tokenizer as keys of a GGUF file.

A file of Hugging Face's `tokenizers` describes how text is split before the merges: a pipeline with
regular expressions. A GGUF file only has the *name* of such a rule, and llama.cpp knows what it
does. So the pipeline has to be one that has a name:

    name      pipeline
    gpt-2     ByteLevel with its own expression
    refact    Digits one by one, then the same (what `data.train_tokenizer` makes)
    tekken    Split by Mistral's expression, then ByteLevel without one (Nemotron's own tokenizer)

Anything else is refused, and so is a tokenizer without merges, because llama.cpp cannot open such a
file; `pre_tokenizer` names the rule by hand, for who knows that it fits.

A token that the tokenizer marks as special is written as a control token: llama.cpp, like
`generate`, takes it from a text only where it is told to read special tokens. Ids without a token
(vocabularies are padded to a round number) get unused ones.

Source: llama.cpp's `llama-vocab.cpp`; tests/export compare its tokens with ours. Left out:
SentencePiece and WordPiece, which no Nemotron 3 model has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from nemotron_lite.arguments import shown

_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp does for these names: a whole word that is a token is taken without merges.
_IGNORES_MERGES = {"gpt-2": False, "refact": False, "tekken": True}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
MOST_STOPS = 3  # EOS, EOT and EOM


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of a tokenizer.

    Attributes:
        tokens: the text of every id, in byte-level spelling.
        types: the kind of every id.
        merges: pairs with a space between, the first merge first.
        rule: the name of the pre-tokenizer.
        add_bos, add_eos: whether a text gets such a token in front or behind.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    rule: str
    add_bos: bool
    add_eos: bool


def read_vocabulary(
    tokenizer: Tokenizer,
    size: int,
    bos: int,
    stops: tuple[int, ...],
    rule: str | None = None,
) -> tuple[Vocabulary, list[str]]:
    """The vocabulary for a model of `size` tokens, and what a GGUF file cannot hold of it.

    Args:
        bos: the token that begins a text.
        stops: the tokens that end one.
        rule: the name of the pre-tokenizer; None recognizes it.
    """
    described = json.loads(tokenizer.to_str())
    model, problems = described["model"], _model_problems(described)
    found = rule or _rule(described.get("pre_tokenizer"))
    if found is None:
        problems.append(
            f"the pre-tokenizer {shown(json.dumps(described.get('pre_tokenizer')), 160)} has no "
            f"name that is known here ({', '.join(_IGNORES_MERGES)}). If llama.cpp has a rule that "
            "does the same, name it: pre_tokenizer=... (--pre-tokenizer)"
        )
    elif rule is None and bool(model.get("ignore_merges")) != _IGNORES_MERGES[found]:
        problems.append(
            f"ignore_merges={model.get('ignore_merges')}: llama.cpp's rule {found!r} does it the "
            "other way"
        )
    if len(stops) > MOST_STOPS:
        problems.append(
            f"{len(stops)} tokens end a text ({shown(list(stops), 80)}): a GGUF file names "
            f"{MOST_STOPS}. Set eos_token_id to fewer (config.json, generation_config.json)"
        )
    tokens, types, more = _tokens(described, size)
    for name, token in (("bos_token_id", bos), *(("eos_token_id", stop) for stop in stops)):
        if token >= size:
            more.append(f"{name}={token} is outside the vocabulary of {size:,} tokens")
    add_bos, add_eos, odd = _added_to_texts(tokenizer, bos, stops)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    vocabulary = Vocabulary(tokens, types, merges, found or "", add_bos, add_eos)
    return vocabulary, [*problems, *more, *odd]


def write_vocabulary(
    writer: Any, vocabulary: Vocabulary, bos: int, stops: tuple[int, ...], pad: int
) -> None:
    """Add a vocabulary to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(bos)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adders, stops, strict=False):
        add(token)
    if pad < len(vocabulary.tokens):
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)


def _model_problems(described: dict[str, Any]) -> list[str]:
    model = described["model"]
    if model.get("type") != "BPE":
        return [f"the tokenizer is {shown(model.get('type'))}: only byte-level BPE is exported"]
    problems = [
        f"the tokenizer has {name}={shown(model[name])}, which a GGUF file has no key for"
        for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
        if model.get(name)
    ]
    if not model.get("merges"):
        problems.append(
            "the tokenizer has no merges, and llama.cpp opens no file without any: train it with a "
            "larger vocabulary than the 256 bytes and the special tokens, or use this model with "
            "nemotron_lite"
        )
    if model.get("byte_fallback"):
        problems.append("the tokenizer has byte_fallback, which byte-level BPE does not use")
    if described.get("normalizer") is not None:
        problems.append(
            f"the tokenizer changes texts before it splits them ({shown(described['normalizer'])})"
            ": llama.cpp does not"
        )
    return problems


def _rule(pre: dict[str, Any] | None) -> str | None:
    """The name of a pre-tokenizer; None if it has none that is known."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    *before, last = steps
    own = last.get("use_regex", True)
    if own and not before:
        return "gpt-2"
    if len(before) != 1:
        return None
    (first,) = before
    if own and first.get("type") == "Digits" and first.get("individual_digits"):
        return "refact"
    if (
        not own
        and first.get("type") == "Split"
        and first.get("pattern") == {"Regex": _TEKKEN}
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
    ):
        return "tekken"
    return None


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int], list[str]]:
    """Texts and kinds of all ids."""
    by_id = {number: text for text, number in described["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    odd = []
    for added in described.get("added_tokens") or []:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if any(added.get(name) for name in ("lstrip", "rstrip", "single_word")):
            odd.append(added["content"])
    problems = []
    if odd:
        problems.append(
            f"the added tokens {shown(odd, 120)} take the spaces around them (lstrip, rstrip) or "
            "match whole words only (single_word): a GGUF file has no key for that"
        )
    highest = max(by_id, default=-1)
    if highest >= size:
        problems.append(
            f"the tokenizer has ids up to {highest}, but the model's vocabulary has only {size} "
            "entries: give the tokenizer of this model"
        )
    texts = [by_id.get(number, f"<unused {number}>") for number in range(size)]
    if len(set(texts)) < len(texts):
        problems.append("two tokens have the same text, which a GGUF file cannot hold")
    return texts, [types.get(number, UNUSED) for number in range(size)], problems


def _added_to_texts(
    tokenizer: Tokenizer, bos: int, stops: tuple[int, ...]
) -> tuple[bool, bool, list[str]]:
    """Whether a text gets the first or the last token, and what else is put around it."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    starts = [i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain]
    before, after = (ids[: starts[0]], ids[starts[0] + len(plain) :]) if starts else (ids, [])
    if before not in ([], [bos]) or after not in ([], *([stop] for stop in stops[:1])):
        return False, False, [
            f"the tokenizer puts {before} in front of a text and {after} behind it: a GGUF file "
            f"can only say that the first token (bos_token_id={bos}) and the last one are added"
        ]  # fmt: skip
    return bool(before), bool(after), []
