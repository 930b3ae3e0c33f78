"""`nemotron-lite generate`: continue a prompt, and show the text as it comes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_lite.cli.common import DTYPES, Seed, app, note, plain_errors, say
from nemotron_lite.cli.common import write as show
from nemotron_lite.cli.inputs import read_model, read_prompt
from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions

if TYPE_CHECKING:
    from nemotron_lite.generation.speculative import Statistics
    from nemotron_lite.model import Nemotron

SSM_DTYPES = ("float32", "float16")
DEFAULT, DEFAULT_DRAFT = GenerationOptions(), SpeculationOptions()

Temperature = Annotated[float, typer.Option(help="0 takes the most likely token")]
TopP = Annotated[
    float | None, typer.Option(help="smallest set of tokens with this probability; 1 keeps all")
]
TopK = Annotated[int | None, typer.Option(help="the most likely tokens only, this many")]


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="checkpoint folder")],
    prompt: Annotated[
        str | None, typer.Option(help="what to continue; - reads it from standard input")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="file with the text to continue, in UTF-8")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print one object: prompt, text, tokens, tokens_per_second"),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="the most tokens to write")
    ] = DEFAULT.max_new_tokens,
    temperature: Temperature = DEFAULT.temperature,
    top_p: TopP = DEFAULT.top_p,
    top_k: TopK = DEFAULT.top_k,
    seed: Seed = 0,
    dtype: Annotated[str | None, typer.Option(help=f"of the weights: {', '.join(DTYPES)}")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="keep quantized weights packed in memory")
    ] = False,
    ssm_dtype: Annotated[
        str,
        typer.Option(help=f"of the SSM states: {', '.join(SSM_DTYPES)}; float16 halves them"),
    ] = "float32",
    prepare_weights: Annotated[
        bool,
        typer.Option(
            "--prepare-weights/--no-prepare-weights",
            help="copy weights into a faster layout, where the CPU gains; their memory doubles",
        ),
    ] = DEFAULT.prepare_weights,
    draft: Annotated[
        str | None, typer.Option(help="mtp: the MTP module drafts, the backbone verifies")
    ] = None,
    draft_length: Annotated[
        int, typer.Option(help="the most tokens of a draft")
    ] = DEFAULT_DRAFT.draft_length,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--fixed", help="draft only as far as it pays")
    ] = DEFAULT_DRAFT.adaptive,
) -> None:
    """Continue a prompt with a checkpoint, token by token or with drafts of several."""
    with plain_errors():
        text = read_prompt(prompt, prompt_file)
        if ssm_dtype not in SSM_DTYPES:
            raise ValueError(f"--ssm-dtype {ssm_dtype}: expected one of {', '.join(SSM_DTYPES)}.")
        speculation = None
        if draft not in (None, "mtp"):
            raise ValueError(
                f"--draft {draft}: expected mtp. Omit this option to decode without drafts."
            )
        if draft is not None:
            speculation = SpeculationOptions(draft_length=draft_length, adaptive=adaptive)
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            speculation=speculation,
            prepare_weights=prepare_weights,
        )
        import torch

        if ssm_dtype == "float16":
            options = options.replace(ssm_dtype=torch.float16)
        loaded = read_model(model, dtype, packed=packed)
        if as_json:
            _print_json(loaded, text, options)
            return
        show(text, style="dim")
        speed, statistics = write(loaded, text, options)
        note(f"{speed:,.1f} tokens/s")
        if speculation is not None:
            note(str(statistics))


def write(
    model: Nemotron, prompt: str | list[int], options: GenerationOptions
) -> tuple[float, Statistics]:
    """Continue `prompt` and print the text as it is written; returns tokens per second."""
    from nemotron_lite.generation.generate import stream

    pieces = stream(model, prompt, options=options)
    started, count = time.perf_counter(), 0
    for piece in pieces:
        count += 1
        show(piece)
    say()
    return count / (time.perf_counter() - started), pieces.statistics


def _print_json(model: Nemotron, prompt: str, options: GenerationOptions) -> None:
    """The whole answer as one object, for programs; ASCII, so that every encoding can hold it."""
    from nemotron_lite.generation.generate import stream

    started = time.perf_counter()
    pieces = list(stream(model, prompt, options=options))
    found = {
        "prompt": prompt,
        "text": "".join(pieces),
        "tokens": len(pieces),
        "tokens_per_second": round(len(pieces) / (time.perf_counter() - started), 3),
    }
    say(json.dumps(found))
