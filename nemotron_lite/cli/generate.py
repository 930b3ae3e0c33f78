"""`nemotron-lite generate`: continue a prompt, and show the tokens as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from nemotron_lite.cli.common import DTYPES, Seed, app, err, out, plain_errors
from nemotron_lite.cli.inputs import read_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nemotron_lite.model import Nemotron

STATES = ("float32", "float16")
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token")]
TopP = Annotated[float | None, typer.Option(help="smallest set of tokens with this probability")]
TopK = Annotated[int | None, typer.Option(help="the likeliest tokens only")]


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="checkpoint folder")],
    prompt: Annotated[str, typer.Option(help="what to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="most tokens to write")] = 200,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = None,
    seed: Seed = 0,
    dtype: Annotated[str | None, typer.Option(help=f"of the weights: {', '.join(DTYPES)}")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="keep quantized weights packed in memory")
    ] = False,
    ssm_dtype: Annotated[
        str, typer.Option(help=f"of the SSM states: {', '.join(STATES)}; float16 halves them")
    ] = "float32",
    draft: Annotated[
        str | None, typer.Option(help="mtp: the MTP module drafts, the backbone verifies")
    ] = None,
    draft_length: Annotated[int, typer.Option(help="most tokens of a draft")] = 4,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--fixed", help="draft only as far as it pays")
    ] = True,
) -> None:
    """Continue a prompt with a checkpoint, token by token or with drafts of several."""
    with plain_errors():
        if ssm_dtype not in STATES:
            raise ValueError(f"--ssm-dtype {ssm_dtype}: expected one of {', '.join(STATES)}.")
        import torch

        from nemotron_lite.generation.decoding import stream
        from nemotron_lite.generation.speculative import Statistics

        loaded = read_model(model, dtype, packed=packed)
        ids = loaded.tokenizer.encode(prompt).ids or [loaded.config.bos_token_id]
        statistics = Statistics()
        writing = stream(
            loaded, [ids], max_new_tokens, stop=loaded.config.eos_token_ids,
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
            draft=draft, draft_length=draft_length, adaptive=adaptive, statistics=statistics,
            ssm_dtype=torch.float16 if ssm_dtype == "float16" else None,
        )  # fmt: skip
        out.print(f"[dim]{escape(prompt)}[/]", end="", soft_wrap=True)
        speed = show(writing, loaded.tokenizer, ids)
        err.print(f"[dim]{speed:,.1f} tokens/s[/]")
        if draft is not None:
            err.print(f"[dim]{statistics}[/]", soft_wrap=True)


def write(
    model: Nemotron, tokenizer: Tokenizer, ids: list[int], most: int, **sampling: Any
) -> float:
    """Continue `ids` and print it as it is written; returns tokens per second."""
    from nemotron_lite.generation.decoding import stream

    writing = stream(model, [ids], most, stop=model.config.eos_token_ids, **sampling)
    return show(writing, tokenizer, ids)


def show(writing: Iterator[list[int | None]], tokenizer: Tokenizer, ids: list[int]) -> float:
    """Print one row's tokens as they come, behind `ids`; returns tokens per second."""
    from tokenizers.decoders import DecodeStream

    # A token may end in the middle of a character: the decoder holds such bytes back.
    decoder = DecodeStream(ids=ids, skip_special_tokens=True)
    started, count = time.perf_counter(), 0
    for (token,) in writing:
        assert token is not None
        count += 1
        piece = decoder.step(tokenizer, token)
        if piece:
            out.file.write(piece)
            out.file.flush()
    out.print()
    return count / (time.perf_counter() - started)
