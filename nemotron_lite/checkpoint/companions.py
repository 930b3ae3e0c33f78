"""The small files of a checkpoint folder that belong to the model and not to the folder.

A released chat model is more than weights and a config: a chat template, the settings of its
tokenizer, defaults of sampling. Programs look for these files beside the weights. They have to be
there again after load, fine-tune, save; without a template, a chat model gets wrong prompts and
nobody is told. So `load` keeps them in `model.companion_files`, and `save` writes them.

The folder may have such files already. They may be newer than the model's: a user has edited them
there. So a file in the folder stays, with three exceptions:

- You have changed the entry in `model.companion_files` since the model was loaded.
- The folder held another tokenizer: the files that describe it go with it.
- generation_config.json names other token ids than the model: the ids are corrected, and the other
  fields stay.

Left out: what describes the folder (README, LICENSE), what is code, and what `save` makes itself
(config.json, the declaration of formats) and tokenizer.json (`tokenizer.py`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from nemotron_lite.checkpoint.tokenizer import same_tokens, tokenizer_in
from nemotron_lite.hf_config import to_hf
from nemotron_lite.input_files import FileError, read_bytes, read_json
from nemotron_lite.model import Nemotron

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


# Files that describe one tokenizer and contradict any other.
OF_TOKENIZER = frozenset(
    {
        TOKENIZER_CONFIG,
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    }
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MADE_BY_SAVE = re.compile(r"model.*\.safetensors.*|(config|tokenizer|hf_quant_config)\.json")


class CompanionFiles(dict[str, bytes]):
    """Files by name, and what they were when they were read.

    Attributes:
        as_loaded: does not change when an entry does.
    """

    def __init__(self, files: Mapping[str, bytes] = MappingProxyType({})) -> None:
        super().__init__(files)
        self.as_loaded = dict(files)


def read_companions(folder: Path) -> CompanionFiles:
    """The companion files of a folder, by name.

    A file that cannot be read is left out with a warning: the model works without it.
    """
    names = [name for name in _list(folder) if _NAMES.fullmatch(name)]
    names += [
        f"{CHAT_TEMPLATES}/{name}"
        for name in _list(folder / CHAT_TEMPLATES)
        if name.endswith(".jinja")
    ]
    found: dict[str, bytes] = {}
    for name in names:
        try:
            found[name] = read_bytes(folder / name, limit=MOST_BYTES)
        except FileNotFoundError:  # a dangling link, or removed since it was listed
            continue
        except FileError as error:
            warnings.warn(f"{error}. The model is loaded without this file.", stacklevel=5)
    return CompanionFiles(found)


def files_to_write(
    model: Nemotron, folder: Path, tokenizer: Tokenizer | None
) -> dict[str, bytes | None]:
    """What `save` does with the companion files of a folder: content by name, None to remove.

    Args:
        model: its entries in `companion_files` are written where the rules above say so.
        folder: to save into; it need not exist.
        tokenizer: that `save` writes, if any.

    Raises:
        TypeError, ValueError: an entry of `companion_files` is no file inside a folder.
    """
    own = _checked(model.companion_files)
    old = tokenizer_in(folder)
    if tokenizer is not None and not same_tokens(tokenizer, model.tokenizer):
        own = {name: content for name, content in own.items() if name not in OF_TOKENIZER}
    replaced = old is not None and tokenizer is not None and not same_tokens(old, tokenizer)
    written: dict[str, bytes | None] = {}
    if replaced:
        written |= {name: None for name in OF_TOKENIZER if (folder / name).exists()}
    for name, content in own.items():
        changed = _as_loaded(model).get(name) != content
        absent = not (folder / name).exists() or name in written
        if name != GENERATION and (changed or absent):
            written[name] = content
    if TOKENIZER_CONFIG in written:
        described = written[TOKENIZER_CONFIG] is not None
    else:
        described = (folder / TOKENIZER_CONFIG).exists()
    if tokenizer is not None and not described:
        written[TOKENIZER_CONFIG] = _tokenizer_config(model)
    written[GENERATION] = _generation_config(model, own, folder)
    return written


def _checked(files: Any) -> dict[str, bytes]:
    if not isinstance(files, Mapping):
        raise TypeError(
            f"model.companion_files is a {type(files).__name__}: expected a dict of bytes by name."
        )
    for name, content in files.items():
        if not isinstance(name, str) or not isinstance(content, bytes):
            raise TypeError(
                f"model.companion_files[{name!r}] is {type(content).__name__}: expected bytes "
                "under the name of a file, as in text.encode()."
            )
        parts = PurePosixPath(name).parts
        inside = 1 <= len(parts) <= 2 and ".." not in parts and not name.startswith("/")
        if not inside or "\0" in name or _MADE_BY_SAVE.fullmatch(name):
            raise ValueError(
                f"model.companion_files[{name!r}]: expected the name of a small file beside the "
                "weights that save does not write itself, such as 'chat_template.jinja'."
            )
    return dict(files)


def _as_loaded(model: Nemotron) -> Mapping[str, bytes]:
    """The companion files before anybody changed them; a dict of your own was never loaded."""
    return getattr(model.companion_files, "as_loaded", {})


def _tokenizer_config(model: Nemotron) -> bytes:
    """The fields that AutoTokenizer in transformers needs to open tokenizer.json unchanged."""
    return _as_json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
    )


def _generation_config(model: Nemotron, own: Mapping[str, bytes], folder: Path) -> bytes:
    """The settings of the folder, or else of the model, with the model's token ids."""
    changed = _as_loaded(model).get(GENERATION) != own.get(GENERATION)
    content, settings = own.get(GENERATION), model.generation_config
    if not (changed and content is not None):
        try:
            content, settings = read_bytes(folder / GENERATION), read_json(folder / GENERATION)
        except FileNotFoundError:
            pass
        except FileError as error:
            warnings.warn(f"{error}. It is replaced by a new one.", stacklevel=4)
    ids = _token_ids(model)
    if content is None:
        return _as_json(ids)
    wrong = {
        name: value
        for name, value in ids.items()
        if settings.get(name) is not None and _as_list(settings[name]) != _as_list(value)
    }
    return _as_json({**settings, **wrong}) if wrong else content


def _token_ids(model: Nemotron) -> dict[str, Any]:
    """The ids that the model defines.

    generation_config.json may name others than config.json; it counts, as in `load`, unless the
    model's config was changed since.
    """
    now, before = to_hf(model.config), to_hf(model.built_from)
    ids = {name: now[name] for name in _IDS}
    for name, value in model.generation_config.items():
        if name in ids and value is not None and now[name] == before[name]:
            ids[name] = value
    return ids


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _list(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
