"""The command line: `nemotron-lite run | info | train | generate | chat | quantize | export | ...`.

    nemotron-lite run                               the shipped model writes; a small one learns
    nemotron-lite info super --context 1048576      parameters, FLOPs and cache size of a model
    nemotron-lite train --out runs/mine --steps 500
    nemotron-lite merge --run runs/mine --window 200 --out runs/merged
    nemotron-lite train-lite                         train the shipped model anew
    nemotron-lite generate --prompt "def "           with the shipped model, or --model FOLDER
    nemotron-lite chat --model runs/tuned            a conversation, with a model trained for it
    nemotron-lite quantize --model runs/mine/model --out runs/small --bits 4.75
    nemotron-lite export --model runs/mine/model --to gguf --out mine.gguf

Each command has its own module and uses only public functions of the package, so Python code can do
the same. torch, and every module that needs it, is imported inside the commands, so that `--help`
does not wait for it.

An error of the user (a wrong size, a missing file, a damaged checkpoint) ends in one message and
exit code 1. `nemotron-lite --traceback ...` shows where a message came from.

Left out: downloading models from the hub, and several devices.
"""

from nemotron_lite.cli import (
    chat,
    export,
    generate,
    info,
    merge,
    quantize,
    run,
    train,
    train_lite,
)  # importing registers the commands
from nemotron_lite.cli.common import app, err, out

__all__ = [
    "app", "chat", "err", "export", "generate", "info", "merge", "out", "quantize", "run",
    "train", "train_lite",
]  # fmt: skip
