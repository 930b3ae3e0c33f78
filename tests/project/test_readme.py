"""The README is true: its links lead somewhere, its commands exist, its code runs.

The figures in the picture are compared with the config and the ledger, and a speed may only be
quoted in the section that names the record behind it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import nemotron_lite
from nemotron_lite import NemotronConfig, ledger

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / folder / "README.md" for folder in (".", "notebooks", "exercises", "kernels")),
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README = PAGES[0].read_text()
PICTURE = (ROOT / "docs" / "architecture.svg").read_text()


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative link targets that do not exist, seen from `folder`."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = [t.partition("#")[0] for t in targets if not re.match(r"\w+:|#", t)]
    return [target for target in relative if not (folder / target).exists()]


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def unknown_targets(text: str, makefile: str) -> list[str]:
    """`make x` in code, where the Makefile has no x."""
    known = set(re.findall(r"^([a-z]+):", makefile, re.M))
    code = "\n".join([*fenced(text, "bash"), *re.findall(r"`([^`\n]+)`", text)])
    named = re.findall(r"^make (?:[A-Z_]+=\S+ )*([a-z]+)", code, re.M)
    return [target for target in named if target not in known]


def unknown_commands(text: str, known: set[str]) -> list[str]:
    """`nemotron-lite x` anywhere, where the command line has no x."""
    return [name for name in re.findall(r"nemotron-lite ([a-z][a-z-]*)", text) if name not in known]


def figures_without_a_record(text: str, root: Path) -> list[str]:
    """Speeds and ratios outside "How fast", or inside it without a link to an existing record."""
    speed = r"[^\n]*\d\s*(?:×|x faster|times (?:faster|as fast)|tokens/s|tok/s|ms\b|GB\b)[^\n]*"
    before, _, rest = text.partition("\n## How fast\n")
    section, _, after = rest.partition("\n## ")
    wrong = re.findall(speed, before) + re.findall(speed, after)
    records = re.findall(r"\]\((benchmarks/records/[^)]+\.json)\)", section)
    if not any((root / record).exists() for record in records):
        wrong += re.findall(speed, section)
    return wrong


def foreign_paths(text: str) -> list[str]:
    """Absolute paths below a home or a workplace."""
    return re.findall(r"(?<![\w.])/(?:work|root|home)/\w+", text)


def cli_commands() -> set[str]:
    """What `nemotron-lite` offers."""
    import typer.main

    from nemotron_lite.cli import app

    return set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(), page.parent) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    assert unknown_targets(page.read_text(), (ROOT / "Makefile").read_text()) == []
    assert unknown_commands(page.read_text(), cli_commands()) == []


def test_speeds_have_a_record() -> None:
    assert figures_without_a_record(README, ROOT) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader, who has used the package before."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_of_the_user_page_run_one_after_another(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = fenced((ROOT / "docs" / "using.md").read_text(), "python")
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"python block {number}", "exec"), names)
    assert capsys.readouterr().out.endswith("None\n")  # no layer of this model is bad


def test_python_blocks_run_as_they_stand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = fenced(README, "python") + fenced(contributing, "python")
    assert len(blocks) == 3
    printed = []
    for number, block in enumerate(blocks):
        exec(compile(block, f"python block {number}", "exec"), {})
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith("120,668,707,840 parameters")
    assert printed[1].strip(), "the text that the model wrote"
    assert float(re.search(r"tensor\(([\d.e-]+)\)", printed[2])[1]) < 1e-4
    again = nemotron_lite.load(folder / "runs" / "copy")
    before = nemotron_lite.load("lite")
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, before(tokens).logits)


def test_the_picture_shows_the_published_pattern() -> None:
    cells = "".join(re.findall(r'class="cell"[^>]*>(.)</text>', PICTURE))
    config = NemotronConfig.from_preset("super")
    assert cells == config.pattern + "M*E" + config.mtp_pattern + "M*"


def test_the_figures_in_the_picture_are_those_of_the_config() -> None:
    config = NemotronConfig.from_preset("super")
    cache = ledger.cache(config, 1)
    d, latent = config.hidden_size, config.moe_latent_size
    for figure in (
        f"{config.num_layers} layers",
        f"{config.pattern.count('M')} × M Mamba-2",
        f"{config.pattern.count('E')} × E LatentMoE",
        f"{config.pattern.count('*')} × * attention",
        f"{config.mamba_num_heads} heads, S {config.mamba_head_dim} × {config.ssm_state_size}",
        f"{config.n_groups} groups",
        f"causal conv, {config.conv_kernel} taps",
        f"{config.num_attention_heads} × q",
        f"{config.num_key_value_heads} × k",
        f"{config.n_routed_experts} experts, {config.num_experts_per_tok} chosen",
        f"top {config.num_experts_per_tok} of s + b",
        f"{d} → {latent}",
        f"{latent} → {config.moe_intermediate_size} → {latent}",
        f"{d} → {config.moe_shared_expert_intermediate_size}",
        f"{cache.ssm:,} bytes of S",
        f"{cache.kv_per_token:,} bytes a token",
    ):
        assert f"{figure}" in PICTURE, figure


def test_tracked_text_names_no_place_on_this_machine() -> None:
    """Paths of a home or a workplace mean nothing to the next reader."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).suffix in {".md", ".toml", ".yml", ".txt", ".cff", ".py"}:
            assert foreign_paths((ROOT / name).read_text()) == [], name


def test_each_fault_is_found() -> None:
    text = "[a](here.md) [b](gone.md#x) [c](https://x.y/z)"
    assert broken_links(text, ROOT) == ["here.md", "gone.md"]
    block = "```bash\nmake test   # all\nmake A=1 fly\n```\nand `make soup`, but to make sense"
    assert unknown_targets(block, "test: x\n") == ["fly", "soup"]
    assert foreign_paths("see " + "/ho" + "me/me and docs/home/x") == ["/ho" + "me/me"]
    assert unknown_commands("`nemotron-lite run`, `nemotron-lite fly`", {"run"}) == ["fly"]


def test_a_speed_without_a_record_is_found(tmp_path: Path) -> None:
    claim = "It is 3 times faster.\n"
    link = "[record](benchmarks/records/a.json)\n"
    assert figures_without_a_record(claim, tmp_path) == [claim.strip()]
    section = f"\n## How fast\n{claim}{link}\n## Next\n"
    assert figures_without_a_record(section, tmp_path) == [claim.strip()]
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "benchmarks" / "records" / "a.json").touch()
    assert figures_without_a_record(section, tmp_path) == []
