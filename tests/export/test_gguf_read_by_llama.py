"""Exported models are read back by llama.cpp, which has to say what ours says."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemotron_lite import Nemotron, SpeculationOptions, generate
from nemotron_lite.data import CHAT_TOKENS, train_tokenizer
from nemotron_lite.export import to_gguf
from nemotron_lite.export.gguf_tokenizer import _TEKKEN
from nemotron_lite.generation.speculative import Drafter
from tests.export.llama import GREEDY, NO_MTP, llama, packed_model, small_model

PROMPT = [17, 9, 77, 100, 31, 4, 4, 120]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def log_probabilities(model: Nemotron, tokens: list[int]) -> torch.Tensor:
    """Of the tokens behind the prompt: one row for each."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    return logits.float().log_softmax(-1)


def difference(model: Nemotron, file: Path) -> tuple[list[int], float]:
    """The greedy tokens of llama.cpp, and how far its log-probabilities of all tokens are off."""
    with llama(file) as reader:
        answer = reader.complete(PROMPT, probabilities=model.config.vocab_size)
    tokens, places = answer["tokens"], answer["completion_probabilities"]
    assert [place["id"] for place in places] == tokens
    assert all(len(place["top_logprobs"]) == model.config.vocab_size for place in places)
    ours = log_probabilities(model, tokens)
    worst = max(
        abs(ours[i, each["id"]].item() - each["logprob"])
        for i, place in enumerate(places)
        for each in place["top_logprobs"]
    )
    return tokens, worst


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "*ME"},
        {"pattern": "M*"},
        {"pattern": "-M-*", **NO_MTP},
        {"pattern": "M*M", **NO_MTP},
        {"moe_latent_size": None},
        {"use_conv_bias": False},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 1.0},
        {"n_group": 3, "topk_group": 3},
        {"n_routed_experts": 4, "num_experts_per_tok": 4},
        {"n_routed_experts": 2, "num_experts_per_tok": 1},
        {"conv_kernel": 2, "ssm_state_size": 5, "mamba_head_dim": 5},
        {"conv_kernel": 7, "n_groups": 8},
        {"n_groups": 1, "mamba_num_heads": 3},
        {"head_dim": 7, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "norm_eps": 1e-2},
        {"hidden_size": 33, "moe_intermediate_size": 23, "moe_latent_size": 15},
        {"moe_shared_expert_intermediate_size": 41, "vocab_size": 131},
        {"pattern": "M*-*-", "attention_bias": True, "mlp_bias": True, **NO_MTP},
        {"attention_bias": True, **NO_MTP},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_greedy_tokens_and_log_probabilities(changes: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(**changes)
    to_gguf(model, tmp_path / "model.gguf")
    tokens, worst = difference(model, tmp_path / "model.gguf")
    assert tokens == generate(model, PROMPT, GREEDY, temperature=0, stop=())
    assert worst < 1e-4


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: D of one head, 3 % off."""
    model = small_model()
    to_gguf(model, tmp_path / "model.gguf")
    with torch.no_grad():
        model.backbone.layers[0].mixer.D[3] *= 1.03
    assert difference(model, tmp_path / "model.gguf")[1] > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of a product too, so only the size of the difference is known."""
    model = small_model(dtype=dtype)
    to_gguf(model, tmp_path / "model.gguf")
    worst = difference(model.float(), tmp_path / "model.gguf")[1]
    assert worst < (0.15 if dtype == torch.bfloat16 else 0.02)


def texts() -> list[str]:
    """200 texts: source code, and what splits words in an unusual way."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = [
        "", " ", "  \n\n  x", "\t\tif a:\r\n", "it's we'll I'M", "naïve façade Ünïcödé",
        "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8", "\U0001f642\U0001f469\u200d\U0001f467 ok",
        "1234567 3.14 \u0661\u0662 \u00b2", "<|endoftext|>", "a<|endoftext|>b", "x = y  # ünd so",
        "\u00a0\u2003 z", "HTTPServer camelCase snake_case", "...!!! ??", "e\u0301 combining",
        "a\u200bb", "\x00\x7f",
    ]  # fmt: skip
    for name in ("ast.py", "html/entities.py", "email/header.py", "json/decoder.py", "turtle.py"):
        text = (folder / name).read_text(encoding="utf-8")
        found += [text[i : i + 211] for i in range(0, 38 * 211, 211)]
    return found[:200]


def rules() -> dict[str, Tokenizer]:
    """A tokenizer for each rule that is recognized."""
    made = {"refact": train_tokenizer(texts(), vocab_size=600, special_tokens=CHAT_TOKENS)}
    for name, steps, ignores in (
        ("gpt-2", [], False),
        ("tekken", [pre_tokenizers.Split(Regex(_TEKKEN), "isolated")], True),
    ):
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "tekken")
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignores))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts(), trainer)
        made[name] = tokenizer
    return made


def test_added_tokens_and_the_first_token(tmp_path: Path) -> None:
    """A token that is not special is taken from every text; the first one is added as ours is."""
    tokenizer = rules()["refact"]
    tokenizer.add_tokens(["<tool>", "<tool>s", "def"])
    model = small_model_with(tokenizer, 610)
    given = ["a <tool> b", "<tool>s<tool>", "undefined def <|endoftext|>", "", *texts()[20:40]]
    for template in (None, "<|endoftext|> $A"):
        if template:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=[("<|endoftext|>", 0)]
            )
        to_gguf(model, tmp_path / "model.gguf")
        tokenizer.encode_special_tokens = True
        with llama(tmp_path / "model.gguf") as reader:
            for text in given:
                assert reader.tokenize(text, special=True) == tokenizer.encode(text).ids, text
        tokenizer.encode_special_tokens = False


@pytest.mark.parametrize("stop", [31, 90, 77])
def test_a_text_ends_at_each_stop_token(stop: int, tmp_path: Path) -> None:
    model = model_with_drafts(0.5)
    model.companion_files["generation_config.json"] = b'{"eos_token_id": [31, 90, 77]}'
    to_gguf(model, tmp_path / "model.gguf")
    order = generate(model, [1], 126, temperature=0, stop=())
    before = order[order.index(stop) - 3]
    with llama(tmp_path / "model.gguf") as reader:
        answer = reader.complete([5, before], ignore_eos=False)
    assert answer["stop_type"] == "eos"
    ours = generate(model, [5, before], GREEDY, temperature=0)
    assert answer["tokens"] == ours
    assert ours[-1] == stop


@pytest.mark.parametrize("rule", ["gpt-2", "refact", "tekken"])
def test_texts_have_the_same_tokens(rule: str, tmp_path: Path) -> None:
    tokenizer = rules()[rule]
    model = small_model_with(tokenizer, 640)  # forty ids without a token
    to_gguf(model, tmp_path / "model.gguf")
    tokenizer.encode_special_tokens = True
    assert len(texts()) == 200
    with llama(tmp_path / "model.gguf") as reader:
        for text in texts():
            ours = tokenizer.encode(text, add_special_tokens=False).ids
            assert reader.tokenize(text) == ours, text


def small_model_with(tokenizer: Tokenizer, vocab_size: int) -> Nemotron:
    config = small_model().config.replace(vocab_size=vocab_size)
    model = Nemotron(config)
    model.tokenizer = tokenizer
    return model


@torch.no_grad()
def model_with_drafts(noise: float, **changes: Any) -> Nemotron:
    """A model whose text is a fixed order of tokens, and whose drafts are right in part.

    The head gives the token that follows the last one; mixers add little to that. The MTP module
    does the same, but its mixers add so much that some drafts are wrong. The mean of what it adds
    to the residual stream is zero: then its last norm is a LayerNorm, which llama.cpp computes, and
    an RMSNorm at once.
    """
    model = small_model(pattern="M*E", vocab_size=128, **changes)
    assert model.mtp is not None
    width, table = model.config.hidden_size, model.backbone.embeddings.weight
    order = 1 + torch.randperm(127, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight[order.roll(-1)] = table[order]
    for name, weight in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2_latent_proj.weight",
                          "shared_experts.down_proj.weight", "o_proj.bias")):  # fmt: skip
            weight *= noise if name.startswith("mtp.") else 0.02
            if name.startswith("mtp."):
                weight -= weight.mean(0)
    join = model.mtp.layers[0].eh_proj.weight
    join[:, :width] = torch.eye(width)
    join[:, width:] *= 0.1 * noise
    join -= join.mean(0)
    return model


@pytest.fixture
def first_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our drafter begin as llama.cpp does: the first token with a hidden state of zeros."""
    add_prompt = Drafter.add_prompt

    def add(self: Drafter, hidden: torch.Tensor, **given: Any) -> None:
        if given["start"] == 0:
            self._read(torch.zeros_like(hidden[:, :1]), given["prompt"][:, :1], None)
        add_prompt(self, hidden, **given)

    monkeypatch.setattr(Drafter, "add_prompt", add)


def compare_drafts(model: Nemotron, draft: int, file: Path) -> None:
    """Texts, and the numbers of drafted and of accepted tokens, for three prompts."""
    to_gguf(model, file)
    speculation = SpeculationOptions(draft_length=draft, adaptive=False)
    with llama(file, draft=draft) as reader:
        for start in (1, 30, 60):
            prompt = list(range(start, start + 12))
            answer = reader.complete(prompt, 40)
            tokens, statistics = generate(
                model, prompt, 40, temperature=0, stop=(), speculation=speculation,
                return_statistics=True,
            )  # fmt: skip
            assert answer["tokens"] == tokens
            accepted = sum(statistics.accepted)
            assert 0 < accepted < statistics.drafted
            found = answer["timings"]
            assert (found["draft_n"], found["draft_n_accepted"]) == (statistics.drafted, accepted)


@pytest.mark.parametrize("draft", [1, 3, 5])
def test_as_many_drafts_are_made_and_accepted(draft: int, tmp_path: Path) -> None:
    compare_drafts(model_with_drafts(0.5), draft, tmp_path / "model.gguf")


@pytest.mark.usefixtures("first_position")
@pytest.mark.parametrize("draft", [1, 4])
def test_with_its_first_position_all_drafts_are_the_same(draft: int, tmp_path: Path) -> None:
    """Where the module's attention matters so much that most drafts are wrong."""
    compare_drafts(model_with_drafts(0.9), draft, tmp_path / "model.gguf")


@pytest.mark.usefixtures("first_position")
def test_drafts_of_a_module_with_biases(tmp_path: Path) -> None:
    model = model_with_drafts(0.7, attention_bias=True)
    assert model.mtp is not None
    bias = model.mtp.get_parameter("layers.0.mixer.o_proj.bias")
    assert bias.abs().max() > 0.1
    compare_drafts(model, 4, tmp_path / "model.gguf")


def test_without_mtp_there_are_no_drafts(tmp_path: Path) -> None:
    model = small_model()
    to_gguf(model, tmp_path / "model.gguf", mtp=False)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert not any("nextn" in name or name.startswith("blk.5.") for name in names)
    assert difference(model, tmp_path / "model.gguf")[1] < 1e-4


@pytest.mark.parametrize("pattern", ["M*E", "M*-"])
def test_nvfp4_stays_packed(pattern: str, tmp_path: Path) -> None:
    """llama.cpp rounds inputs to 8 bits there; a wrong code or scale is off by more than 0.2."""
    model = packed_model(pattern)
    to_gguf(model, tmp_path / "model.gguf", unpack=True)
    assert difference(model, tmp_path / "model.gguf")[1] < 0.2
