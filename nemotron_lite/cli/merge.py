"""`nemotron-lite merge`: a weighted average of the snapshots of a run, as a model.

    nemotron-lite train --out runs/mine --steps 2000 --merge-every 50
    nemotron-lite merge --run runs/mine --window 400 --out runs/merged

The weights of the average imitate a decay of the learning rate over the window
(`train/merging.py`), so it is meant for the stable phase of a run. In this one the rate is constant
until update 1200, so the merge is that of the snapshots 800 to 1200. What is merged is printed, and
a warning if the rate was not constant there. If a run has no snapshots, the checkpoints that it has
kept are merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_lite.cli.common import app, plain_errors, say, working
from nemotron_lite.cli.outputs import save_model
from nemotron_lite.files import check_writable_folder

_OF_RUN = ("model", "checkpoints", "snapshots")  # folders that a training run writes


@app.command()
def merge(
    run: Annotated[Path, typer.Option(help="folder of the training run")],
    save_to: Annotated[Path, typer.Option("--out", help="folder of the merged model")],
    window: Annotated[
        int | None,
        typer.Option(help="updates that the merge goes back; the stable phase if not given"),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(help="update at which it ends; the end of the stable phase if not given"),
    ] = None,
) -> None:
    """Merge the snapshots of a training run into one model."""
    with plain_errors():
        if save_to.resolve() == run.resolve():
            raise ValueError(f"--out {save_to} is the run itself: name another folder.")
        if save_to.resolve().parent == run.resolve() and save_to.name in _OF_RUN:
            raise ValueError(f"--out {save_to} belongs to the run: name another folder.")
        check_writable_folder(save_to)
        from nemotron_lite.train import merge_checkpoints
        from nemotron_lite.train.merge_plan import plan_merge

        plan = plan_merge(run, window=window, until=until)
        say("    update     share   learning rate")
        for step, share, rate in zip(plan.steps, plan.shares, plan.rates, strict=True):
            say(f"{step:10,}  {share:8.4f}   {'-' if rate is None else f'{rate:.2e}':>13}")
        if plan.warning:
            say(f"Warning: {plan.warning}", style="yellow")
        last = plan.steps[-1]
        with working("averaging weights"):
            merged = merge_checkpoints(run, window=last - plan.steps[0], until=last)
        save_model(merged, save_to)
        say(f"The merged model is in {save_to}.")
