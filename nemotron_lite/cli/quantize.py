"""`nemotron-lite quantize`: a trained model in 4 and 8 bits a weight, and the loss that this adds.

    1. read the model, and encode a text with its tokenizer
    2. calibrate: find how large inputs, keys and values get on some of the text
    3. choose a format for each module: one for all, or the mix of least cost within a budget
    4. quantize the weights and write the folder in ModelOpt's layout, completely or not at all
    5. score both models on text that neither training nor calibration has seen

Weights that are not quantized are stored in BF16. Both losses are computed in float32, whatever the
files store, so they differ by the stored weights alone.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_lite.cli.common import (
    JsonlField,
    Seed,
    Text,
    app,
    out,
    plain_errors,
    program,
    say,
    title,
    working,
)
from nemotron_lite.cli.inputs import read_model
from nemotron_lite.cli.outputs import save_model
from nemotron_lite.files import check_writable_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nemotron_lite.data import HeldOut
    from nemotron_lite.model import Nemotron
    from nemotron_lite.quantization import Calibration, QuantizableModule
    from nemotron_lite.train import Evaluation

BUDGET = 4.75  # bits a weight, as in the release of Super in NVFP4
BATCH_SIZE = 4  # pieces of text


@app.command()
def quantize(
    model: Annotated[Path, typer.Option(help="checkpoint folder of the trained model")],
    save_to: Annotated[Path, typer.Option("--out", help="folder of the quantized one")],
    bits: Annotated[
        float | None,
        typer.Option(help=f"mix formats within these bits a weight; {BUDGET} without --format"),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="one format for all: nvfp4, fp8, bf16")
    ] = None,
    choices: Annotated[
        str,
        typer.Option(
            help="what may be quantized: any; report, as in the report's table 7; or everything, "
            "with head and MTP module"
        ),
    ] = "any",
    pieces: Annotated[int, typer.Option("--prompts", help="pieces of text to calibrate on")] = 32,
    tokens: Annotated[int, typer.Option(help="in each piece")] = 256,
    cache: Annotated[bool, typer.Option("--cache", help="store FP8 scales of the cache")] = False,
    held_out_bytes: Annotated[
        int, typer.Option("--held-out", help="bytes of text to score on; 0 leaves it out")
    ] = 192 * 1024,
    text: Text = None,
    jsonl_field: JsonlField = "text",
    seed: Seed = 0,
) -> None:
    """Quantize a trained model: one format for all, or the best mix within a budget of bits."""
    with plain_errors():
        import torch

        from nemotron_lite.checkpoint import storage_summary, weight_bytes
        from nemotron_lite.cli import tables
        from nemotron_lite.data import sample_windows
        from nemotron_lite.quantization import bits_per_weight, calibrate, quantize_model
        from nemotron_lite.train import evaluate

        check_options(model, save_to, bits, format, choices)
        title(1, "Read")
        loaded = read_model(model, "float32")
        documents, held_out = read_text(loaded, text, held_out_bytes, jsonl_field)
        batches = sample_windows(documents, pieces, tokens, seed=seed).split(BATCH_SIZE)
        with working("scoring"):
            before = evaluate(loaded, held_out) if held_out else None
        stored = weight_bytes(model)
        say(f"{loaded.num_parameters():,} parameters in {tables.size(stored)}")

        title(2, f"Calibrate on {pieces} pieces of {tokens} tokens")
        calibration = calibrate(loaded, batches, choices=choices)

        budget = None if format else bits or BUDGET
        title(3, f"Choose: {format} for all" if format else f"Choose within {budget} bits")
        with working("measuring what rounding each module costs"):
            modules, formats = choose_formats(
                loaded, batches, calibration, budget, format or "bf16", choices
            )
        count = ", ".join(f"{n} {name}" for name, n in sorted(Counter(formats.values()).items()))
        say(
            f"{len(modules)} modules can be quantized: {count}; "
            f"{bits_per_weight(modules, formats):.4f} bits a weight of these"
        )

        title(4, "Write")
        quantize_model(loaded, formats, calibration, cache=cache).to(torch.bfloat16)
        save_model(loaded, save_to)
        out.print(tables.stored_table(storage_summary(save_to)))

        if held_out and before is not None:
            title(5, f"Score on {held_out.num_bytes:,} bytes it has never seen")
            with working("scoring"):
                after = evaluate(loaded.float(), held_out)
            lines: list[tuple[str, Evaluation, int]] = [
                ("as it was", before, stored), ("quantized", after, weight_bytes(save_to)),
            ]  # fmt: skip
            out.print(tables.loss_table(lines))
        say(
            f"The model is in {save_to}. To keep its weights packed in memory too:\n"
            f"  {program()} generate --model {shlex.quote(str(save_to))} --packed "
            '--prompt "class Tree:"'
        )


def check_options(
    model: Path, save_to: Path, bits: float | None, format: str | None, choices: str
) -> None:
    """Refuse wrong options before any long computation begins.

    Raises:
        ValueError: both a budget and a format, an unknown format or set of choices, an output that
            would replace the model, or a model that is quantized already.
        OSError: the output cannot be written.
    """
    from nemotron_lite.checkpoint import storage_summary
    from nemotron_lite.quantization.quantizable import CHOICES, FORMATS

    if bits is not None and format is not None:
        raise ValueError(
            f"--bits {bits} and --format {format}: a budget or one format, not both. Drop one."
        )
    if format is not None and format not in FORMATS:
        raise ValueError(f"--format {format}: expected one of {', '.join(FORMATS)}.")
    if choices not in CHOICES:
        raise ValueError(f"--choices {choices}: expected one of {', '.join(CHOICES)}.")
    if save_to.resolve() == model.resolve():
        raise ValueError(
            f"--out {save_to} is the model itself, and quantizing cannot be undone. Name another "
            "folder."
        )

    quantized = {group.format for group in storage_summary(model)} & {"NVFP4", "FP8"}
    if quantized:
        raise ValueError(
            f"{model} is quantized already ({', '.join(sorted(quantized))}). Start from the "
            "original, whose weights are not rounded yet."
        )
    check_writable_folder(save_to)


def read_text(
    model: Nemotron, text: Path | None, held_out_bytes: int, jsonl_field: str
) -> tuple[list[np.ndarray], HeldOut | None]:
    """Documents to calibrate on, and others to score, as token ids of the model's tokenizer.

    Raises:
        CorpusError: no text, or too little.
        ValueError: a negative size.
    """
    from nemotron_lite.data import HeldOut, encode_documents, load_corpus

    if held_out_bytes < 0:
        raise ValueError(f"--held-out {held_out_bytes}: expected 0 or more bytes.")
    config = model.config
    start, end = config.bos_token_id, config.eos_token_ids[0]
    with working("reading files"):
        corpus = load_corpus(text, held_out_bytes=held_out_bytes, text_field=jsonl_field)
        sides = [
            encode_documents(
                model.tokenizer, [d.content.decode() for d in side], start=start, end=end
            )
            for side in (corpus.train, corpus.held_out)
        ]
    held_out = HeldOut(tuple(sides[1]), corpus.held_out_bytes) if held_out_bytes else None
    return sides[0], held_out


def choose_formats(
    model: Nemotron,
    batches: Sequence[Tensor],
    calibration: Calibration,
    budget: float | None,
    format: str,
    choices: str,
) -> tuple[list[QuantizableModule], dict[str, str]]:
    """The quantizable modules, and the format of each; `format` for all if there is no budget."""
    from nemotron_lite.quantization import (
        allocate_bits,
        measure_sensitivity,
        quantizable_modules,
        single_format,
    )

    if budget is None:
        modules = quantizable_modules(model, choices)
        return modules, single_format(modules, format)
    sensitivity = measure_sensitivity(model, batches, calibration, choices=choices)
    return sensitivity.modules, allocate_bits(sensitivity, budget)
