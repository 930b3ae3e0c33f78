"""`nemotron-lite train-lite` (`make lite`): train the shipped model anew, from its manifest.

    nemotron-lite train-lite                        about 80 minutes on two cores
    nemotron-lite train-lite                        after Ctrl-C: continues where it stopped
    nemotron-lite train-lite --text-as-found        with other versions of the packages

    1. read      the text of the manifest, from the packages that are installed
    2. train     `train/lite_recipe.py` has the sizes and all options
    3. pack      every matrix that can be, in NVFP4 or FP8
    4. score     bits per byte before and after, baselines, and how many drafted tokens are right

OUT holds the run, OUT/model the trained model in float32, and OUT/lite what is shipped: the packed
model with its record.json. To ship it, copy OUT/lite to nemotron_lite/models/lite; no command
writes there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_lite.cli.common import (
    Seed,
    app,
    out,
    plain_errors,
    program,
    say,
    settings,
    title,
    working,
)
from nemotron_lite.cli.run import RunPrecision
from nemotron_lite.files import check_writable_folder

if TYPE_CHECKING:
    from nemotron_lite.data import MixtureData

RUN = Path("runs/lite-base")
AS_FOUND = "--text-as-found"


@app.command("train-lite")
def train_lite(
    save_to: Annotated[Path, typer.Option("--out", help="folder of the run")] = Path(
        "runs/lite-base"
    ),
    steps: Annotated[int | None, typer.Option(help="updates; 2,000 if not given")] = None,
    precision: RunPrecision = "auto",
    seed: Seed = 0,
    text_as_found: Annotated[
        bool,
        typer.Option(AS_FOUND, help="train on this machine's packages if they are others"),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU")] = "cpu",
) -> None:
    """Train the shipped model from its manifest, pack it and score it; call it again to continue.

    Takes about 80 minutes on two cores.
    """
    with plain_errors():
        import torch

        from nemotron_lite.checkpoint import load, save, storage_summary
        from nemotron_lite.cli import tables
        from nemotron_lite.data import prepare
        from nemotron_lite.model import Nemotron
        from nemotron_lite.train import evaluate, lite_recipe, lite_record
        from nemotron_lite.train.lite_training import pack_lite, train_in_stages
        from nemotron_lite.train.run_log import read_log

        where = _device(device)
        config = lite_recipe.lite_config()
        how = lite_recipe.lite_training(
            lite_recipe.choose_precision(precision, where),
            steps=lite_recipe.LITE_STEPS if steps is None else steps,
            seed=seed,
        )
        trained, packed = save_to / "model", save_to / lite_recipe.LITE
        for folder in (save_to, trained, packed):
            check_writable_folder(folder)

        title(1, "Read: the text of the manifest")
        data = _text(int(how.steps or 0), config.vocab_size, as_found=text_as_found)
        say(
            f"{sum(map(len, data.train.sources.values())):,} tokens of {len(data.train.sources)} "
            f"sources; {data.held_out.num_bytes:,} bytes held out"
        )

        title(2, f"Train: {how.steps:,} updates of {how.tokens_per_step:,} tokens")
        model = Nemotron(config, seed=seed).to(where)
        model.tokenizer = data.tokenizer
        nvfp4_from = lite_recipe.NVFP4_FROM
        result = train_in_stages(
            model, data, how, save_to, nvfp4_from=nvfp4_from, progress=not settings.quiet
        )
        if result.interrupted:
            say(
                f"Stopped at update {result.step:,} of {how.steps:,}. The same command continues:\n"
                f"  {program()} train-lite --out {save_to}"
            )
            return
        model = model.to("cpu").eval()
        save(model, trained)
        with working("scoring"):
            before = evaluate(model, data.held_out)

        title(3, "Pack")
        with working("finding the block scales of least error"):
            pack_lite(model, data, packed)
        out.print(tables.stored_table(storage_summary(packed)))

        title(4, "Score")
        model = load(packed)
        assert model.lm_head.weight.dtype == torch.float32
        with working("scoring the packed model, measuring gzip, LZMA and n-grams"):
            after = evaluate(model, data.held_out)
            baselines = prepare(
                tokenizer=data.tokenizer, held_out_names=data.manifest.held_out
            ).baselines
            acceptance = lite_record.measure_acceptance(model, data.held_out)
        record = lite_record.make_record(
            lite_recipe.LITE,
            model,
            read_log(save_to),
            how,
            nvfp4_from=nvfp4_from,
            text=_described(data),
            baselines=baselines,
            trained_bits=before.bits_per_byte,
            packed_bits=after.bits_per_byte,
            acceptance=acceptance,
        )
        lite_record.save_record(record, packed)
        seen = "the text of the manifest"
        lines = [
            ("lite, trained", before.bits_per_byte, seen),
            ("lite, packed", after.bits_per_byte, seen),
        ]
        out.print(tables.score_table(lines, baselines))
        for temperature, found in acceptance["temperature"].items():
            say(
                f"Acceptance length {found['acceptance_length']:.2f} with drafts of "
                f"{acceptance['draft_length']} tokens at temperature {temperature}."
            )
        say(f"The packed model and its record are in {packed}, the trained one is in {trained}.")


def _device(name: str) -> Any:
    import torch

    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here. Leave this option out.")
    return torch.device(name)


def _text(steps: int, vocab_size: int, *, as_found: bool) -> MixtureData:
    """The text of the manifest; what differs on this machine is an error that names the option."""
    from nemotron_lite.data import ManifestError, open_mixture

    try:
        with working("reading packages, training a tokenizer, encoding"):
            return open_mixture(batches=steps, vocab_size=vocab_size, strict=not as_found)
    except ManifestError as error:
        if as_found:
            raise
        text = str(error).replace("give strict=False", f"add {AS_FOUND}")
        raise ManifestError(text) from error


def _described(data: MixtureData) -> dict[str, Any]:
    """What the record says about the text."""
    import hashlib

    from nemotron_lite.data import read_manifest
    from nemotron_lite.data.manifest import compare

    wanted, manifest = read_manifest(), data.manifest
    return {
        "manifest_sha256": hashlib.sha256(wanted.to_json().encode()).hexdigest(),
        "differences": compare(wanted, manifest),
        "sources": {
            name: {
                "packages": len(packages),
                "bytes": sum(package.bytes for package in packages),
            }
            for name, packages in manifest.sources.items()
        },
        "held_out_files": len(data.held_out.documents),
        "held_out_bytes": data.held_out.num_bytes,
    }
