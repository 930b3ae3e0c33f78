"""Loading and saving never have the weights in memory twice.

Each case runs in its own process, because a process never returns all its memory. The peak memory
(VmHWM of Linux) is read before and after. It counts anonymous memory and pages of mapped files, as
the memory limit of a container does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_lite.checkpoint.weight_reading import REOPEN_AFTER

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.timing,
]

MIB = 2**20
# Allocator and headers: saving grew by 0.4 MiB, loading stayed within what REOPEN_AFTER allows.
SLACK = 16 * MIB

SETUP = """
import json, sys, torch
from nemotron_lite import Nemotron, NemotronConfig, load, save

torch.set_num_threads(1)
config = NemotronConfig(
    pattern="M*EE", vocab_size=4096, hidden_size=512, n_routed_experts=64,
    moe_intermediate_size=384, num_experts_per_tok=4,
)

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def size(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())

def warm_up(path):
    # One small model through the same code, so that what torch sets up once is not counted.
    small = NemotronConfig(pattern="M*E", vocab_size=8, hidden_size=8)
    save(Nemotron(small), path + "-small")
    load(path + "-small")
"""

LOAD = """
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
warm_up(path)
before = peak()
model = load(path, dtype=dtype)
print(json.dumps(dict(grown=peak() - before, model=size(model))))
"""

PACK = """
from nemotron_lite.quantization import quantizable_modules, quantize_model, single_format

path, out = sys.argv[1:3]
model = load(path, dtype=torch.bfloat16)
save(quantize_model(model, single_format(quantizable_modules(model), "nvfp4"), search=False), out)
print(json.dumps(dict(model=size(model))))
"""

LOAD_PACKED = """
path = sys.argv[1]
warm_up(path)
before = peak()
model = load(path, packed=True)
loaded = peak() - before
with torch.inference_mode():
    model.forward_hidden(torch.randint(4096, (1, 32)))
print(json.dumps(dict(grown=loaded, used=peak() - before, model=size(model))))
"""

SAVE = """
path, limit = sys.argv[1], int(sys.argv[2])
warm_up(path)
model = Nemotron(config)
before = peak()
save(model, path, max_shard_bytes=limit)
print(json.dumps(dict(grown=peak() - before, model=size(model))))
"""


def run(code: str, *arguments: object) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 240 MB in one file: several times the memory that loading may use besides the model."""
    path = tmp_path_factory.mktemp("memory") / "m"
    saved = run(SAVE, path, 10**10)
    assert saved["model"] > 3 * REOPEN_AFTER
    assert len(list(path.glob("*.safetensors"))) == 1
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_than_the_model(folder: Path, dtype: str) -> None:
    used = run(LOAD, folder, dtype)
    assert used["grown"] >= 0.9 * used["model"], "the measurement sees the model"
    assert used["grown"] <= used["model"] + REOPEN_AFTER + SLACK


def test_packed_weights_are_never_decoded_as_a_whole(folder: Path, tmp_path: Path) -> None:
    plain = run(PACK, folder, tmp_path / "packed")
    used = run(LOAD_PACKED, tmp_path / "packed")
    assert used["model"] == plain["model"], "the packed size is loaded"
    decoded = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert used["model"] < decoded / 5
    assert used["grown"] <= used["model"] + REOPEN_AFTER + SLACK
    # 32 tokens reach most of the experts; only one stripe of weights at a time is in float32.
    assert used["used"] <= used["model"] + REOPEN_AFTER + 2 * SLACK
    assert used["used"] < decoded


@pytest.mark.parametrize("limit", [10**10, 50_000_000], ids=["one file", "shards"])
def test_saving_needs_almost_no_memory(tmp_path: Path, limit: int) -> None:
    used = run(SAVE, tmp_path / "m", limit)
    assert used["model"] > 4 * SLACK, "a second copy would be seen"
    assert used["grown"] <= SLACK
