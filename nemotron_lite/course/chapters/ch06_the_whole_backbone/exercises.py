"""Exercises of chapter 06: from one residual layer to a model that reads a real checkpoint.

    06.block               a class: norm, mixer and sum, with a cache handed through
    06.backbone            a class: embedding, the loop over a pattern, final norm, head, writing
    06.checkpoint_tensors  the tensors of a folder under the names of the model
    06.count               parameters of a whole model, and those of one token
    06.seconds_per_token   optional: the time of a token from bytes and FLOPs

A block computes with the layers that the learner wrote in earlier chapters. The checks run in
another process than the answer and can send it numbers, tensors and configs, but neither classes
nor files. So a block takes the learner's classes by itself where no others are given, and
`checkpoint_tensors` gets what a given function, `read_folder`, has read.

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch06_the_whole_backbone/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch06_the_whole_backbone import checks
from nemotron_lite.course.exercises import Check, Exercise

_BLOCK_HEAD = '''class Block(nn.Module):
    """One residual layer: x + mixer(norm(x)), with a cache handed through."""

    def __init__(self, config, letter, mixers=None):
        """Make one layer.

        Args:
            config: the sizes.
            letter: "M", "*" or "E".
            mixers: a dict from letter to class. None: your own classes.
        """
        super().__init__()
        mixers = mixers or {"M": DecodingMamba2, "*": GroupedQueryAttention, "E": LatentMoE}
        self.letter, self.eps = letter, config.norm_eps
        self.norm = nn.ParameterDict({"weight": torch.ones(config.hidden_size)})'''

BLOCK = Exercise(
    id="06.block",
    title="One block",
    objective="O1: assemble blocks into a model from a pattern.",
    minutes=8,
    difficulty=2,
    points=7,
    task=r"""
Write $x + \mathrm{mixer}(\mathrm{norm}(x))$ around your own layers. Make `self.mixer` from
the class `mixers[letter]` and the config. The norm is your
`normalize(x, weight, eps)`. Caches differ:

- `M` returns a pair: the output, and a new cache, even if it was given none.
- `*` returns the output alone, and changes the cache in place.
- `E` looks at one token at a time. It has no cache and takes none.

A mixer gets a cache only if there is one. `forward` returns a pair: the sum, and the cache after x.
For `E`, and for `*` without a cache, it is None. `M` and `*` have a method `empty_cache(batch)`.
""".strip(),
    stub=f'''
{_BLOCK_HEAD}
        raise NotImplementedError

    def empty_cache(self, batch):
        """The mixer's cache before the first token of `batch` rows; None for "E"."""
        raise NotImplementedError

    def forward(self, x, cache=None):
        """Read tokens after a cache.

        Args:
            x: the residual stream, b t d.
            cache: what `empty_cache` or an earlier call returned, or None.

        Returns:
            (x, cache): the stream after this layer, b t d, and the cache after these tokens.
        """
        raise NotImplementedError
'''.strip(),
    solution=f'''
{_BLOCK_HEAD}
        self.mixer = mixers[letter](config)

    def empty_cache(self, batch):
        """The mixer's cache before the first token of `batch` rows; None for "E"."""
        return None if self.letter == "E" else self.mixer.empty_cache(batch)

    def forward(self, x, cache=None):
        """Read tokens after a cache."""
        normed = normalize(x, self.norm["weight"], self.eps)
        y = self.mixer(normed) if cache is None else self.mixer(normed, cache)
        if isinstance(y, tuple):
            y, cache = y
        return x + y, cache
'''.strip(),
    hints=(
        "`self.mixer = mixers[letter](config)`. The mixer reads "
        '`normalize(x, self.norm["weight"], self.eps)`; its output is added to the x that came '
        "in, not to the normalized one. Nothing is normalized after the sum.",
        "`y = self.mixer(normed) if cache is None else self.mixer(normed, cache)`. If y is a "
        "tuple, it is (output, cache); otherwise the cache that you passed has been changed in "
        "place. Return it in both cases.",
        "`empty_cache`: your `M` and `*` layers have a method `empty_cache(batch)`; for the letter "
        "E return None.",
    ),
    checks=(
        Check("names of the weights", checks.block_names, hint=1, points=1),
        Check("x + mixer(norm(x))", checks.block_values, hint=1, points=2),
        Check("eps of the config", checks.block_eps, hint=1, points=1),
        Check("caches", checks.block_caches, hint=3, points=1),
        Check("a text in pieces", checks.block_pieces, hint=2, points=1),
        Check("gradients", checks.block_gradients, hint=1, points=1),
    ),
    needs=("00.normalize", "02.decoding", "03.grouped_query_attention", "05.latent_moe"),
)


_BACKBONE_HEAD = '''class Backbone(nn.Module):
    """Token ids to logits: the whole model, with the names of a published checkpoint."""

    def __init__(self, config, mixers=None):
        """Args: config, the sizes and the pattern; mixers, as `Block` takes them."""
        super().__init__()
        self.eps = config.norm_eps
        self.backbone = nn.Module()
        self.backbone.norm_f = nn.ParameterDict({"weight": torch.ones(config.hidden_size)})'''

BACKBONE = Exercise(
    id="06.backbone",
    title="The whole model",
    objective="O1: assemble blocks into a model from a pattern.",
    minutes=20,
    difficulty=3,
    points=9,
    task=r"""
Put a `Block` for each letter of `config.pattern` between an embedding and a head:

- `__init__`: `backbone.embeddings` (an `nn.Embedding`), `backbone.layers` (an `nn.ModuleList` of
  blocks) and `lm_head` (an `nn.Linear` without bias). Embedding and head are two matrices.
- `empty_caches`: a list with one cache for each layer.
- `forward`: embedding, all layers in order, the final norm, the head. It hands each layer its own
  cache, and returns the logits and the list of caches after these tokens.
- `write`: continue each row with the token of the largest logit. Read the prompt once; afterwards
  each call reads only the one new token.
""".strip(),
    stub=f'''
{_BACKBONE_HEAD}
        raise NotImplementedError

    def empty_caches(self, batch):
        """One cache for each layer, before the first token of `batch` rows."""
        raise NotImplementedError

    def forward(self, tokens, caches=None):
        """Read tokens after the caches.

        Args:
            tokens: ids, b t.
            caches: a list with one entry for each layer, or None for a text from its beginning.

        Returns:
            (logits, caches): b t v, and a list with the cache of each layer after these tokens.
        """
        raise NotImplementedError

    def write(self, tokens, count):
        """Continue a text greedily.

        Args:
            tokens: the prompt, b t.
            count: how many tokens to write, at least 1.

        Returns:
            The new tokens, b count.
        """
        raise NotImplementedError
'''.strip(),
    solution=f'''
{_BACKBONE_HEAD}
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone.layers = nn.ModuleList(
            Block(config, letter, mixers) for letter in config.pattern
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def empty_caches(self, batch):
        """One cache for each layer, before the first token of `batch` rows."""
        return [block.empty_cache(batch) for block in self.backbone.layers]

    def forward(self, tokens, caches=None):
        """Read tokens after the caches."""
        x = self.backbone.embeddings(tokens)
        before = caches or [None] * len(self.backbone.layers)
        after = []
        for block, cache in zip(self.backbone.layers, before, strict=True):
            x, cache = block(x, cache)
            after.append(cache)
        return self.lm_head(normalize(x, self.backbone.norm_f["weight"], self.eps)), after

    def write(self, tokens, count):
        """Continue a text greedily."""
        caches, written = self.empty_caches(len(tokens)), []
        for _ in range(count):
            logits, caches = self(tokens, caches)
            tokens = logits[:, -1:].argmax(-1)
            written.append(tokens)
        return torch.cat(written, dim=1)
'''.strip(),
    hints=(
        "`self.backbone.layers = nn.ModuleList(Block(config, letter, mixers) for letter in "
        "config.pattern)`. The head has a matrix of its own: `nn.Linear(config.hidden_size, "
        "config.vocab_size, bias=False)`.",
        "`forward`: look the tokens up, and scale nothing. Each block returns a pair. Carry x on, "
        "and collect the caches in a new list. Without caches each block gets None. Last come "
        '`normalize(x, self.backbone.norm_f["weight"], self.eps)` and the head.',
        "`write`: begin with `caches = self.empty_caches(len(tokens))`, and let `logits, caches = "
        "self(tokens, caches)` run in a loop. The next token of each row is "
        "`logits[:, -1:].argmax(-1)`, b 1. In the next round it alone is read: all earlier "
        "tokens are in the caches.",
    ),
    checks=(
        Check("names of the weights", checks.backbone_names, hint=1, points=1),
        Check("embedding, final norm and head", checks.backbone_ends, hint=2, points=2),
        Check("several layers, in order", checks.backbone_order, hint=2, points=1),
        Check("eps of the config", checks.backbone_eps, hint=2, points=1),
        Check("one cache for each layer", checks.backbone_caches, hint=2, points=1),
        Check("a text in pieces", checks.backbone_pieces, hint=2, points=1),
        Check("greedy text", checks.backbone_write, hint=3, points=1),
        Check("gradients of all weights", checks.backbone_gradients, hint=2, points=1),
    ),
    needs=("00.normalize", "06.block"),
)


_READ_FOLDER = '''import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_folder(folder):
    """What a folder holds: (shards, weight_map), as `checkpoint_tensors` takes them."""
    folder = Path(folder)
    shards = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    if SINGLE in shards:
        return shards, None
    return shards, json.loads((folder / INDEX).read_text())["weight_map"]'''

CHECKPOINT_TENSORS = Exercise(
    id="06.checkpoint_tensors",
    title="A checkpoint under your names",
    objective="O3: read a checkpoint: names and shards.",
    minutes=15,
    difficulty=3,
    points=8,
    task="""
The given `read_folder` reads the files. Make the tensors of your model from them:

- With an index, take each tensor of `weight_map` from the file that it names. Leave out
  what else a file holds. Without an index, all tensors are in the file `model.safetensors`.
- A file that the index names may be missing. Raise `FileNotFoundError` with its name.
- Names begin with `backbone.` on the hub and with `model.` in the memory of transformers. Yours
  begin with `backbone.`. The head, `lm_head.`, and the MTP module, `mtp.`, have no prefix.
- Experts are stored one by one: `….experts.7.up_proj.weight`, f×l. Stack them to
  `….experts.up_proj`, e×f×l (e experts), in the order of their numbers; the same for `down_proj`.
  They may be in different files, and in any order. A name without a number is a stack already.
- The MTP module (multi-token prediction) is no part of your model. Return its tensors apart.
""".strip(),
    stub=f'''
{_READ_FOLDER}


def checkpoint_tensors(shards, weight_map=None):
    """The tensors of a checkpoint, by the names of the model.

    Args:
        shards: name of a file → its tensors, by their names in the file.
        weight_map: name of a tensor → name of its file, from the index. None: all are in SINGLE.

    Returns:
        (tensors, mtp): two dicts from name to tensor.

    Raises:
        FileNotFoundError: a file that the index names is not in `shards`; the message names it.
    """
    raise NotImplementedError
'''.strip(),
    solution=f'''
{_READ_FOLDER}


def checkpoint_tensors(shards, weight_map=None):
    """The tensors of a checkpoint, by the names of the model."""
    if weight_map is None:
        weight_map = dict.fromkeys(shards[SINGLE], SINGLE)
    tensors, stacks = {{}}, {{}}
    for name, file in weight_map.items():
        if file not in shards:
            raise FileNotFoundError(f"{{file}} is missing; the index names it for {{name}}.")
        own = re.sub(r"^model\\.", "backbone.", name)
        expert = re.fullmatch(r"(.+\\.experts)\\.(\\d+)\\.(up_proj|down_proj)\\.weight", own)
        if expert:
            stack = stacks.setdefault(f"{{expert[1]}}.{{expert[3]}}", {{}})
            stack[int(expert[2])] = shards[file][name]
        else:
            tensors[own] = shards[file][name]
    for name, stack in stacks.items():
        tensors[name] = torch.stack([stack[number] for number in sorted(stack)])
    mtp = {{name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}}
    return tensors, mtp
'''.strip(),
    hints=(
        "Go over `weight_map.items()`, not over the files. Without an index make one: "
        "`dict.fromkeys(shards[SINGLE], SINGLE)`. Test `file not in shards` first, and raise "
        "`FileNotFoundError` with the name of the file in its text.",
        '`re.sub(r"^model\\.", "backbone.", name)` changes the prefix and nothing else. '
        '`re.fullmatch(r"(.+\\.experts)\\.(\\d+)\\.(up_proj|down_proj)\\.weight", name)` finds one '
        "expert: groups 1 and 3 make the name of the stack, group 2 its number.",
        "Collect the experts of a stack in a dict from `int(number)` to tensor, and stack them "
        "when all files are read: `torch.stack([stack[i] for i in sorted(stack)])`. As texts, 10 "
        'comes before 2. At the end move what begins with "mtp." to a dict of its own.',
    ),
    checks=(
        Check("one file", checks.tensors_one_file, hint=1, points=1),
        Check("several files with an index", checks.tensors_shards, hint=1, points=1),
        Check("a missing file", checks.tensors_missing, hint=1, points=1),
        Check("prefixes", checks.tensors_prefixes, hint=2, points=1),
        Check("experts in the order of their numbers", checks.tensors_experts, hint=3, points=2),
        Check("experts that are stacked already", checks.tensors_stacked, hint=2, points=1),
        Check("the MTP module", checks.tensors_mtp, hint=3, points=1),
    ),
)


COUNT = Exercise(
    id="06.count",
    title="All parameters, and those of one token",
    objective="O4: count all parameters and the active ones to the unit.",
    minutes=8,
    difficulty=2,
    points=5,
    task="""
Count a model of any pattern of `M`, `*` and `E`, to the unit: all its parameters, and those with
which one token is computed. Your `layer_parameters(config, letter)` of chapter 00
returns (stored, read) of a layer with its norm. Outside the layers stand embedding, final norm and
head. As in NVIDIA's reports, embedding and head are active in full. The MTP module does not count.
""".strip(),
    stub='''
def count(config):
    """Parameters of a model without its MTP module.

    Args:
        config: the sizes and the pattern.

    Returns:
        (total, active): two ints.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
def count(config):
    """Parameters of a model without its MTP module."""
    outside = (2 * config.vocab_size + 1) * config.hidden_size
    total = active = outside
    for letter in config.pattern:
        stored, read = layer_parameters(config, letter)
        total += stored
        active += read
    return total, active
'''.strip(),
    hints=(
        "Go over the letters of `config.pattern`: each is one layer. `layer_parameters(config, "
        "letter)` gives (stored, read).",
        "Embedding and head are two matrices of v×d numbers each, and both count. The final norm "
        "has d.",
        "`total` adds up what is stored, `active` what is read. Both contain the "
        "`(2 * v + 1) * d` numbers outside the layers.",
    ),
    checks=(
        Check("outside the layers", checks.count_outside, hint=2, points=1),
        Check("every layer of a pattern", checks.count_layers, hint=1, points=1),
        Check("active parameters", checks.count_active, hint=3, points=1),
        Check("Nano and Super", checks.count_published, hint=3, points=2),
    ),
    needs=("00.layer_parameters",),
)


SECONDS_PER_TOKEN = Exercise(
    id="06.seconds_per_token",
    title="The time of a token",
    objective="O5: predict the time of a token from bytes and FLOPs.",
    minutes=8,
    difficulty=2,
    points=4,
    task=r"""
Estimate how long the next token takes. A layer has to

- make `made` bytes of weights (generate, decode or read them from a disk),
- read `read` bytes of weights from memory, and
- compute `flops`.

Each has its rate per second. Reading and computing overlap, so the slower of the two counts. Making
comes before both. The times of all layers of the pattern and of the head add up. A rate may be
infinite, for weights that need not be made.
""".strip(),
    stub='''
def seconds_per_token(pattern, work, rates):
    """An estimate of the time of one token.

    Args:
        pattern: one letter a layer.
        work: for each letter of the pattern, and for "head": (made, read, flops) of one layer.
        rates: (made, read, flops) per second.

    Returns:
        Seconds.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
def seconds_per_token(pattern, work, rates):
    """An estimate of the time of one token."""
    seconds = 0.0
    for part in [*pattern, "head"]:
        making, reading, computing = (n / rate for n, rate in zip(work[part], rates, strict=True))
        seconds += making + max(reading, computing)
    return seconds
'''.strip(),
    hints=(
        "One layer takes `made / rates[0] + max(read / rates[1], flops / rates[2])` seconds. A "
        "number divided by an infinite rate is 0.",
        "Take the maximum in each layer, not once for the sums over all layers: a layer that "
        "waits for memory does not compute for another one.",
        'Go over `[*pattern, "head"]`: each letter as often as it occurs, and the head once.',
    ),
    checks=(
        Check("one layer", checks.seconds_one_layer, hint=1, points=1),
        Check("every layer of a pattern, and the head", checks.seconds_pattern, hint=3, points=1),
        Check("the slower one, in each layer", checks.seconds_slower, hint=2, points=1),
        Check("weights that need not be made", checks.seconds_ready, hint=1, points=1),
    ),
    kind="optional",
)


EXERCISES: tuple[Exercise, ...] = (
    BLOCK,
    BACKBONE,
    CHECKPOINT_TENSORS,
    COUNT,
    SECONDS_PER_TOKEN,
)
