"""`nemotron-lite info`: parameters, FLOPs and cache size of a model, and the format of each matrix.

All of it is computed from the sizes: no weight is made or read. For a checkpoint folder, and for a
preset that a shipped model has the name of, the headers of the files are read too. They give the
format and the size of the stored matrices.

`--family` shows one table of all sizes of `lite` instead (`NemotronConfig.lite`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_lite import shipped_models
from nemotron_lite.cli.common import Precision, app, out, plain_errors, say
from nemotron_lite.cli.inputs import read_config
from nemotron_lite.config import PRESETS, is_preset
from nemotron_lite.quantization.recipe import get_recipe

Which = Annotated[
    str,
    typer.Argument(help=f"{', '.join(PRESETS)}; lite-1, lite-2, ...; or a folder with config.json"),
]


@app.command()
def info(
    model: Which = "lite",
    at: Annotated[int, typer.Option("--context", help="context length in tokens")] = 8192,
    layers: Annotated[bool, typer.Option("--layers", help="list every layer")] = False,
    precision: Precision = "nvfp4",
    family: Annotated[
        bool, typer.Option("--family", help="only a table of lite-1, lite-2, ...")
    ] = False,
) -> None:
    """Show the parameters, FLOPs and cache size of a model, and the format of each matrix."""
    with plain_errors():
        from nemotron_lite.cli import tables

        if family:
            from nemotron_lite import ledger

            out.print(tables.family_table(ledger.family(context=at), out.width))
            return
        config, chosen = read_config(model), get_recipe(precision)
        say(f"{model}: {config.num_layers} layers", style="bold")
        say(f"{config.pattern}\n")
        folder = _folder(model)
        if folder is not None and any(folder.glob("*.safetensors")):
            from nemotron_lite.checkpoint import storage_summary

            out.print(tables.stored_table(storage_summary(folder)))
        out.print(tables.parameter_table(config, out.width))
        if layers:
            out.print(tables.layer_table(config, chosen))
        out.print(tables.flops_table(config, at, out.width))
        out.print(tables.cache_table(config, at))
        out.print(tables.precision_table(config, chosen))
        if chosen.uses("nvfp4"):
            out.print(tables.gemm_table(chosen))


def _folder(model: str) -> Path | None:
    """The checkpoint whose files are shown; of a preset, the shipped model of that name."""
    if is_preset(model):
        return shipped_models.folder(model)
    if Path(model).is_file():
        return None
    from nemotron_lite.checkpoint.locations import resolve

    return resolve(model)
