"""`nemotron-lite run`: what this package is, in under three minutes on two cores.

    1. assemble     the parts of the shipped model "lite", and what each costs
    2. write        it writes Python, token by token and with drafts of its MTP module; both once
                    more by compiled code, where there is a C compiler
    3. score        bits per byte of files that it has never seen, beside gzip, LZMA and an n-gram
    4. train        a small model, from random weights, while you watch; its score joins the table
    5. go on        the next commands

The files of part 3 are those that the shipped model's manifest holds out. Another version of Python
has other contents of them; then a line says so. Part 4 has the shipped model's tokenizer, so that
no tokenizer is trained, and its sizes and options are in `train/lite_recipe.py`.

The output folder is tried before anything else is done, and the model is saved as soon as it is
trained. If the folder cannot be written by then, the model goes to a temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_lite import shipped_models
from nemotron_lite.cli.common import (
    SHIPPED,
    JsonlField,
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
from nemotron_lite.cli.inputs import check_memory, for_our_tokenizer, read_config, read_model
from nemotron_lite.cli.live_curve import LiveCurve
from nemotron_lite.cli.outputs import save_model
from nemotron_lite.cli.terminal import write as show
from nemotron_lite.files import atomic_file, check_writable_folder
from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions
from nemotron_lite.progress import is_terminal
from nemotron_lite.quantization.recipe import RECIPES

if TYPE_CHECKING:
    from nemotron_lite.config import NemotronConfig
    from nemotron_lite.data import TextData
    from nemotron_lite.generation.statistics import Statistics
    from nemotron_lite.model import Nemotron

SAMPLE_PROMPT = "import argparse\nimport sys\n\n\ndef main("
SAMPLE_TOKENS = 160
# Greedy decoding would repeat itself: the model is small.
SAMPLE = GenerationOptions(max_new_tokens=SAMPLE_TOKENS, temperature=0.7, stop=(), seed=1)
DRAFTS = SpeculationOptions(draft_length=4)
WARM_UP = 8  # tokens that are written before the clock starts
CONTEXT = 512  # tokens, for the FLOPs of part 1

Sizes = Annotated[
    str | None,
    typer.Option("--model", help="what to train: a preset, or a config.json; else a small model"),
]
RunPrecision = Annotated[
    str,
    typer.Option(
        help=f"of matrix products in training: {', '.join(RECIPES)}; auto takes bf16 where "
        "it is faster on this machine"
    ),
]


@app.command()
def run(
    max_seconds: Annotated[float | None, typer.Option(help="of training; 75 if not given")] = None,
    seed: Seed = 0,
    save_to: Annotated[Path, typer.Option("--out", help="where the trained model goes")] = Path(
        "runs/small"
    ),
    model: Sizes = None,
    precision: RunPrecision = "auto",
    text: Text = None,
    jsonl_field: JsonlField = "text",
    save_curve: Annotated[
        Path | None, typer.Option(help="write the loss curve of the training to this JSON file")
    ] = None,
) -> None:
    """See the shipped model write, score it, and train a small one on this machine's Python files.

    Takes under three minutes on two cores.
    """
    with plain_errors():
        from nemotron_lite.cli import tables
        from nemotron_lite.train.lite_recipe import (
            LIVE_SECONDS,
            choose_precision,
            live_config,
            live_training,
        )

        how = live_training(
            choose_precision(precision),
            max_seconds=LIVE_SECONDS if max_seconds is None else max_seconds,
            seed=seed,
        )
        sizes = live_config() if model is None else read_config(model)
        check_memory(sizes)
        check_writable_folder(save_to)
        if save_curve is not None:
            check_writable_folder(save_curve.parent)

        with working("opening the shipped model"):
            lite = read_model(SHIPPED)
        title(1, f"Assemble: the shipped model, {lite.config.pattern}")
        out.print(tables.brief_table(lite.config, CONTEXT))

        title(2, "Write: the shipped model continues a prompt")
        _write_twice(lite, tables)

        title(3, "Score: bits per byte of files it has never seen (lower is better)")
        data = _text(lite, text, jsonl_field)
        scores = [("lite, shipped", _score(lite, data), _seen(text))]
        out.print(tables.score_table(scores, data.baselines))
        del lite

        vocab_size = data.tokenizer.get_vocab_size()
        config = for_our_tokenizer(sizes, vocab_size)
        trained = _train(config, data, how, save_to, save_curve, same=model is None and not text)
        if trained is None:
            return
        scores.append(("the one just trained", _score(trained, data), "the training text"))
        out.print(tables.score_table(scores, data.baselines))

        title(5, "Go on")
        for command, what in _next(save_to):
            say(f"  {command}\n      {what}")


def _write_twice(model: Nemotron, tables: Any) -> None:
    """Continue the prompt without and with drafts, and compare the speed."""
    for speculation in (None, DRAFTS):
        _write(model, SAMPLE.replace(max_new_tokens=WARM_UP, speculation=speculation), quiet=True)
    if not settings.quiet:
        say("token by token:", style="dim")
    show(SAMPLE_PROMPT, style="dim")
    speed, _ = _write(model, SAMPLE)
    watched = is_terminal(sys.stdout) and not settings.quiet
    if watched:
        say("\nwith drafts of the MTP module:", style="dim")
        show(SAMPLE_PROMPT, style="dim")
    faster, found = _write(model, SAMPLE.replace(speculation=DRAFTS), quiet=not watched)
    lines = [
        ("token by token", speed, 1.0),
        ("with drafts of the MTP module", faster, found.tokens_per_pass),
    ]
    compiled, refusal = _write_compiled(model)
    say()
    out.print(tables.decoding_table([*lines, *compiled]))
    if refusal:
        say(refusal)
    say(
        f"Acceptance length {found.acceptance_length:.2f}. A draft changes the speed, and not the "
        "probability of any text."
    )


def _write_compiled(model: Nemotron) -> tuple[list[tuple[str, float, float]], str | None]:
    """The same two ways by compiled code: lines of the table, or why there are none."""
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, speculation in (("token by token, compiled", None), ("drafts, compiled", DRAFTS)):
            options = SAMPLE.replace(speculation=speculation, compiled=True)
            _write(model, options.replace(max_new_tokens=WARM_UP), quiet=True)
            if caught:
                return [], str(caught[0].message)
            speed, found = _write(model, options, quiet=True)
            lines.append((name, speed, 1.0 if speculation is None else found.tokens_per_pass))
    return lines, None


def _write(
    model: Nemotron, options: GenerationOptions, *, quiet: bool = False
) -> tuple[float, Statistics]:
    """Continue the prompt; tokens per second, and what the drafts did."""
    from nemotron_lite.generation.generate import stream

    pieces = stream(model, SAMPLE_PROMPT, options=options)
    started = time.perf_counter()
    for piece in pieces:
        if not quiet:
            show(piece)
    seconds = time.perf_counter() - started
    if not quiet:
        say()
    return len(pieces.results.tokens) / seconds, pieces.statistics


def _text(lite: Nemotron, text: Path | None, jsonl_field: str) -> TextData:
    """The text in the shipped model's tokens; held out is what the model's manifest holds out.

    Says if the held-out files of this Python are not those of the manifest.
    """
    from nemotron_lite.data import load_corpus, prepare, read_manifest

    held_out: dict[str, Any] = {}
    remark = None
    if text is None:
        manifest = read_manifest()
        held_out = {"held_out_names": manifest.held_out}
        here = {
            document.name: hashlib.sha256(document.content).hexdigest()
            for document in load_corpus(**held_out).held_out
        }
        remark = held_out_remark(manifest.held_out, here)
    with working("reading files, measuring gzip, LZMA and n-grams"):
        data = prepare(root=text, tokenizer=lite.tokenizer, text_field=jsonl_field, **held_out)
    if not settings.quiet:
        say(
            f"{len(data.train):,} training tokens in {data.train_bytes / 1e6:.1f} MB; "
            f"{data.held_out.num_bytes:,} bytes held out"
        )
    if remark:
        say(remark)
    return data


def held_out_remark(wanted: Any, here: Any) -> str | None:
    """A sentence if the held-out files of this machine are not those of the manifest.

    Args:
        wanted, here: SHA-256 of each file by its name.
    """
    changed = sum(wanted[name] != here[name] for name in here)
    missing = len(wanted) - len(here)
    if not changed and not missing:
        return None
    return (
        f"Python {platform.python_version()} has other versions of {changed} of the {len(wanted)} "
        f"held-out files, and {missing} are missing: scores differ from those of the record."
    )


def _score(model: Nemotron, data: TextData) -> float:
    from nemotron_lite.train import evaluate

    with working("scoring"):
        return evaluate(model.eval(), data.held_out).bits_per_byte


def _seen(text: Path | None) -> str:
    """What the shipped model has read, from its record."""
    record = shipped_models.read_record(str(SHIPPED))
    tokens = record["training"]["tokens"] / 1e6
    return f"{tokens:.1f} M tokens of Python" + ("" if text is None else ", not this text")


def _train(
    config: NemotronConfig,
    data: TextData,
    how: Any,
    save_to: Path,
    save_curve: Path | None,
    *,
    same: bool,
) -> Nemotron | None:
    """Part 4: train, draw and save; None if the training was interrupted.

    Args:
        same: whether this is the run of the reference curve.
    """
    from nemotron_lite.model import Nemotron
    from nemotron_lite.train import train as train_model

    built = Nemotron(config, seed=how.seed)
    title(
        4,
        f"Train: {config.pattern}, {built.num_parameters() / 1e6:.1f} million parameters from "
        f"random weights, {how.max_seconds:.0f} seconds in {how.precision}",
    )
    built.tokenizer = data.tokenizer
    live = LiveCurve(how.max_seconds, shipped_models.read_live_curve() if same else None)
    with live:
        result = train_model(built, data, how, progress=False, on_step=live.step)
    live.show_result()
    save_model(built, save_to)
    if save_curve is not None:
        from nemotron_lite.provenance import describe_machine

        content = {
            **live.as_json(), "tokens": result.tokens, "config": how.to_dict(),
            "pattern": config.pattern, "machine": describe_machine(),
        }  # fmt: skip
        with atomic_file(save_curve) as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False) + "\n")
    if result.interrupted:
        say(f"Stopped at update {result.step}. The model so far is in {save_to}.")
        return None
    say(
        f"Read {result.tokens:,} tokens, {result.tokens / result.seconds:,.0f} a second. The model "
        f"is in {save_to}."
    )
    return built


def _next(saved: Path) -> list[tuple[str, str]]:
    start = program()
    return [
        (f"{start} chat", "talk to the shipped model: it has read code, and no conversations yet"),
        (
            f"{start} generate --model {shlex.quote(str(saved))} --temperature 0.7 "
            '--prompt "class Tree:"',
            "let the model write that was just trained",
        ),
        (f"{start} info super", "what the model of 120 billion parameters consists of and costs"),
        ("make lab", "open the chapters, and build each part yourself"),
    ]
