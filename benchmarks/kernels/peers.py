"""The peers of the kernel benchmarks: where they are looked for, and which are installed.

Neither of the two needs a compiler, so both can be copied to a machine without network. They go
into `.peers` in the root of the checkout, which git ignores:

- mamba_ssm: the folder `mamba_ssm` of its source distribution. The package's own `__init__` imports
  a compiled extension, which its Triton kernels do not need. So an empty package replaces that
  `__init__`.

      MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation mamba-ssm
      tar xzf mamba_ssm-*.tar.gz --strip-components=1 -C .peers --wildcards '*/mamba_ssm/*'

- fla: the wheel of fla-core, unpacked.

      pip install --no-deps --target .peers fla-core

(The first needs torch in the environment of pip.) Both need einops, which neither brings. A peer
that cannot be imported is left out of the measurements; the record names it and the reason. Tried:
mamba_ssm 2.3.2 and fla-core 0.6.0, compiled with Triton 3.6.0, 3.7.1 and 3.9.0 without a GPU
(warm.py).
"""

from __future__ import annotations

import importlib
import re
import sys
import types

from benchmarks.kernels import ROOT

FOLDER = ROOT / ".peers"
# The module that is measured: that the package imports would not prove that its kernels do.
MODULES = {"mamba_ssm": "mamba_ssm.ops.triton.ssd_combined", "fla": "fla.ops.simple_gla"}


def use_peers() -> dict[str, str]:
    """Make the packages in .peers importable.

    Returns:
        For each peer its version, or why it cannot be used.
    """
    if FOLDER.exists() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if (FOLDER / "mamba_ssm").exists() and "mamba_ssm" not in sys.modules:
        shell = types.ModuleType("mamba_ssm")
        shell.__path__ = [str(FOLDER / "mamba_ssm")]
        sys.modules["mamba_ssm"] = shell
    found = {}
    for peer, module in MODULES.items():
        try:
            importlib.import_module(module)
            found[peer] = _version(peer)
        except Exception as error:  # whatever fails, the peer is left out
            found[peer] = f"left out: {type(error).__name__}: {error}"[:200]
    return found


def _version(peer: str) -> str:
    init = FOLDER / peer / "__init__.py"
    text = init.read_text() if init.exists() else ""
    written = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    return written[1] if written else str(getattr(sys.modules[peer], "__version__", "unknown"))
