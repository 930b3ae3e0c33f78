"""`nemotron-lite export`: a model as one file for llama.cpp and the programs around it.

    nemotron-lite export --model lite --to gguf --out lite.gguf --dtype bfloat16

The file holds sizes, tokenizer, chat template and weights, the MTP module too. What a GGUF file
cannot hold is refused before anything is written. Programs that read Hugging Face's folders need no
export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_lite.cli.common import ModelFolder, app, plain_errors, say, settings
from nemotron_lite.cli.inputs import read_model
from nemotron_lite.files import check_writable_folder

FORMATS = ("gguf",)
DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def export(
    model: ModelFolder,
    out: Annotated[Path, typer.Option(help="the file to write")],
    to: Annotated[str, typer.Option(help=f"format: {', '.join(FORMATS)}")] = "gguf",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"of matrices: {', '.join(DTYPES)}; those of the folder if not given"),
    ] = None,
    mtp: Annotated[bool, typer.Option(help="with the MTP module, if there is one")] = True,
    packed: Annotated[
        bool, typer.Option("--packed", help="keep weights in NVFP4 as they are stored")
    ] = False,
    unpack: Annotated[
        bool, typer.Option("--unpack", help="with --packed: decode what the format cannot keep")
    ] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of the pre-tokenizer, where it is not recognized"),
    ] = None,
) -> None:
    """Write a model as a GGUF file, which llama.cpp runs."""
    with plain_errors():
        check_options(to, out, dtype, packed, unpack)
        import torch

        from nemotron_lite.cli import tables
        from nemotron_lite.export import to_gguf
        from nemotron_lite.export.gguf import gguf_library

        gguf_library()  # before the model is read, which may take minutes
        loaded = read_model(model, packed=packed)
        to_gguf(
            loaded,
            out,
            dtype=getattr(torch, dtype) if dtype else None,
            mtp=mtp,
            unpack=unpack,
            pre_tokenizer=pre_tokenizer,
            progress=not settings.quiet,
        )
        say(f"The model is in {out} ({tables.size(out.stat().st_size)}).")


def check_options(to: str, out: Path, dtype: str | None, packed: bool, unpack: bool) -> None:
    """Refuse wrong options before the model is read.

    Raises:
        ValueError: an unknown format or dtype, or `unpack` without `packed`.
        OSError: the folder of the file cannot be written, or the file is a folder.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: expected one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    if unpack and not packed:
        raise ValueError("--unpack says what to do with weights that --packed keeps: add --packed.")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: name a file in it, such as model.gguf.")
    check_writable_folder(out.parent)
