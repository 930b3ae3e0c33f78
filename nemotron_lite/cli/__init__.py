"""The command line: `nemotron-lite run | info | train | generate | quantize`.

    nemotron-lite run                               build, train, score and sample a small model
    nemotron-lite info super --context 1048576      what a model stores, costs and remembers
    nemotron-lite train --out runs/mine --steps 500
    nemotron-lite generate --model runs/mine/model --prompt "def "
    nemotron-lite quantize --model runs/mine/model --out runs/small --bits 4.75

Each command has a room of its own: a short story told with the package's public functions. Nothing
is computed there that Python code could not do with the same calls. torch is imported inside the
commands, so that `--help` and `info` on a preset answer at once.

Mistakes of the caller (a wrong size, a missing file, a damaged checkpoint) end in one message and
exit code 1. `nemotron-lite --traceback ...` shows where a message came from.

Left out: fetching models from the hub, and several devices.
"""

from nemotron_lite.cli import generate, info, quantize, run, train  # they enter themselves in app
from nemotron_lite.cli.common import app, err, out

__all__ = ["app", "err", "generate", "info", "out", "quantize", "run", "train"]
