"""llama.cpp as a peer on a CPU: our model as a GGUF file, run by the server inside `xllamacpp`.

The Python package `xllamacpp` is llama.cpp with its server in this process. It has no calls of its
own for a batch of tokens, so the server is asked over HTTP, and the times are those that it
measures itself and puts into each answer (`timings`):

    prompt_ms       from the first token of the prompt until its last logits
    predicted_ms    from the first new token until the last one: one step fewer than new tokens

HTTP, JSON and the tokenizer are in neither. A sampler that takes the most likely token is in the
second, as it is in ours.

Eight rows are eight prompts in one request. `n_batch` is large enough for all of them, so the
server reads them in one batch, all rows begin to write at the same step, and each step is one batch
of eight tokens. `Rows` checks this with the times of the rows.

The next call continues the text: the server keeps the state of each row (`cache_prompt`) and reads
only the last token again. So a round costs its steps, and not the prompt.

Settings: as many threads as torch has; keys and values in float32 for a float32 file, and in
float16, llama.cpp's default, for another; no checkpoints of the states and no cache of earlier
prompts, which cost time; the rest is llama.cpp's default. Flash attention is an argument:
`cpu_peers` tries both.
Left out: drafts of the MTP module.
"""

from __future__ import annotations

import copy
import gc
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.measure import Timed
from nemotron_lite import Nemotron
from nemotron_lite.export import to_gguf

TIMEOUT = 1800.0  # seconds for one answer: a prompt of 32K tokens on a slow machine
TOGETHER = 0.5  # of the longest time that a row writes, which every row must reach


def write_file(model: Nemotron, file: Path) -> None:
    """Write a model as GGUF; a model without a tokenizer gets one of letters.

    The benchmarks give token ids, so the tokenizer is only there because the format needs one.
    """
    if model.tokenizer is None:
        model = copy.copy(model)
        model.tokenizer = letters()
    to_gguf(model, file, mtp=False)


def letters() -> Tokenizer:
    """A byte-level tokenizer of 97 tokens: ASCII characters and, as the format asks, one merge.

    None is called `<|endoftext|>`: llama.cpp knows such names, and would never write that token.
    """
    tokens = ["Ċ", "Ġ", *map(chr, range(33, 127)), "ĠĠ"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Server:
    """A running server with one model."""

    def __init__(self, address: str, rows: int) -> None:
        self.address = address
        self.rows = rows

    def complete(
        self, prompts: Sequence[Sequence[int]], count: int, *, keep: bool
    ) -> list[dict[str, Any]]:
        """Continue each prompt by `count` most likely tokens; the answers in order of the prompts.

        Args:
            prompts: at most `rows` lists of token ids.
            count: new tokens of each.
            keep: continue the state of a row where the prompt begins with what the row has read.

        Raises:
            RuntimeError: a row wrote another number of tokens, or the server refused.
            ValueError: more prompts than rows.
        """
        if not 1 <= len(prompts) <= self.rows:
            raise ValueError(f"{len(prompts)} prompts: this server has {self.rows} rows.")
        body = {
            "prompt": list(map(list, prompts)) if len(prompts) > 1 else list(prompts[0]),
            "n_predict": count, "temperature": 0, "ignore_eos": True, "return_tokens": True,
            "cache_prompt": keep,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            found = json.load(answer)
        answers = sorted(found if isinstance(found, list) else [found], key=lambda a: a["index"])
        lengths = [len(each["tokens"]) for each in answers]
        if lengths != [count] * len(prompts):
            raise RuntimeError(
                f"llama.cpp wrote {lengths} tokens, expected {count} in each of {len(prompts)} "
                "rows: the context of the server may be too short."
            )
        return answers

    def prefill(self, prompt: Sequence[int]) -> tuple[Timed, int]:
        """Read a prompt from its beginning: (seconds, the most likely next token)."""
        (answer,) = self.complete([prompt], 1, keep=False)
        times = answer["timings"]
        if times["prompt_n"] != len(prompt):
            raise RuntimeError(
                f"llama.cpp read {times['prompt_n']} of {len(prompt)} tokens: the others were "
                "cached, and the time is not that of the prompt."
            )
        return Timed(times["prompt_ms"] / 1000), answer["tokens"][0]


class Rows:
    """Rows that are written in parallel, a few tokens per call."""

    def __init__(self, server: Server, prompts: Sequence[Sequence[int]]) -> None:
        self.server = server
        self.texts = [list(prompt) for prompt in prompts]
        self.written: list[list[int]] = [[] for _ in prompts]

    def step(self, steps: int) -> Timed:
        """Seconds of `steps` steps of all rows; each row grows by `steps + 1` tokens.

        The first of these tokens comes from reading the text so far, which is not counted.

        Raises:
            RuntimeError: the rows did not begin together.
        """
        answers = self.server.complete(self.texts, steps + 1, keep=True)
        for text, written, answer in zip(self.texts, self.written, answers, strict=True):
            text += answer["tokens"]
            written += answer["tokens"]
        seconds = [answer["timings"]["predicted_ms"] / 1000 for answer in answers]
        if min(seconds) < TOGETHER * max(seconds):
            raise RuntimeError(
                f"the rows wrote for {min(seconds):.3f} to {max(seconds):.3f} s: they did not "
                "begin together, so the time is not that of all rows in one batch."
            )
        return Timed(max(seconds))


@contextmanager
def serve(
    file: Path, *, rows: int, context: int, flash_attention: bool = False, exact: bool = True
) -> Iterator[Server]:
    """Load a file for `rows` rows of at most `context` tokens each.

    Args:
        file: the GGUF file.
        rows: rows that can be written in parallel.
        context: the most tokens of a row.
        flash_attention: llama.cpp's fused attention.
        exact: keys and values in float32; otherwise in float16, llama.cpp's default.

    Raises:
        ImportError: `xllamacpp` is not installed.
    """
    import xllamacpp

    threads = torch.get_num_threads()
    attention = xllamacpp.llama_flash_attn_type
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = rows * context, rows, 0
    params.n_batch = max(rows * context, params.n_ubatch)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = (
        attention.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if flash_attention
        else attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.n_ctx_checkpoints = params.cache_ram_mib = 0
    params.warmup = params.fit_params = False
    params.verbosity = 0
    running = xllamacpp.Server(params)
    try:
        yield Server(running.listening_address, rows)
    finally:
        del running  # ends its threads
        gc.collect()
