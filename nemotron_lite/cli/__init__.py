"""The command line: `nemotron-lite run | info | train | generate`.

    nemotron-lite run                               build, train, score and sample a small model
    nemotron-lite info super --context 1048576      what a model stores, costs and remembers
    nemotron-lite train --out runs/mine --steps 500
    nemotron-lite generate --model runs/mine/model --prompt "def "

A command here is a short story told with the package's public functions; nothing is computed in
this room that Python code could not do with the same calls. torch is imported inside the commands,
so that `--help` and `info` on a preset answer at once.

Mistakes of the caller (a wrong size, a missing file, a damaged checkpoint) end in one message and
exit code 1. `nemotron-lite --traceback ...` shows where a message came from.

Left out: fetching models from the hub, and several devices.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from nemotron_lite import ledger
from nemotron_lite.config import PRESETS, NemotronConfig
from nemotron_lite.precision import RECIPES, recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nemotron_lite.data import TextData
    from nemotron_lite.model import Nemotron

# Read by OpenMP when torch is imported: its idle threads give their core back at once. Where others
# use the machine too, spinning ones make training several times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

app = typer.Typer(
    help="A small Nemotron 3 Super: build it, train it, load it, write with it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
settings = SimpleNamespace(traceback=False)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

SAMPLE_PROMPT = "import os\nimport sys\n\n\ndef "
TRAINING_BYTES = 16  # per parameter in float32: weight, gradient and AdamW's two moments
DTYPES = ("float32", "bfloat16")

Which = Annotated[str, typer.Argument(help=f"{', '.join(PRESETS)}; or a folder with config.json")]
ModelSizes = Annotated[str, typer.Option("--model", help="a preset, or a config.json")]
Text = Annotated[
    Path | None, typer.Option(help="folder of .py files; the standard library if none")
]
Seconds = Annotated[float | None, typer.Option(help="of training")]
Seed = Annotated[int, typer.Option(help="of weights, data order and sampling")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token")]
TopP = Annotated[float | None, typer.Option(help="smallest set of tokens with this probability")]
Precision = Annotated[str, typer.Option(help=f"of matrix products: {', '.join(RECIPES)}")]
TopK = Annotated[int | None, typer.Option(help="the likeliest tokens only")]


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="show where an error came from")
    ] = False,
) -> None:
    settings.traceback = traceback


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Mistakes become one message and exit code 1."""
    try:
        yield
    except Exception as error:
        if settings.traceback or not _is_mistake(error):
            raise
        err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def info(
    model: Which = "lite",
    at: Annotated[int, typer.Option("--context", help="tokens of context")] = 8192,
    layers: Annotated[bool, typer.Option("--layers", help="list every layer")] = False,
    precision: Precision = "nvfp4",
) -> None:
    """Show a model's arithmetic: parameters, FLOPs, bytes remembered, and what runs in what."""
    with _plain_errors():
        from nemotron_lite.cli import tables

        config, chosen = read_config(model), recipe(precision)
        out.print(f"[bold]{escape(model)}[/]  {config.num_layers} layers  {config.pattern}\n")
        out.print(tables.parameter_table(config, out.width))
        if layers:
            out.print(tables.layer_table(config, chosen))
        out.print(tables.flops_table(config, at, out.width))
        out.print(tables.cache_table(config, at))
        out.print(tables.precision_table(config, chosen))
        if chosen.uses("nvfp4"):
            out.print(tables.gemm_table(chosen))


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
    """Assemble a small Nemotron 3 Super, train it on this machine's Python, score it, let it write.

    Takes under three minutes on two cores.
    """
    with _plain_errors():
        from nemotron_lite.checkpoint import save
        from nemotron_lite.cli import tables
        from nemotron_lite.data import END_OF_TEXT_ID
        from nemotron_lite.model import Nemotron
        from nemotron_lite.train import TrainConfig, evaluate
        from nemotron_lite.train import train as train_model

        config = for_our_tokenizer(read_config(model))
        # A few hundred updates: the routers' biases have to move faster than in a run of a million.
        how = TrainConfig(max_seconds=max_seconds, bias_rate=0.02, precision=precision, seed=seed)
        check_memory(config)
        _title(1, f"Assemble: {config.pattern}")
        out.print(tables.brief_table(config, how.length))
        built = Nemotron(config, seed=seed)

        _title(2, "Read: Python source on this machine")
        data = _prepare(config, text)
        out.print(
            f"{len(data.train):,} training tokens in {data.train_bytes / 1e6:.1f} MB; "
            f"{data.held_out.num_bytes:,} bytes held out"
        )

        _title(3, f"Train: {max_seconds:.0f} seconds")
        result = train_model(built, data, how)

        _title(4, "Score: bits per byte of files it has never seen (lower is better)")
        score = evaluate(built.eval(), data.held_out)
        out.print(tables.score_table(score.bits_per_byte, data.baselines))

        _title(5, "Write")
        out.print(f"[dim]{escape(SAMPLE_PROMPT)}[/]", end="")
        ids = [END_OF_TEXT_ID, *data.tokenizer.encode(SAMPLE_PROMPT).ids]
        speed = write(built, data.tokenizer, ids, 160, temperature=0.7, top_p=0.95, seed=seed)
        save(built, save_to, data.tokenizer)
        out.print(
            f"\nTraining read {result.tokens / result.seconds:,.0f} tokens/s, "
            f"scoring {score.tokens_per_second:,.0f}; writing took {speed:,.0f} tokens/s.\n"
            f"The model is in {escape(str(save_to))}. Go on with it:\n"
            f"  {escape(sys.argv[0])} generate --model {escape(str(save_to))} "
            '--prompt "class Tree:"',
            soft_wrap=True,
        )


@app.command()
def train(
    save_to: Annotated[Path, typer.Option("--out", help="folder of the run")],
    model: ModelSizes = "lite",
    steps: Annotated[int | None, typer.Option(help="optimiser updates")] = None,
    max_seconds: Seconds = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per micro-batch")] = None,
    length: Annotated[int | None, typer.Option(help="tokens per row")] = None,
    accumulation: Annotated[int, typer.Option(help="micro-batches per update")] = 1,
    vocab_size: Annotated[int | None, typer.Option(help="tokens; the model's own if none")] = None,
    lr: Annotated[
        float | None, typer.Option(help="peak learning rate; ends at a hundredth")
    ] = None,
    precision: Precision = "fp32",
    save_every: Annotated[int | None, typer.Option(help="updates between checkpoints")] = None,
    resume: Annotated[bool, typer.Option(help="go on where the run in --out stopped")] = False,
    seed: Seed = 0,
    text: Text = None,
) -> None:
    """Train a model on Python source; leaves it in OUT/model in Hugging Face's layout.

    What is not given has the recipe's own default (`nemotron_lite.train.TrainConfig`).
    """
    with _plain_errors():
        from nemotron_lite.checkpoint import save
        from nemotron_lite.cli import tables
        from nemotron_lite.model import Nemotron
        from nemotron_lite.train import TrainConfig, evaluate
        from nemotron_lite.train import train as train_model

        config = for_our_tokenizer(read_config(model), vocab_size)
        given: dict[str, Any] = {
            "batch_size": batch_size,
            "length": length,
            "lr": lr,
            "min_lr": lr and lr / 100,
        }
        how = TrainConfig(
            steps=steps, max_seconds=max_seconds, accumulation=accumulation, precision=precision,
            save_every=save_every, seed=seed,
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        check_memory(config)
        data = _prepare(config, text)
        built = Nemotron(config, seed=seed)
        result = train_model(built, data, how, out_dir=save_to, resume=resume)
        save(built, save_to / "model", data.tokenizer)
        if result.interrupted:
            out.print(f"Stopped at step {result.step}; --resume goes on from there.")
            return
        score = evaluate(built.eval(), data.held_out)
        out.print(tables.score_table(score.bits_per_byte, data.baselines))
        out.print(f"The model is in {escape(str(save_to / 'model'))}.", soft_wrap=True)


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
    draft: Annotated[
        str | None, typer.Option(help="mtp: the MTP module drafts, the backbone verifies")
    ] = None,
    draft_length: Annotated[int, typer.Option(help="most tokens of a draft")] = 4,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--fixed", help="draft only as far as it pays")
    ] = True,
) -> None:
    """Continue a prompt with a checkpoint, token by token or with drafts of several."""
    with _plain_errors():
        import torch

        from nemotron_lite.checkpoint import load
        from nemotron_lite.generation import stream
        from nemotron_lite.speculative import Statistics

        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
        loaded = load(model, dtype=getattr(torch, dtype) if dtype else None)
        if loaded.tokenizer is None:
            raise ValueError(
                f"{model} has no tokenizer.json, so text cannot become tokens: put the model's "
                "tokenizer there, or call nemotron_lite.generate with token ids."
            )
        ids = loaded.tokenizer.encode(prompt).ids or [loaded.config.bos_token_id]
        statistics = Statistics()
        writing = stream(
            loaded, [ids], max_new_tokens, stop=loaded.config.eos_token_ids,
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
            draft=draft, draft_length=draft_length, adaptive=adaptive, statistics=statistics,
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
    from nemotron_lite.generation import stream

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


def read_config(which: str) -> NemotronConfig:
    """The sizes named by a preset, by a config.json or by a folder that holds one.

    Raises:
        ConfigError: a preset that does not exist, or sizes that do not fit.
        ValueError: a file that is not JSON.
    """
    path = Path(which)
    if which in PRESETS or not path.exists():
        return NemotronConfig.from_preset(which)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no config.json in {path}: point at a checkpoint folder or a preset.")
    try:
        return NemotronConfig.from_hf(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


def for_our_tokenizer(config: NemotronConfig, vocab_size: int | None = None) -> NemotronConfig:
    """The same model with the special tokens of the tokenizer that `data` trains."""
    from nemotron_lite.data import END_OF_TEXT_ID

    return config.replace(
        vocab_size=vocab_size or config.vocab_size,
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID,
    )  # fmt: skip


def check_memory(config: NemotronConfig) -> None:
    """Refuse to train what cannot fit, before hours are spent swapping.

    Raises:
        ValueError: weights, gradients and AdamW's moments alone exceed this machine's memory.
    """
    needed = ledger.parameters(config).total * TRAINING_BYTES
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > have:
        raise ValueError(
            f"training this model takes {needed / 2**30:,.0f} GiB for weights, gradients and "
            f"AdamW's moments alone, and this machine has {have / 2**30:,.0f} GiB: choose a "
            "smaller one, such as lite."
        )


def _is_mistake(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return isinstance(error, ValueError | OSError | FloatingPointError)
    from nemotron_lite.data import CorpusError
    from nemotron_lite.train import ResumeError

    return isinstance(error, CorpusError | ResumeError)


def _prepare(config: NemotronConfig, text: Path | None) -> TextData:
    from nemotron_lite.data import prepare

    with err.status("reading files, training a tokenizer, measuring gzip and n-grams"):
        return prepare(vocab_size=config.vocab_size, root=text)


def _title(step: int, words: str) -> None:
    out.print(f"\n[bold]{step}. {escape(words)}[/]")
