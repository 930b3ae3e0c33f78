"""`nemotron-lite run`: build, train, score and use a small model, in under three minutes.

The output folder is tried before anything else is done, and the model is saved as soon as it is
trained. If the folder cannot be written by then, the model goes to a temporary folder.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nemotron_lite.cli.common import (
    ModelSizes,
    Precision,
    Seed,
    Text,
    app,
    out,
    plain_errors,
    program,
    say,
    settings,
    title,
    working,
)
from nemotron_lite.cli.generate import write
from nemotron_lite.cli.inputs import check_memory, for_our_tokenizer, prepare_text, read_config
from nemotron_lite.cli.outputs import save_model
from nemotron_lite.cli.terminal import write as show
from nemotron_lite.files import check_writable_folder
from nemotron_lite.generation.options import GenerationOptions

# Below the default of `generate`: a model trained for minutes writes better text this way.
TEMPERATURE = 0.7
SAMPLE_PROMPT = "import os\nimport sys\n\n\ndef "


@app.command()
def run(
    max_seconds: Annotated[float, typer.Option(help="of training")] = 105.0,
    seed: Seed = 0,
    save_to: Annotated[Path, typer.Option("--out", help="where the model goes")] = Path(
        "runs/lite"
    ),
    model: ModelSizes = "lite",
    precision: Precision = "fp32",
    text: Text = None,
) -> None:
    """Build a small Nemotron 3 Super, train it on this machine's Python files, and use it.

    Takes under three minutes on two cores.
    """
    with plain_errors():
        from nemotron_lite.cli import tables
        from nemotron_lite.model import Nemotron
        from nemotron_lite.train import TrainConfig, evaluate
        from nemotron_lite.train import train as train_model

        config = for_our_tokenizer(read_config(model))
        # A few hundred updates: the routers' biases have to move faster than in a run of a million.
        how = TrainConfig(max_seconds=max_seconds, bias_rate=0.02, precision=precision, seed=seed)
        check_memory(config)
        check_writable_folder(save_to)
        title(1, f"Assemble: {config.pattern}")
        out.print(tables.brief_table(config, how.seq_len))
        built = Nemotron(config, seed=seed)

        title(2, "Read: Python source on this machine")
        data = prepare_text(config, text)
        say(
            f"{len(data.train):,} training tokens in {data.train_bytes / 1e6:.1f} MB; "
            f"{data.held_out.num_bytes:,} bytes held out"
        )

        title(3, f"Train: {max_seconds:.0f} seconds")
        built.tokenizer = data.tokenizer
        result = train_model(built, data, how, progress=not settings.quiet)
        save_model(built, save_to)
        if result.interrupted:
            say(f"Stopped at step {result.step}. The model so far is in {save_to}.")
            return

        title(4, "Score: bits per byte of files it has never seen (lower is better)")
        with working("scoring"):
            score = evaluate(built.eval(), data.held_out)
        out.print(tables.score_table(score.bits_per_byte, data.baselines))

        title(5, "Write")
        show(SAMPLE_PROMPT, style="dim")
        options = GenerationOptions(max_new_tokens=160, temperature=TEMPERATURE, seed=seed)
        speed, _ = write(built, SAMPLE_PROMPT, options)
        say(
            f"\nTraining read {result.tokens / result.seconds:,.0f} tokens/s, "
            f"scoring {score.tokens_per_second:,.0f}; writing took {speed:,.0f} tokens/s.\n"
            f"The model is in {save_to}. Continue with it:\n"
            f"  {program()} generate --model {shlex.quote(str(save_to))} "
            f'--temperature {TEMPERATURE} --prompt "class Tree:"'
        )
