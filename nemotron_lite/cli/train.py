"""`nemotron-lite train`: a training run with all common options, which can be resumed.

    nemotron-lite train --out runs/mine --steps 500
    nemotron-lite train --out runs/mine --steps 500 --resume
    nemotron-lite train --out runs/tuned --init-from runs/mine/model --text notes.jsonl --steps 100

OUT holds the run (checkpoints, log.jsonl, tokenizer.json) and OUT/model the finished model. The
output folders are tried before anything else is done. If the model cannot be written in the end,
nothing is lost: the last checkpoint holds it, and the same command with --resume writes it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_lite.cli.common import (
    JsonlField,
    ModelSizes,
    Precision,
    Seed,
    Text,
    app,
    note,
    out,
    plain_errors,
    say,
    settings,
    working,
)
from nemotron_lite.cli.inputs import check_memory, for_our_tokenizer, read_config
from nemotron_lite.files import check_writable_folder
from nemotron_lite.input_files import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nemotron_lite.config import NemotronConfig
    from nemotron_lite.data import TextData
    from nemotron_lite.model import Nemotron

Seconds = Annotated[float | None, typer.Option(help="training time")]
Accumulation = Annotated[int, typer.Option(help="micro-batches per update")]
Recompute = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="needs less memory and more time")
]
InitFrom = Annotated[
    Path | None,
    typer.Option(help="checkpoint to start from, with its sizes and its tokenizer"),
]
Logs = Annotated[
    list[str] | None, typer.Option("--log", help="beside log.jsonl: csv, tensorboard; repeatable")
]
Windows = Annotated[
    list[int] | None,
    typer.Option(
        help="with --merge-every and --eval-every: updates of a merge that is scored at each "
        "validation; repeatable"
    ),
]
Optimizer = Annotated[str, typer.Option(help="adamw, or muon for matrices")]
Allowed = Annotated[
    list[str] | None,
    typer.Option("--allow-changed", help="what may differ in a resumed run; repeatable"),
]


@app.command()
def train(
    save_to: Annotated[Path, typer.Option("--out", help="folder of the run")],
    model: ModelSizes = "lite",
    init_from: InitFrom = None,
    steps: Annotated[int | None, typer.Option(help="optimizer updates")] = None,
    max_seconds: Seconds = None,
    batch_size: Annotated[
        int | None, typer.Option(help="rows per micro-batch; 2 if not given")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens per row; 256 if not given")] = None,
    gradient_accumulation_steps: Accumulation = 1,
    gradient_checkpointing: Recompute = False,
    vocab_size: Annotated[
        int | None, typer.Option(help="tokenizer size; the model's if not given")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="peak learning rate, 0.0025 if not given; the last is a hundredth of it"),
    ] = None,
    optimizer: Optimizer = "adamw",
    precision: Precision = "fp32",
    eval_every: Annotated[
        int | None, typer.Option(help="updates between validations; none if not given")
    ] = None,
    eval_batches: Annotated[
        int | None, typer.Option(help="batches of a validation; 8 if not given")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="updates between checkpoints; every 10 minutes if not given")
    ] = None,
    merge_every: Annotated[
        int | None, typer.Option(help="updates between snapshots for `merge`; none if not given")
    ] = None,
    merge_window: Windows = None,
    log: Logs = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    allow_changed: Allowed = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="resume from the newest intact checkpoint")
    ] = False,
    seed: Seed = 0,
    text: Text = None,
    jsonl_field: JsonlField = "text",
) -> None:
    """Train a model on text and save it to OUT/model in Hugging Face's layout.

    It needs --steps or --max-seconds. The rest of the recipe is `nemotron_lite.train.TrainConfig`.
    """
    with plain_errors():
        from nemotron_lite.cli import tables
        from nemotron_lite.data import ConcatenatedDocuments, concatenate_documents
        from nemotron_lite.train import TrainConfig, evaluate
        from nemotron_lite.train import train as train_model

        given: dict[str, Any] = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "lr": lr,
            "min_lr": lr and lr / 100,
            "eval_batches": eval_batches,
        }
        how = TrainConfig(
            steps=steps,
            max_seconds=max_seconds,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
            precision=precision,
            eval_every=eval_every,
            save_every=save_every,
            merge_every=merge_every,
            merge_windows=tuple(merge_window or ()),
            seed=seed,
            **{name: value for name, value in given.items() if value is not None},
        )
        config, loaded = _model_to_train(model, init_from, vocab_size)
        for folder in (save_to, save_to / "model"):
            check_writable_folder(folder)
        tokenizer = None if loaded is None else loaded.tokenizer
        if resume:
            tokenizer = _tokenizer_of_run(save_to) or tokenizer
        data = _text(config, text, tokenizer, jsonl_field)
        built = loaded or _new_model(config, seed)
        validation = None
        if eval_every is not None:
            documents = concatenate_documents(data.held_out.documents)
            validation = ConcatenatedDocuments(*documents)
        try:
            result = train_model(
                built,
                data,
                how,
                out_dir=save_to,
                resume=resume,
                progress=not settings.quiet,
                validation=validation,
                logs=log or (),
                allow_changes=allow_changed or (),
                skip_damaged=skip_damaged,
            )
        except ImportError as error:  # of a log's package
            raise ValueError(str(error)) from error
        _save(built, save_to / "model", data.tokenizer, result.checkpoint)
        if result.interrupted:
            say(f"Stopped at step {result.step}. Continue with --resume.")
            return
        if result.best is not None:
            say(
                f"Lowest validation loss: {result.best['loss']:.4f} after update "
                f"{result.best['step']}."
            )
        with working("scoring files it has never seen"):
            score = evaluate(built.eval(), data.held_out)
        ours = [("this Nemotron", score.bits_per_byte, "the training text")]
        out.print(tables.score_table(ours, data.baselines))
        say(f"The model is in {save_to / 'model'}.")


def _model_to_train(
    which: str, init_from: Path | None, vocab_size: int | None
) -> tuple[NemotronConfig, Nemotron | None]:
    """The sizes, and the model with its weights if the run starts from a checkpoint."""
    if init_from is None:
        config = for_our_tokenizer(read_config(which), vocab_size)
        check_memory(config)
        return config, None
    import torch

    from nemotron_lite.checkpoint import load

    if which != "lite":
        raise ValueError(
            f"--model {which} and --init-from {init_from} do not fit together: the sizes are those "
            "of the checkpoint. Leave --model out."
        )
    check_memory(read_config(str(init_from)))
    loaded = load(init_from)
    config = loaded.config
    if loaded.tokenizer is None:
        raise ValueError(
            f"{init_from} has no tokenizer.json, so text cannot be encoded for it: copy the "
            "model's tokenizer there."
        )
    if vocab_size not in (None, config.vocab_size):
        raise ValueError(
            f"--vocab-size {vocab_size}: the checkpoint has {config.vocab_size} tokens, and its "
            "tokenizer is used. Leave this option out."
        )
    dtypes = {p.dtype for p in loaded.parameters()} - {torch.float32}
    if dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        note(
            f"The weights in {init_from} are {names}. They are trained in float32, and the trained "
            "model is saved in float32."
        )
    return config, loaded.float()


def _new_model(config: NemotronConfig, seed: int) -> Nemotron:
    from nemotron_lite.model import Nemotron

    return Nemotron(config, seed=seed)


def _tokenizer_of_run(folder: Path) -> Tokenizer | None:
    """The tokenizer that a run started with; None if it did not keep one."""
    from tokenizers import Tokenizer

    from nemotron_lite.train.run_folder import TOKENIZER

    file = folder / TOKENIZER
    try:
        return Tokenizer.from_str(read_text(file))
    except FileNotFoundError:
        return None
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(
            f"{file} is no tokenizer ({error}). Copy it from {folder / 'model'}, or delete it if "
            "the run trained its tokenizer on the same text."
        ) from error


def _text(
    config: NemotronConfig, text: Path | None, tokenizer: Tokenizer | None, jsonl_field: str
) -> TextData:
    """The text to train on; encoded with `tokenizer`, or with one that is trained on it."""
    from nemotron_lite.data import prepare

    if tokenizer is not None:
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= config.vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {largest}, but the model has only "
                f"{config.vocab_size} tokens: give the tokenizer of this model."
            )
    what = "training a tokenizer" if tokenizer is None else "encoding them"
    with working(f"reading files, {what}, measuring gzip and n-grams"):
        return prepare(
            vocab_size=config.vocab_size,
            root=text,
            tokenizer=tokenizer,
            special_ids=(config.bos_token_id, config.eos_token_ids[0]),
            text_field=jsonl_field,
        )


def _save(model: Nemotron, folder: Path, tokenizer: Tokenizer, checkpoint: Path | None) -> None:
    """Save the finished model; an error says that the training is not lost."""
    from nemotron_lite.checkpoint import save

    try:
        save(model, folder, tokenizer)
    except Exception as error:
        raise OSError(
            f"the model cannot be saved to {folder}: {error} The training is not lost: it is in "
            f"{checkpoint}. Remove the cause, and run the same command with --resume to save the "
            "model again."
        ) from error
