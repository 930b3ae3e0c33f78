"""`nemotron-lite merge`: a weighted average of the snapshots of a run, as a model.

    nemotron-lite train --out runs/mine --steps 2000 --merge-every 50
    nemotron-lite merge --run runs/mine --window 400 --out runs/merged

The weights of the average imitate a decay of the learning rate over the window
(`train/merging.py`), so it is meant for a run in its stable phase. If a run has no snapshots, the
checkpoints that it has kept are merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_lite.cli.common import app, plain_errors, say, working
from nemotron_lite.cli.outputs import save_model
from nemotron_lite.files import check_writable_folder


@app.command()
def merge(
    run: Annotated[Path, typer.Option(help="folder of the training run")],
    save_to: Annotated[Path, typer.Option("--out", help="folder of the merged model")],
    window: Annotated[
        int | None, typer.Option(help="updates that the merge goes back; all if not given")
    ] = None,
    until: Annotated[
        int | None, typer.Option(help="update at which it ends; the newest if not given")
    ] = None,
) -> None:
    """Merge the snapshots of a training run into one model."""
    with plain_errors():
        if save_to.resolve() == run.resolve():
            raise ValueError(f"--out {save_to} is the run itself: name another folder.")
        check_writable_folder(save_to)
        from nemotron_lite.train import merge_checkpoints

        with working("averaging weights"):
            merged = merge_checkpoints(run, window=window, until=until)
        save_model(merged, save_to)
        say(f"The merged model is in {save_to}.")
