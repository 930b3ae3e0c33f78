"""What only an NVIDIA GPU can tell: run by hand where there is one, skipped everywhere else.

    TRITON_INTERPRET=0 python -m pytest tests/cuda

Every other test interprets the kernels, and a process does one or the other, so these need a
process of their own, told before Python starts. Products are taken in float32 proper, not tf32.
"""

from __future__ import annotations

import os

import pytest
import torch

COMPILED = os.environ.get("TRITON_INTERPRET") == "0"


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    if not COMPILED:
        pytest.skip("kernels are interpreted in this process; start it with TRITON_INTERPRET=0")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
