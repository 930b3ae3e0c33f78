"""The options that a model comes with: its generation_config.json over the package's defaults.

    options = default_options(model)                   what `generate(model, prompt)` uses
    options = default_options(model).replace(top_k=20)

Which value counts, in this order:

    1. a keyword of the call                generate(model, prompt, temperature=0.6)
    2. `options` of the call                generate(model, prompt, options=GenerationOptions(...))
    3. generation_config.json of the model  `model.generation_config`
    4. the package's defaults               GenerationOptions()

`options` are complete: with them, nothing of the file is used but the stop tokens, where
`options.stop` is None. A keyword alone replaces one value.

The file's fields are those of transformers. Used are do_sample, temperature, top_k, top_p, min_p,
repetition_penalty, max_new_tokens and eos_token_id; null counts as absent. do_sample=false is
greedy decoding; without do_sample the package samples, where transformers would not. top_k=0 means
no filter there. Other fields, such as num_beams, are ignored.

Source: transformers' GenerationConfig. Left out: max_length, which counts the prompt too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nemotron_lite.arguments import flag, integer
from nemotron_lite.generation.options import GenerationOptions
from nemotron_lite.model import Nemotron

FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


def default_options(model: Nemotron, given: Collection[str] = ()) -> GenerationOptions:
    """The options of a call that says nothing, or says only the options named in `given`.

    Raises:
        ValueError: generation_config.json has a wrong value for an option that is not in `given`.
    """
    config = model.generation_config
    found: dict[str, Any] = {}
    for name in FIELDS:
        value = config.get(name)
        if value is None or name in given:
            continue
        if name == "top_k" and type(value) is int and value == 0:
            value = None
        _try(name, value)
        found[name] = value
    if "temperature" not in given and config.get("do_sample") is not None:
        try:
            sampled = flag("do_sample", config["do_sample"])
        except TypeError as error:
            raise _wrong(error) from None
        if not sampled:
            found["temperature"] = 0.0
    if "stop" not in given:
        found["stop"] = stop_tokens(model)
    return GenerationOptions(**found)


def stop_tokens(model: Nemotron) -> tuple[int, ...]:
    """The tokens that end a text of this model: those of generation_config.json, or of the config.

    Raises:
        ValueError: eos_token_id in generation_config.json is neither an id nor a list of ids.
    """
    ids = model.generation_config.get("eos_token_id")
    if ids is None:
        return tuple(model.config.eos_token_ids)
    try:
        return tuple(
            integer("eos_token_id", token, low=0)
            for token in (ids if isinstance(ids, list) else [ids])
        )
    except (TypeError, ValueError) as error:
        raise _wrong(error) from None


def _try(name: str, value: Any) -> None:
    try:
        GenerationOptions(**{name: value})
    except (TypeError, ValueError) as error:
        raise _wrong(error) from None


def _wrong(error: Exception) -> ValueError:
    return ValueError(
        f"the model's generation_config.json: {error} Correct the file (or "
        'model.companion_files["generation_config.json"]), or give this option in the call.'
    )
