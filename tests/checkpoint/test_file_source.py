"""`load(..., offload=True)`: the layers of a folder, read when they run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_lite import CheckpointError, Nemotron, NemotronConfig, generate, load, save
from nemotron_lite.checkpoint import file_source
from nemotron_lite.offload import Offloaded
from nemotron_lite.quantization.packed_layers import PackedWeight
from tests.checkpoint.modelopt_folder import EXPERT, IN_PROJ, edit
from tests.checkpoint.test_formats import FP8_LAYOUTS, compress_fp8, declare, group
from tests.test_contexts import unchecked

Make = Callable[..., Nemotron]
ROOM = 60_000  # bytes: some weights stay, others do not
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-4}  # of logits


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(2))


def offloaded(folder: Path, **options: Any) -> Offloaded:
    model = load(folder, offload=True, **{"budget": ROOM, **options})
    assert isinstance(model, Offloaded)
    return model


@torch.no_grad()
def check_equal(folder: Path, **options: Any) -> Offloaded:
    """The model with and without `offload`: the same weights to the bit, and the same logits.

    A few plain experts are multiplied side by side in memory, and one by one here. The sums are
    rounded in another order: 1e-5 in float32. In BF16 logits of 2 to 4 are 2**-6 apart, and some
    of them differ by three or four such steps after seven layers.
    """
    found, expected = offloaded(folder, **options), load(folder, **options)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(_bits(found.read(name)), _bits(tensor)), name
    for _ in range(2):  # the second time some are in memory
        for length in (9, 3):
            x = tokens(length=length)
            torch.testing.assert_close(
                found(x).logits, expected(x).logits, rtol=0, atol=ROUNDING[found.dtype]
            )
            assert found.store.nbytes <= ROOM
    assert 0 < found.store.traffic.hit_rate < 1
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cast and decoded in several pieces, of which the last is shorter."""
    monkeypatch.setattr(file_source, "_PIECE", 100)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["stored dtype", "cast"])
@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["one file", "shards"])
def test_plain_weights(
    tmp_path: Path, make: Make, tiny: NemotronConfig, dtype: Any, shard: int, no_fsync: None
) -> None:
    save(make(tiny, dtype=torch.bfloat16), tmp_path / "m", max_shard_bytes=shard)
    found = check_equal(tmp_path / "m", dtype=dtype)
    traffic = found.store.traffic
    biases = 2 * tiny.n_routed_experts * 4  # of two routers, in float32 in both; read once
    narrow = (traffic.fetched_bytes + biases) // 2
    assert traffic.source_bytes == (traffic.fetched_bytes if dtype is None else narrow)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("layout", FP8_LAYOUTS)
def test_fp8_with_many_scales_is_decoded_in_stripes(saved: Path, layout: str) -> None:
    strategy, block, more, dtype = FP8_LAYOUTS[layout]

    def change(tensors: dict[str, Tensor]) -> None:
        for part, value in compress_fp8(tensors[f"{IN_PROJ}.weight"], block, dtype).items():
            tensors[f"{IN_PROJ}.{part}"] = value.reshape(1) if value.numel() == 1 else value

    edit(saved, change)
    declare(saved, group(8, strategy, **more))
    found = offloaded(saved, dtype=torch.float32).read(f"{IN_PROJ}.weight")
    assert found.shape[0] > 128, "several rows of tiles"
    assert torch.equal(found, load(saved, dtype=torch.float32).get_parameter(f"{IN_PROJ}.weight"))


def test_casting_and_decoding_take_no_second_copy(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor that is made while weights are read is the one they are read into."""
    found = offloaded(quantized, dtype=torch.float32)
    monkeypatch.setattr(file_source, "_PIECE", 64)
    sizes, empty = list[int](), torch.empty

    def noting(*args: Any, **options: Any) -> Tensor:
        made = empty(*args, **options)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", noting)
    for name in ("lm_head.weight", "backbone.layers.1.mixer.shared_experts.up_proj.weight"):
        sizes.clear()
        out = found.read(name)
        assert sizes[0] == out.nbytes
        assert max(sizes[1:], default=0) <= 64 * 4


@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
def test_quantized_weights(quantized: Path, packed: bool, request: pytest.FixtureRequest) -> None:
    if not packed:
        request.getfixturevalue("_small_pieces")
    found = check_equal(quantized, packed=packed)
    kinds = {m.format for m in found.modules() if isinstance(m, PackedWeight)}
    assert kinds == ({"nvfp4", "fp8"} if packed else set())


def test_quantized_inputs_too(quantized: Path) -> None:
    found, expected = offloaded(quantized, packed=True), load(quantized, packed=True)
    plain = expected(tokens()).logits
    for model in (found, expected):
        for module in model.modules():
            if isinstance(module, PackedWeight):
                module.quantize_inputs = True
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, expected(tokens()).logits)
    assert not torch.equal(found(tokens()).logits, plain)


def test_scales_stored_as_divisors(quantized: Path) -> None:
    """The names of compressed-tensors, whose tensor scales are reciprocals."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale_2")]:
            module = name.removesuffix(".weight_scale_2")
            tensors[f"{module}.weight_global_scale"] = 1 / tensors.pop(name)
            tensors[f"{module}.weight_packed"] = tensors.pop(f"{module}.weight")

    edit(quantized, rename)
    check_equal(quantized, packed=True)


def test_one_matrix_of_the_experts_quantized(quantized: Path) -> None:
    """`up_proj` packed beside a plain `down_proj`."""
    plain = load(quantized, dtype=torch.bfloat16)

    def decode(tensors: dict[str, Tensor]) -> None:
        quantized_too = re.compile(
            r"backbone\..*\.experts\.\d+\.down_proj\."
        )  # those of MTP are plain
        for name in filter(quantized_too.match, list(tensors)):
            del tensors[name]
        for layer in (1, 5):
            stack = plain.state_dict()[f"backbone.layers.{layer}.mixer.experts.down_proj"]
            for e, matrix in enumerate(stack):
                stem = f"backbone.layers.{layer}.mixer.experts.{e}.down_proj"
                tensors[f"{stem}.weight"] = matrix.clone()

    edit(quantized, decode)
    config = json.loads((quantized / "config.json").read_text())
    declared = json.loads((quantized / "hf_quant_config.json").read_text())
    for part in (config["quantization_config"], declared["quantization"]):
        layers = part["quantized_layers"]
        for name in [n for n in layers if ".experts." in n and n.endswith("down_proj")]:
            del layers[name]
    (quantized / "config.json").write_text(json.dumps(config))
    (quantized / "hf_quant_config.json").write_text(json.dumps(declared))
    check_equal(quantized, packed=True)


def test_stacked_experts(tmp_path: Path, make: Make, tiny: NemotronConfig, no_fsync: None) -> None:
    """As transformers saves them: one tensor for all experts of a layer."""
    save(make(tiny), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    for layer in ("backbone.layers.1", "backbone.layers.5", "mtp.layers.1"):
        for leaf in ("up_proj", "down_proj"):
            stem = f"{layer}.mixer.experts"
            each = [stored.pop(f"{stem}.{e}.{leaf}.weight") for e in range(tiny.n_routed_experts)]
            stored[f"{stem}.{leaf}"] = torch.stack(each)
    save_file(stored, file)
    check_equal(tmp_path / "m")


def test_a_router_in_float32_stays(tmp_path: Path, make: Make, tiny: NemotronConfig) -> None:
    model = make(tiny, dtype=torch.bfloat16)
    for layer in (1, 5):
        model.backbone.layers[layer].mixer.gate.float()
    save(model, tmp_path / "m")
    found = check_equal(tmp_path / "m")
    assert found.dtype == torch.bfloat16
    assert found.read("backbone.layers.1.mixer.gate.weight").dtype == torch.float32


@torch.no_grad()
def test_only_the_chosen_experts_are_read(quantized: Path) -> None:
    found = offloaded(quantized, packed=True, budget=20_000)
    found(tokens(1, 1))
    traffic = found.store.traffic
    assert traffic.experts == 2 * 2 * 2  # matrices, experts of a token, layers
    everything = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    assert 0 < traffic.source_bytes < 0.7 * everything


def test_a_saved_copy_is_the_same_checkpoint(quantized: Path, tmp_path: Path) -> None:
    save(offloaded(quantized, packed=True), tmp_path / "copy")
    first, second = load(quantized, packed=True), load(tmp_path / "copy", packed=True)
    state = second.state_dict()
    assert all(torch.equal(_bits(v), _bits(state[n])) for n, v in first.state_dict().items())


@torch.no_grad()
def test_it_keeps_reading_the_folder_that_it_opened(
    tmp_path: Path, make: Make, tiny: NemotronConfig, no_fsync: None
) -> None:
    save(make(tiny), tmp_path / "m")
    found = offloaded(tmp_path / "m")
    expected = load(tmp_path / "m")(tokens()).logits
    save(make(tiny, seed=1), tmp_path / "m")
    first = found(tokens()).logits
    torch.testing.assert_close(first, expected, rtol=0, atol=ROUNDING[torch.float32])
    assert not torch.allclose(load(tmp_path / "m")(tokens()).logits, expected, atol=0.1)
    # Onto itself: the old files are read while the new ones are written.
    save(found, tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    assert torch.equal(found(tokens()).logits, first)


@torch.no_grad()
def test_a_file_that_got_shorter(tmp_path: Path, make: Make, tiny: NemotronConfig) -> None:
    save(make(tiny), tmp_path / "m")
    found = offloaded(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    reason = r"model\.safetensors could not be read \(.*it was changed.*Load the model again"
    with pytest.raises(CheckpointError, match=reason):
        found(tokens())
    assert all(parameter.is_meta for parameter in found.parameters())


@torch.no_grad()
def test_a_file_that_is_written_over_in_place(
    tmp_path: Path, make: Make, tiny: NemotronConfig, no_fsync: None
) -> None:
    """As `cp` does: without an error the model would be one half of each."""
    save(make(tiny), tmp_path / "m")
    save(make(tiny, seed=1), tmp_path / "other")
    found = offloaded(tmp_path / "m")
    found(tokens())
    shutil.copyfile(tmp_path / "other/model.safetensors", tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match="it was changed after the model was loaded"):
        found(tokens())
    found = offloaded(tmp_path / "m")
    expected = load(tmp_path / "other")(tokens()).logits
    torch.testing.assert_close(found(tokens()).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (f"{EXPERT}.weight_scale_2", torch.tensor(0.0)),
        (f"{IN_PROJ}.weight_scale", torch.tensor(float("nan"))),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
@torch.no_grad()
def test_invalid_values_are_found_when_they_are_read(
    quantized: Path, name: str, wrong: Tensor, packed: bool
) -> None:
    edit(quantized, lambda tensors: tensors.update({name: wrong}))
    with pytest.raises(CheckpointError, match="invalid values"):
        load(quantized, packed=packed)
    found = offloaded(quantized, packed=packed)
    with pytest.raises(CheckpointError, match=f"invalid values: {name} holds"):
        found(tokens(8, 16))  # reaches all experts


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"offload": True, "device": "cuda"},
            ValueError,
            "keeps weights on the CPU; device='cuda'",
        ),
        ({"budget": 10**6}, ValueError, "are for offload=True"),
        ({"progress": True}, ValueError, "are for offload=True"),
        ({"offload": True, "budget": 100}, ValueError, "no room for the largest tensor"),
        ({"offload": True, "budget": -1}, ValueError, "budget=-1"),
        ({"offload": "yes"}, TypeError, "offload"),
        ({"offload": True, "budget": "4 GiB"}, TypeError, "budget"),
    ],
)
def test_bad_arguments(
    quantized: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        unchecked(load)(quantized, **options)


def test_a_damaged_folder_is_reported_as_without_offload(quantized: Path) -> None:
    edit(quantized, lambda tensors: tensors.pop("backbone.norm_f.weight"))
    with pytest.raises(CheckpointError, match=r"missing: .*norm_f"):
        offloaded(quantized)


def test_adapters_are_not_part_of_the_model(quantized: Path) -> None:
    name = f"{IN_PROJ}.lora_A.weight"
    edit(quantized, lambda tensors: tensors.update({name: torch.zeros(4, 32)}))
    with pytest.raises(CheckpointError, match="lora_A"):
        offloaded(quantized, packed=True)


def test_from_pretrained_takes_the_same_arguments(quantized: Path) -> None:
    class Mine(Nemotron):
        """A class of a user."""

    found = Mine.from_pretrained(quantized, packed=True, offload=True, budget=ROOM)
    assert isinstance(found, Mine)
    assert isinstance(found, Offloaded)
    assert found.store.plan.budget == ROOM


LIMITED = """
import json, resource, sys, torch
from nemotron_lite import generate, load

torch.set_num_threads(1)
folder, small = sys.argv[1:]
generate(load(small, packed=True, offload=True, budget=10**6), [[1, 2]], 2)  # imports, and buffers

def size():
    for line in open("/proc/self/status"):
        if line.startswith("VmSize"):
            return int(line.split()[1]) * 1024

most = size() + 48 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    load(folder, packed=True)
    failed = False
except (RuntimeError, MemoryError, OSError, ValueError):
    failed = True
model = load(folder, packed=True, offload=True, budget=12 * 2**20)
text = generate(model, [[1, 2, 3]], 8, temperature=0)
traffic = model.store.traffic
print(json.dumps(dict(failed=failed, text=text, hits=traffic.hit_rate, peak=model.store.nbytes)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.timing
def test_a_checkpoint_larger_than_the_memory_limit(tmp_path: Path, no_fsync: None) -> None:
    """RLIMIT_AS counts all memory that a process has asked for, mapped files too."""
    config = NemotronConfig(
        pattern="M*EEE", vocab_size=512, hidden_size=256, n_routed_experts=256,
        num_experts_per_tok=4, moe_intermediate_size=512, moe_latent_size=256,
    )  # fmt: skip
    model = Nemotron.from_config(config, weights="generated", packed=True, budget=10**8)
    save(model, tmp_path / "m", max_shard_bytes=8 * 2**20)
    small = config.replace(pattern="M*E", n_routed_experts=4, vocab_size=512)
    save(
        Nemotron.from_config(small, weights="generated", packed=True, budget=10**8),
        tmp_path / "small",
    )
    stored = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    assert stored > 2 * 48 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "m"), str(tmp_path / "small")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["failed"], "the limit is one: the model in memory does not fit"
    assert found["peak"] <= 12 * 2**20
    assert 0.1 < found["hits"] < 1
    whole = load(tmp_path / "m", packed=True)
    assert found["text"] == generate(whole, [[1, 2, 3]], 8, temperature=0)
