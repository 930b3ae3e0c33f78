"""`nemotron-lite train`: a training run with all common options, which can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from nemotron_lite.cli.common import ModelSizes, Precision, Seed, Text, app, out, plain_errors
from nemotron_lite.cli.inputs import check_memory, for_our_tokenizer, prepare_text, read_config

Seconds = Annotated[float | None, typer.Option(help="training time")]
Accumulation = Annotated[int, typer.Option(help="micro-batches per update")]


@app.command()
def train(
    save_to: Annotated[Path, typer.Option("--out", help="folder of the run")],
    model: ModelSizes = "lite",
    steps: Annotated[int | None, typer.Option(help="optimizer updates")] = None,
    max_seconds: Seconds = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per micro-batch")] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens per row")] = None,
    gradient_accumulation_steps: Accumulation = 1,
    vocab_size: Annotated[
        int | None, typer.Option(help="tokenizer size; the model's if not given")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="peak learning rate; the last one is a hundredth of it")
    ] = None,
    precision: Precision = "fp32",
    save_every: Annotated[int | None, typer.Option(help="updates between checkpoints")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in --out")] = False,
    seed: Seed = 0,
    text: Text = None,
) -> None:
    """Train a model on Python source code and save it to OUT/model in Hugging Face's layout.

    Options that are not given have the defaults of `nemotron_lite.train.TrainConfig`.
    """
    with plain_errors():
        from nemotron_lite.checkpoint import save
        from nemotron_lite.cli import tables
        from nemotron_lite.model import Nemotron
        from nemotron_lite.train import TrainConfig, evaluate
        from nemotron_lite.train import train as train_model

        config = for_our_tokenizer(read_config(model), vocab_size)
        given: dict[str, Any] = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "lr": lr,
            "min_lr": lr and lr / 100,
        }
        how = TrainConfig(
            steps=steps,
            max_seconds=max_seconds,
            gradient_accumulation_steps=gradient_accumulation_steps,
            precision=precision,
            save_every=save_every,
            seed=seed,
            **{name: value for name, value in given.items() if value is not None},
        )
        check_memory(config)
        data = prepare_text(config, text)
        built = Nemotron(config, seed=seed)
        result = train_model(built, data, how, out_dir=save_to, resume=resume)
        save(built, save_to / "model", data.tokenizer)
        if result.interrupted:
            out.print(f"Stopped at step {result.step}. Continue with --resume.")
            return
        score = evaluate(built.eval(), data.held_out)
        out.print(tables.score_table(score.bits_per_byte, data.baselines))
        out.print(f"The model is in {escape(str(save_to / 'model'))}.", soft_wrap=True)
