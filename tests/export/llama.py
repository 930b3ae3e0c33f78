"""llama.cpp as the reader of exported files: its server inside this process, asked over HTTP.

Keys, values and products are float32, and flash attention is off: it rounds its mask and sums to
float16, which changes log-probabilities by 1e-3 in models this small.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemotron_lite import Nemotron, NemotronConfig
from nemotron_lite.quantization import quantizable_modules, quantize_model, single_format
from tests.checkpoint.tiny import TINY, randomize

GREEDY = 24  # tokens
NO_MTP: dict[str, Any] = {"mtp_pattern": "", "mtp_depths": 0}
# Every row has a multiple of 64 numbers.
WIDE: dict[str, Any] = dict(
    hidden_size=64, mamba_num_heads=8, mamba_head_dim=16, head_dim=16, moe_intermediate_size=64,
    moe_latent_size=64, moe_shared_expert_intermediate_size=128, intermediate_size=64,
)  # fmt: skip


class Llama:
    """A running server."""

    def __init__(self, server: Any) -> None:
        self.address = server.listening_address

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": False}
        return self.post("/tokenize", body)["tokens"]

    def complete(
        self,
        ids: Sequence[int],
        count: int = GREEDY,
        probabilities: int = 0,
        *,
        ignore_eos: bool = True,
    ) -> dict[str, Any]:
        """Greedy tokens and, on request, log-probabilities of the most likely ones."""
        return self.post(
            "/completion",
            {
                "prompt": list(ids), "n_predict": count, "temperature": 0, "ignore_eos": ignore_eos,
                "n_probs": probabilities, "return_tokens": True, "cache_prompt": False,
            },
        )  # fmt: skip


@contextmanager
def llama(path: Path, *, draft: int = 0, context: int = 512) -> Iterator[Llama]:
    """Load a file; with `draft`, its MTP module drafts that many tokens."""
    float32 = xllamacpp.ggml_type.GGML_TYPE_F32
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = float32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.fit_params = False
    params.verbosity = 0
    if draft:
        speculative, drafts = params.speculative, params.speculative.draft
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        drafts.n_max, drafts.n_min, drafts.p_min = draft, 0, 0.0
        drafts.cache_type_k = drafts.cache_type_v = float32
        drafts.cpuparams.n_threads = drafts.cpuparams_batch.n_threads = 1
        params.load_mtp = True
    server = xllamacpp.Server(params)
    try:
        yield Llama(server)
    finally:
        del server  # ends its threads


def ascii_tokenizer(size: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose every token is a printable text, of exactly this size.

    A server sends no probabilities for a token that ends inside a character.
    """
    letters = ["Ċ", "Ġ", *map(chr, range(33, 127))]
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *letters])}
    merges = [(a, b) for a in "thinsreao" for b in "thinsreao"][: size - len(vocab)]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    assert len(vocab) == size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def small_model(seed: int = 0, dtype: torch.dtype | None = None, **changes: Any) -> Nemotron:
    """A model that a GGUF file can hold, with a tokenizer and no weight at its initial value."""
    config: NemotronConfig = TINY.replace(
        **{"pattern": "MEM*E", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **changes}
    )
    model = Nemotron(config)
    randomize(model.state_dict().items(), seed)
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # never the best token: `complete` forbids the end of text
    model.tokenizer = ascii_tokenizer(config.vocab_size)
    return model.to(dtype) if dtype else model


def packed_model(pattern: str = "M*E", format: str = "nvfp4", **changes: Any) -> Nemotron:
    """A model whose every quantizable module is packed."""
    mtp = NO_MTP if "-" in pattern else {}
    model = small_model(pattern=pattern, **{**WIDE, **mtp, **changes})
    return quantize_model(model, single_format(quantizable_modules(model), format))
