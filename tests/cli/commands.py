"""Run a command in this process; the sizes and the text of the models that it trains."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from nemotron_lite.cli import app
from nemotron_lite.config import NemotronConfig

TINY = NemotronConfig(
    pattern="ME*E", vocab_size=300, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, chunk_size=32,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=16,
    moe_shared_expert_intermediate_size=32, mtp_pattern="*E", mtp_depths=1,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def call(*arguments: object, code: int = 0) -> Result:
    """The result of a command, which must end with this exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def python_files() -> list[Path]:
    """Some hundred kilobytes of Python that every Python has."""
    return sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))


def copy_into(folder: Path, files: Sequence[Path]) -> Path:
    """A folder with copies of files; it may exist already."""
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
