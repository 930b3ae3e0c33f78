"""`nemotron-lite generate`: continue a prompt, and show the text as it comes.

    nemotron-lite generate --prompt "def "                    the model that comes with the package
    nemotron-lite generate --model runs/mine/model --prompt "def "
    git diff | nemotron-lite generate --prompt - --stop "class " --quiet
    nemotron-lite generate --prompt-file a.txt --samples 4 --json

Options of sampling that are not given are those of the model's generation_config.json; where it has
none, those of `GenerationOptions`. With `--json`, each continuation is one object on one line.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_lite.cli.common import (
    DTYPES,
    SHIPPED,
    ModelFolder,
    app,
    note,
    plain_errors,
    say,
    title,
)
from nemotron_lite.cli.common import write as show
from nemotron_lite.cli.inputs import read_model, read_prompt
from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions

if TYPE_CHECKING:
    from nemotron_lite.generation.speculative import Statistics
    from nemotron_lite.model import Nemotron

SSM_DTYPES = ("float32", "float16")
DEFAULT, DEFAULT_DRAFT = GenerationOptions(), SpeculationOptions()

Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token")]
SamplingSeed = Annotated[int, typer.Option("--seed", help="of sampling")]
TopP = Annotated[
    float | None, typer.Option(help="smallest set of tokens with this probability; 1 keeps all")
]
Compiled = Annotated[
    bool,
    typer.Option("--compiled", help="decode by C code, compiled for this CPU at the first use"),
]
TopK = Annotated[
    int | None, typer.Option(help="the most likely tokens only, this many; 0 keeps all")
]


@app.command()
def generate(
    model: ModelFolder = SHIPPED,
    prompt: Annotated[
        str | None, typer.Option(help="what to continue; - reads it from standard input")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="file with the text to continue, in UTF-8")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="an object a line: prompt, text, tokens, stop_reason, tokens_per_second",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="the most tokens to write; 200 if nothing else is said")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="tokens with at least this share of the best one's probability"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="above 1: tokens that were there before become less likely")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="end before this text; may be given several times"),
    ] = None,
    samples: Annotated[int, typer.Option(help="continuations to write")] = 1,
    seed: SamplingSeed = 0,
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
    compiled: Compiled = DEFAULT.compiled,
    draft: Annotated[
        str | None, typer.Option(help="mtp: the MTP module drafts, the backbone verifies")
    ] = None,
    draft_length: Annotated[
        int, typer.Option(help="the most tokens of a draft")
    ] = DEFAULT_DRAFT.draft_length,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--fixed", help="draft only as far as it pays")
    ] = DEFAULT_DRAFT.adaptive,
    check_layers: Annotated[
        bool, typer.Option("--check-layers", help="find the layer where NaN begins; slow")
    ] = False,
) -> None:
    """Continue a prompt with a checkpoint, token by token or with drafts of several."""
    with plain_errors():
        text = read_prompt(prompt, prompt_file)
        if samples < 1:
            raise ValueError(f"--samples {samples}: expected at least 1.")
        if ssm_dtype not in SSM_DTYPES:
            raise ValueError(f"--ssm-dtype {ssm_dtype}: expected one of {', '.join(SSM_DTYPES)}.")
        if draft not in (None, "mtp"):
            raise ValueError(
                f"--draft {draft}: expected mtp. Omit this option to decode without drafts."
            )
        given: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop_strings": tuple(stop) if stop else None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if top_k == 0:
            given["top_k"] = None
        given |= dict(
            seed=seed, prepare_weights=prepare_weights, compiled=compiled, check_layers=check_layers
        )
        if draft is not None:
            given["speculation"] = SpeculationOptions(draft_length=draft_length, adaptive=adaptive)
        GenerationOptions(**given)  # a wrong value is refused before the model is read
        import torch

        from nemotron_lite.generation.defaults import default_options

        if ssm_dtype == "float16":
            given["ssm_dtype"] = torch.float16
        loaded = read_model(model, dtype, packed=packed)
        options = default_options(loaded, given).replace(**given)
        if as_json or samples > 1:
            _write_samples(loaded, text, options, samples, as_json=as_json)
            return
        show(text, style="dim")
        speed, statistics = write(loaded, text, options)
        note(f"{speed:,.1f} tokens/s")
        if draft is not None:
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


def _write_samples(
    model: Nemotron, prompt: str, options: GenerationOptions, samples: int, *, as_json: bool
) -> None:
    """Print whole continuations; as JSON in ASCII, which every encoding can hold."""
    from nemotron_lite.generation.generate import generate as continue_prompt

    started = time.perf_counter()
    found = continue_prompt(
        model, prompt, options=options, num_samples=samples, return_details=True
    )
    speed = sum(len(result.tokens) for result in found) / (time.perf_counter() - started)
    for i, result in enumerate(found, start=1):
        if as_json:
            line = {
                "prompt": prompt, "text": result.text, "tokens": len(result.tokens),
                "stop_reason": result.stop_reason, "tokens_per_second": round(speed, 3),
            }  # fmt: skip
            say(json.dumps(line))
        else:
            title(i, "Sample")
            show(prompt, style="dim")
            say(result.text or "")
    if not as_json:
        note(f"{speed:,.1f} tokens/s")
