"""llama.cpp and plain transformers as peers: the same text, one batch, equal active size."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figures, measure, record
from benchmarks.model import cpu_peers, llama_cpp, peers
from benchmarks.model import equal_transformers as equal
from nemotron_lite import NemotronConfig, generate, ledger
from tests.benchmarks.test_figures import records  # noqa: F401  (a fixture)

CONFIG = peers.SIZES["tiny"]
PLAN = dataclasses.replace(
    cpu_peers.QUICK, prefill={40: 2}, decode=((1, 20), (8, 20)), check=(8, 12)
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> cpu_peers.Programs:
    peer = peers.build_peer(CONFIG)
    with torch.no_grad():
        peer.get_parameter("lm_head.weight")[list(CONFIG.eos_token_ids)] = 0
    ours = peers.build_ours(CONFIG, peer)
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    llama_cpp.write_file(ours, file)
    return cpu_peers.Programs({"ours": ours, "transformers": peer}, file, "float32")


def with_another_weight(programs: cpu_peers.Programs) -> cpu_peers.Programs:
    """Our model with D of one layer 30 % off; the file is as it was."""
    other = copy.deepcopy(programs.ours)
    with torch.no_grad():
        other.backbone.layers[0].mixer.D.mul_(1.3)
    return dataclasses.replace(programs, models={"ours": other})


def test_both_programs_write_the_same_text(programs: cpu_peers.Programs) -> None:
    assert cpu_peers.check_same_text(programs, PLAN) == {"rows": 8, "same": 8}


def test_another_model_is_not_timed(programs: cpu_peers.Programs) -> None:
    other = with_another_weight(programs)
    with pytest.raises(RuntimeError, match=r"in \d of 8 rows in float32, expected at least 7"):
        cpu_peers.check_same_text(other, PLAN)
    with pytest.raises(RuntimeError, match=r"llama.cpp does not write the tokens of ours \(8 rows"):
        list(cpu_peers.measure_decode(other, dataclasses.replace(PLAN, decode=((8, 20),))))


def test_too_few_equal_rows_in_bfloat16_are_refused(
    programs: cpu_peers.Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = dataclasses.replace(programs, dtype="bfloat16")
    assert [narrow.needed(n) for n in (1, 8)] == [0, 2]
    assert [programs.needed(n) for n in (1, 8)] == [1, 7]
    monkeypatch.setattr(cpu_peers, "same_rows", lambda a, b, count: 1)
    with pytest.raises(RuntimeError, match="1 of 8 rows in bfloat16, expected at least 2"):
        cpu_peers.check_same_text(narrow, PLAN)


def test_equal_rows_are_counted_by_their_first_tokens() -> None:
    row, n = list(range(20)), cpu_peers.SAME_TOKENS
    late, early = row[:n] + [99] * 4, row[: n - 1] + [99] * 5
    assert cpu_peers.same_rows([row, row, row], [row, late, early]) == 2
    assert cpu_peers.same_rows([row[: n - 1]], [row[: n - 1]]) == 0, "too short to be compared"


def test_times_and_tokens_of_llama_cpp(programs: cpu_peers.Programs) -> None:
    prompts = cpu_peers._prompts(programs.ours, 8, 20)
    assert len({tuple(row) for row in prompts.tolist()}) == 8
    assert (prompts[:, :-1] == prompts[:1, :-1]).all()
    assert programs.file is not None
    with llama_cpp.serve(programs.file, rows=8, context=96) as server:
        rows = llama_cpp.Rows(server, prompts.tolist())
        seconds = [rows.step(9), rows.step(9)]
        assert all(isinstance(each, measure.Timed) and each > 0 for each in seconds)
        # The second call continues the first.
        assert rows.written == generate(programs.ours, prompts.tolist(), 20, temperature=0, stop=())
        for _ in range(2):  # a prompt is read from its beginning each time
            found, token = server.prefill(prompts[3].tolist())
            assert isinstance(found, measure.Timed) and token == rows.written[3][0]
        with pytest.raises(ValueError, match="9 prompts: this server has 8 rows"):
            server.complete([[5]] * 9, 1, keep=False)
        with pytest.raises(RuntimeError, match="the context of the server may be too short"):
            server.complete([[5, 6]], 300, keep=False)


def test_rows_that_do_not_begin_together_are_refused() -> None:
    class Staggered(llama_cpp.Server):
        def complete(self, prompts: Any, count: int, *, keep: bool) -> list[dict[str, Any]]:
            times = (90.0, 30.0)
            return [{"tokens": [1] * count, "timings": {"predicted_ms": t}} for t in times]

    rows = llama_cpp.Rows(Staggered("", 2), [[1], [2]])
    with pytest.raises(RuntimeError, match=r"for 0.030 to 0.090 s: they did not begin together"):
        rows.step(4)


@pytest.mark.parametrize("kind", equal.KINDS)
@pytest.mark.parametrize("size", ["S", "M", "lite", "tiny"])
def test_transformers_have_equal_active_size(size: str, kind: str) -> None:
    config = peers.SIZES[size]
    sizes = equal.equal_sizes(config, kind)
    wanted = ledger.parameters(config).active
    assert sizes.wanted == wanted
    assert abs(sizes.active / wanted - 1) <= 0.03
    d, v, layers, w = config.hidden_size, config.vocab_size, sizes.layers, sizes.width
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    attention = d * config.head_dim * (2 * heads + 2 * kv) + 2 * config.head_dim + 2 * d
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    router = d * experts if kind == "moe" else 0
    each = [n if kind == "moe" else 1 for n in (chosen, experts)]
    outside = 2 * d * v + d
    found = [outside + layers * (attention + router + n * 3 * d * w) for n in each]
    assert [sizes.active, sizes.total] == found


def test_no_size_fits_is_said() -> None:
    config = CONFIG.replace(
        vocab_size=4096, mamba_num_heads=2, moe_shared_expert_intermediate_size=1, pattern="M"
    )
    with pytest.raises(ValueError, match=r"no dense transformer of width 32 has [\d,]+ active"):
        equal.equal_sizes(config.replace(num_attention_heads=64, head_dim=64), "dense")
    with pytest.raises(ValueError, match="kind='big': expected one of dense, moe"):
        equal.equal_sizes(CONFIG, "big")


def test_both_caches_of_a_transformer_write_the_same(
    programs: cpu_peers.Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = equal.build_equal(CONFIG, equal.equal_sizes(CONFIG, "moe"))
    prompts = cpu_peers._prompts(programs.ours, 8, 20)
    decoder, name = cpu_peers.fastest_cache(programs, "moe", model, prompts, 80)
    assert name in ("growing", "static")
    whole = prompts[2:3]
    with torch.inference_mode():
        for _ in range(32):  # without a cache
            best = model(whole, use_cache=False).logits[:, -1:].argmax(-1)
            whole = torch.cat([whole, best], 1)
    assert decoder.written[2] == whole[0, 20:].tolist()
    init = cpu_peers.Decoder.__init__

    def wrong(self: Any, who: str, model: Any, prompts: Any, *, static: int = 0) -> None:
        init(self, who, model, prompts if static else prompts.flip(1), static=static)

    monkeypatch.setattr(cpu_peers.Decoder, "__init__", wrong)
    with pytest.raises(RuntimeError, match="one of the caches is used wrongly"):
        cpu_peers.fastest_cache(programs, "moe", model, prompts, 80)


def test_calls_that_time_themselves_are_counted_so() -> None:
    calls = {"ours": lambda: measure.Timed(3.0), "peer": lambda: 3.0}
    seconds = measure.alternate(calls, 2)
    assert seconds["ours"] == [3.0, 3.0]
    assert all(value < 1 for value in seconds["peer"])


def test_ratios_of_each_peer() -> None:
    entry = measure.compare_each(
        "work", {"ours": [1.0, 2.0], "a": [3.0, 4.0], "b": [0.5, 1.0]}, tokens=8,
        aims={"a": 2.0, "b": 1.0, "c": 3.0},
    )  # fmt: skip
    assert entry["times_faster"]["a"] == {"n": 2, "median": 2.5, "min": 2.0, "max": 3.0}
    assert entry["reached"] == {"a": True, "b": False}
    assert "2.50 times faster than a (2.00-3.00)" in measure.describe(entry)


def test_a_record_of_all_peers_and_its_table(
    records: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record, "RECORDS", records)
    for file in records.glob("cpu_peers_*.json"):
        file.unlink()
    assert "python -m benchmarks cpu_peers --size S` on any" in figures.cpu_peers(records)
    found = cpu_peers.measure_size("tiny", ["float32"], cpu_peers.PEERS, cpu_peers.WORKS, PLAN)
    file = record.write_record("cpu_peers_S_amd_epyc", found)
    written = json.loads(file.read_text())
    assert written["versions"]["xllamacpp"]
    assert written["same_tokens"] == {"float32": {"rows": 8, "same": 8}}
    sizes = written["transformers_of_equal_active_size"]
    assert set(sizes) == {"dense", "moe"}
    assert sizes["moe"]["parameters"] > sizes["moe"]["active_parameters"]
    entries = written["measurements"]
    assert [entry["what"] for entry in entries] == ["prefill", "decode", "decode"]
    assert set(entries[0]["times_faster"]) == set(cpu_peers.PEERS)
    assert all(set(e["times_faster"]) == {*cpu_peers.PEERS, "ordinary"} for e in entries[1:])
    assert {"cache of dense", "cache of moe", "flash_attention"} == set(entries[1]["settings"])
    entries[2]["times_faster"]["llama.cpp"]["median"] = 1.235
    del entries[0]["times_faster"]["moe"]
    file.write_text(json.dumps(written))
    text = figures.cpu_peers(records)
    assert "cpu_peers --size S`" not in text and "cpu_peers --size M`" in " ".join(text.split())
    assert "times llama.cpp" in text
    (line,) = (row for row in text.splitlines() if row.startswith("| decode, eight rows after 20"))
    assert " 1.24 |" in line or " 1.23 |" in line
    (line,) = (row for row in text.splitlines() if row.startswith("| prefill, 40"))
    assert " – |" in line


def test_parts_have_a_record_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(cpu_peers, "measure_size", lambda *given: {})
    monkeypatch.setattr(cpu_peers, "write_record", lambda name, found: names.append(name))
    cpu_peers.main(["--size", "S,lite"])
    cpu_peers.main(["--size", "M", "--peers", "transformers", "--dtype", "float32", "--long"])
    here = record.processor()
    assert names == [
        f"cpu_peers_S_{here}", f"cpu_peers_lite_{here}", f"cpu_peers_M_{here}-float32-transformers"
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cpu_peers.main(["--peers", "vllm"])
    assert cpu_peers.LONG.prefill[32768] and 32768 not in cpu_peers.FULL.prefill


def test_lite_is_the_preset() -> None:
    preset = NemotronConfig.from_preset("lite")
    assert peers.SIZES["lite"].replace(mtp_pattern="*E", mtp_depths=2) == preset
