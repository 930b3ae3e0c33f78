"""The small files of a checkpoint folder that belong to the model and not to the folder.

A released chat model is more than weights and a config: a chat template, the settings of its
tokenizer, defaults of sampling. Programs look for these files beside the weights. They have to be
there again after load, fine-tune, save; without a template, a chat model gets wrong prompts and
nobody is told. So `load` keeps them in `model.companion_files`, and `save` writes them.

Left out: what describes the folder (README, LICENSE), what is code, and what `save` makes itself
(config.json, tokenizer.json, the declaration of formats).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from nemotron_lite.input_files import FileError, read_bytes

GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder; transformers 5 puts further templates here
MOST_BYTES = 32 << 20  # of one file; the vocabularies of released models have a few MB

_NAMES = re.compile(
    r"chat_template\.(jinja|json)|generation_config\.json"
    r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|tokenizer\.model"
    r"|(\w+_)?preprocessor_config\.json|processor_config\.json"
)


def read_companions(folder: Path) -> dict[str, bytes]:
    """The companion files of a folder, by name.

    A file that cannot be read is left out with a warning: the model works without it.
    """
    names = [name for name in _list(folder) if _NAMES.fullmatch(name)]
    names += [
        f"{CHAT_TEMPLATES}/{name}"
        for name in _list(folder / CHAT_TEMPLATES)
        if name.endswith(".jinja")
    ]
    found = {}
    for name in names:
        try:
            found[name] = read_bytes(folder / name, limit=MOST_BYTES)
        except FileNotFoundError:  # a dangling link, or removed since it was listed
            continue
        except FileError as error:
            warnings.warn(f"{error}. The model is loaded without this file.", stacklevel=4)
    return found


def _list(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
