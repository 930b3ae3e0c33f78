"""What a checkpoint folder holds, before any weight is read: its config and the stored tensors.

    config.json      what it says, as a dict
    weight files     name, shape and dtype of each tensor, from their headers
    declarations     how weights are quantized, as the folder's config files say

The tensors of a quantized weight become one entry. In a multimodal release only the tensors of the
text model are kept. `load` builds a model from it, `storage_summary` counts its bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from nemotron_lite.checkpoint.declaration import Declaration
from nemotron_lite.checkpoint.modelopt import TILE, GroupedTensors, group_quantized
from nemotron_lite.checkpoint.modelopt_config import read_declarations
from nemotron_lite.checkpoint.names import split_multimodal
from nemotron_lite.checkpoint.weight_files import StoredTensor, read_headers, read_object
from nemotron_lite.hf_config import other_parts


class Contents(NamedTuple):
    """A folder as its config and headers describe it.

    Attributes:
        hf: config.json; empty where it is missing or unreadable.
        stored: tensors of the text model, as they are in the files.
        found: the same, with each quantized weight as one entry.
        declarations: what config files say about quantized weights.
        other_parts: of a multimodal release, beside the text model.
        other_tensors: names of their tensors.
        problems: all that is wrong.
    """

    hf: dict[str, Any]
    stored: list[StoredTensor]
    found: GroupedTensors
    declarations: list[Declaration]
    other_parts: list[str]
    other_tensors: list[str]
    problems: list[str]


def read_contents(folder: Path) -> Contents:
    """Read the small files of a folder and the headers of its weight files."""
    hf, config_problems = read_object(folder / "config.json", infinity=True)
    stored, header_problems = read_headers(folder)
    parts = other_parts(hf)
    other_tensors: list[str] = []
    if parts:
        names, other_tensors = split_multimodal(item.name for item in stored)
        text_names = set(names)
        stored = [item for item in stored if item.name in text_names]
    declarations, declaration_problems = read_declarations(folder, hf)
    tile = next((each.tile for each in declarations if each.tile != TILE), TILE)
    found = group_quantized(stored, tile)
    problems = [*config_problems, *header_problems, *found.problems, *declaration_problems]
    return Contents(hf, stored, found, declarations, parts, other_tensors, problems)
