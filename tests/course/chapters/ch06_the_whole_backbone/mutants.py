"""Wrong answers to chapter 06's exercises: mistakes that real projects have shipped.

Each has to fail, and the message has to name the hint that is given here. Most are the reference
solution with one place changed.
"""

from __future__ import annotations

from nemotron_lite.course.exercises import exercise
from tests.course.chapters.mutants import Mutant


def _with(exercise_id: str, *changes: tuple[str, str]) -> str:
    """The reference solution with places exchanged; each must be there exactly once."""
    source = exercise(exercise_id).solution
    for old, new in changes:
        assert source.count(old) == 1, f"{exercise_id}: {old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


MUTANTS: dict[str, list[Mutant]] = {
    "06.block": [
        Mutant(
            name="no residual stream",
            source=_with("06.block", ("return x + y, cache", "return y, cache")),
            hint=1,
            bug="The sum is left out; a deep model then learns nothing.",
        ),
        Mutant(
            name="added to the normalized stream",
            source=_with("06.block", ("return x + y, cache", "return normed + y, cache")),
            hint=1,
            bug="apply_residual_connection_post_layernorm, the option of early BLOOM models, which "
            "takes the residual after the norm.",
        ),
        Mutant(
            name="post-norm",
            source=_with(
                "06.block",
                ('normed = normalize(x, self.norm["weight"], self.eps)', "normed = x"),
                (
                    "return x + y, cache",
                    'return normalize(x + y, self.norm["weight"], self.eps), cache',
                ),
            ),
            hint=1,
            bug="The order of the first Transformer: the weights load, and the outputs differ.",
        ),
        Mutant(
            name="the mixer's output is normalized",
            source=_with(
                "06.block",
                ('normed = normalize(x, self.norm["weight"], self.eps)', "normed = x"),
                (
                    "return x + y, cache",
                    'return x + normalize(y, self.norm["weight"], self.eps), cache',
                ),
            ),
            hint=1,
            bug="The norm is put behind the mixer, as in OLMo 2.",
        ),
        Mutant(
            name="a fixed eps",
            source=_with("06.block", ("config.norm_eps", "1e-5")),
            hint=1,
            bug="The default of the norm is used, and not layer_norm_epsilon of config.json.",
        ),
        Mutant(
            name="the old cache is returned",
            source=_with("06.block", ("y, cache = y", "y = y[0]")),
            hint=2,
            bug="The state after the tokens is dropped: every token starts from the same state.",
        ),
        Mutant(
            name="the mixer does not get the cache",
            source=_with(
                "06.block",
                (
                    "self.mixer(normed) if cache is None else self.mixer(normed, cache)",
                    "self.mixer(normed)",
                ),
            ),
            hint=2,
            bug="past_key_values are accepted and ignored: text comes out, and forgets its prompt.",
        ),
        Mutant(
            name="a cache for attention only",
            source=_with("06.block", ('None if self.letter == "E"', 'None if self.letter != "*"')),
            hint=3,
            bug="A cache made for Transformers is given to a hybrid: Mamba layers start again with "
            "each token.",
        ),
        Mutant(
            name="a detached norm",
            source=_with("06.block", ("normalize(x, self.norm", "normalize(x.detach(), self.norm")),
            hint=1,
            bug="Right values, and no gradient through the mixers.",
        ),
    ],
    "06.backbone": [
        Mutant(
            name="no final norm",
            source=_with(
                "06.backbone",
                (
                    'self.lm_head(normalize(x, self.backbone.norm_f["weight"], self.eps))',
                    "self.lm_head(x)",
                ),
            ),
            hint=2,
            bug="norm_f is loaded and not used.",
        ),
        Mutant(
            name="a tied head",
            source=_with(
                "06.backbone",
                (
                    "bias=False)\n",
                    "bias=False)\n        self.lm_head.weight = self.backbone.embeddings.weight\n",
                ),
            ),
            hint=1,
            bug="tie_word_embeddings is taken to be true, as it is in many small models: the head "
            "that was loaded is overwritten.",
        ),
        Mutant(
            name="a scaled embedding",
            source=_with(
                "06.backbone",
                (
                    "x = self.backbone.embeddings(tokens)",
                    "x = self.backbone.embeddings(tokens) * self.lm_head.in_features**0.5",
                ),
            ),
            hint=2,
            bug="The factor sqrt(d) of Gemma and of the first Transformer.",
        ),
        Mutant(
            name="a fixed eps of the final norm",
            source=_with("06.backbone", ("self.eps = config.norm_eps", "self.eps = 1e-5")),
            hint=2,
            bug="A norm outside the layers is made with its default eps.",
        ),
        Mutant(
            name="layers by kind",
            source=_with(
                "06.backbone",
                ("for letter in config.pattern", "for letter in sorted(config.pattern)"),
            ),
            hint=1,
            bug="The layers of each kind are built together; the weights of another order do not "
            "fit.",
        ),
        Mutant(
            name="the last layer left out",
            source=_with(
                "06.backbone",
                (
                    "zip(self.backbone.layers, before, strict=True)",
                    "zip(self.backbone.layers[:-1], before)",
                ),
            ),
            hint=2,
            bug="A range that ends one too early; the logits are plausible, and worse.",
        ),
        Mutant(
            name="the stream without the layers",
            source=_with(
                "06.backbone", ("x, cache = block(x, cache)", "_, cache = block(x, cache)")
            ),
            hint=2,
            bug="A result is computed and thrown away.",
        ),
        Mutant(
            name="one cache for all layers of a kind",
            source=_with(
                "06.backbone",
                (
                    "return [block.empty_cache(batch) for block in self.backbone.layers]",
                    "made = {b.letter: b.empty_cache(batch) for b in self.backbone.layers}\n"
                    "        return [made[block.letter] for block in self.backbone.layers]",
                ),
            ),
            hint=2,
            bug="[cache] * n: the keys of all attention layers end up in one buffer.",
        ),
        Mutant(
            name="the caches from before",
            source=_with("06.backbone", ("after.append(cache)", "after = before")),
            hint=2,
            bug="States that a layer returns are not kept; what is changed in place survives.",
        ),
        Mutant(
            name="the prompt is read again",
            source=_with(
                "06.backbone",
                (
                    "tokens = logits[:, -1:].argmax(-1)\n            written.append(tokens)",
                    "written.append(logits[:, -1:].argmax(-1))\n"
                    "            tokens = torch.cat([tokens, written[-1]], dim=1)",
                ),
            ),
            hint=3,
            bug="The whole text is read behind a cache that holds it already.",
        ),
        Mutant(
            name="every row gets the token of the first",
            source=_with(
                "06.backbone",
                (
                    "tokens = logits[:, -1:].argmax(-1)",
                    "tokens = logits[:1, -1:].argmax(-1).expand(len(tokens), 1)",
                ),
            ),
            hint=3,
            bug="A loop for one text is run on a batch.",
        ),
        Mutant(
            name="no gradient to the embedding",
            source=_with(
                "06.backbone",
                ("self.backbone.embeddings(tokens)", "self.backbone.embeddings(tokens).detach()"),
            ),
            hint=2,
            bug="Right logits, and an embedding that never learns.",
        ),
    ],
    "06.checkpoint_tensors": [
        Mutant(
            name="every tensor of every file",
            source=_with(
                "06.checkpoint_tensors",
                (
                    "for name, file in weight_map.items():",
                    "for name, file in [(n, f) for f in shards for n in shards[f]]:",
                ),
            ),
            hint=1,
            bug="glob('*.safetensors') without the index: shards of an earlier save are read too.",
        ),
        Mutant(
            name="a missing file is skipped",
            source=_with(
                "06.checkpoint_tensors",
                (
                    'raise FileNotFoundError(f"{file} is missing; the index names it for {name}.")',
                    "continue",
                ),
            ),
            hint=1,
            bug="A download that was interrupted: the layers of the missing shard keep their "
            "random weights.",
        ),
        Mutant(
            name="an error without the name",
            source=_with(
                "06.checkpoint_tensors",
                ('f"{file} is missing; the index names it for {name}."', '"a shard is missing"'),
            ),
            hint=1,
            bug="One of 50 files is missing, and the message does not say which.",
        ),
        Mutant(
            name="the prefix is cut off",
            source=_with(
                "06.checkpoint_tensors",
                (
                    're.sub(r"^model\\.", "backbone.", name)',
                    're.sub(r"^(model|backbone)\\.", "", name)',
                ),
            ),
            hint=1,
            bug="State dicts of the inner module: with strict=False nothing is loaded, and no "
            "error is raised.",
        ),
        Mutant(
            name="only names of the hub",
            source=_with(
                "06.checkpoint_tensors", ('re.sub(r"^model\\.", "backbone.", name)', "name")
            ),
            hint=2,
            bug="A checkpoint that was saved from memory has other names (model., not backbone.).",
        ),
        Mutant(
            name="a prefix for the head",
            source=_with(
                "06.checkpoint_tensors",
                (
                    're.sub(r"^model\\.", "backbone.", name)',
                    '"backbone." + re.sub(r"^(model|backbone)\\.", "", name)',
                ),
            ),
            hint=1,
            bug="lm_head.weight becomes backbone.lm_head.weight and is not found.",
        ),
        Mutant(
            name="experts sorted as texts",
            source=_with(
                "06.checkpoint_tensors",
                ("stack[int(expert[2])]", "stack[expert[2]]"),
            ),
            hint=3,
            bug="10 comes before 2: from ten experts on the router chooses other experts.",
        ),
        Mutant(
            name="experts in the order of the file",
            source=_with("06.checkpoint_tensors", ("in sorted(stack)", "in stack")),
            hint=3,
            bug="safetensors sorts names as texts, so the order of a file is that of the texts.",
        ),
        Mutant(
            name="the experts of all layers in one stack",
            source=_with(
                "06.checkpoint_tensors",
                (
                    'stacks.setdefault(f"{expert[1]}.{expert[3]}", {})',
                    'stacks.setdefault(f"backbone.layers.1.mixer.experts.{expert[3]}", {})',
                ),
            ),
            hint=3,
            bug="A conversion script with the number of a layer in it.",
        ),
        Mutant(
            name="the shared expert is taken for a routed one",
            source=_with(
                "06.checkpoint_tensors",
                (
                    r'r"(.+\.experts)\.(\d+)\.(up_proj|down_proj)\.weight"',
                    r'r"(.+experts)\.?(\d*)\.(up_proj|down_proj)\.weight"',
                ),
                ("stack[int(expert[2])]", "stack[int(expert[2] or 0)]"),
            ),
            hint=1,
            bug="A pattern that is too wide: shared_experts matches it as well.",
        ),
        Mutant(
            name="the MTP module is dropped",
            source=_with("06.checkpoint_tensors", ("return tensors, mtp", "return tensors, {}")),
            hint=3,
            bug="_keys_to_ignore_on_load_unexpected = [r'mtp.*']: transformers drops the module "
            "without a word.",
        ),
        Mutant(
            name="the MTP module among the others",
            source=_with("06.checkpoint_tensors", ("tensors.pop(name)", "tensors[name]")),
            hint=3,
            bug="Unexpected keys in load_state_dict; strict=False then hides the real ones.",
        ),
    ],
    "06.count": [
        Mutant(
            name="a tied head",
            source=_with("06.count", ("(2 * config.vocab_size + 1)", "(config.vocab_size + 1)")),
            hint=2,
            bug="Embedding and head counted once: half a billion parameters of Super are missing.",
        ),
        Mutant(
            name="no final norm",
            source=_with("06.count", ("(2 * config.vocab_size + 1)", "(2 * config.vocab_size)")),
            hint=2,
            bug="A count that is right up to d.",
        ),
        Mutant(
            name="each kind once",
            source=_with("06.count", ("in config.pattern", "in set(config.pattern)")),
            hint=1,
            bug="A model of one layer of each kind.",
        ),
        Mutant(
            name="half as many layers",
            source=_with(
                "06.count",
                ("in config.pattern", "in config.pattern[: len(config.pattern) // 2 + 1]"),
            ),
            hint=1,
            bug="num_hidden_layers is taken for pairs of a mixer and an MLP, as in a Transformer.",
        ),
        Mutant(
            name="everything is active",
            source=_with("06.count", ("active += read", "active += stored")),
            hint=3,
            bug="A mixture planned as a dense model: 120B a token in place of 12B.",
        ),
        Mutant(
            name="the embedding is looked up",
            source=_with(
                "06.count",
                (
                    "return total, active",
                    "return total, active - (config.vocab_size - 1) * config.hidden_size",
                ),
            ),
            hint=3,
            bug="Another convention: what is compared with a report has to count as the report "
            "does.",
        ),
    ],
    "06.seconds_per_token": [
        Mutant(
            name="reading and computing one after the other",
            source=_with(
                "06.seconds_per_token", ("max(reading, computing)", "reading + computing")
            ),
            hint=1,
            bug="The times of a profiler's rows are added up, although they overlap.",
        ),
        Mutant(
            name="FLOPs only",
            source=_with("06.seconds_per_token", ("max(reading, computing)", "computing")),
            hint=1,
            bug="A token's time from FLOPs alone: decoding waits for memory.",
        ),
        Mutant(
            name="making overlaps too",
            source=_with(
                "06.seconds_per_token",
                ("making + max(reading, computing)", "max(making, reading, computing)"),
            ),
            hint=1,
            bug="A loader that is taken to be hidden behind the computation.",
        ),
        Mutant(
            name="no head",
            source=_with("06.seconds_per_token", ('[*pattern, "head"]', "pattern")),
            hint=3,
            bug="The head is one matrix of v×d, and is forgotten in the count of layers.",
        ),
        Mutant(
            name="each kind once",
            source=_with("06.seconds_per_token", ("[*pattern,", "[*set(pattern),")),
            hint=3,
            bug="The time of one layer of each kind.",
        ),
        Mutant(
            name="the maximum of the sums",
            source="""
def seconds_per_token(pattern, work, rates):
    parts = [work[part] for part in [*pattern, "head"]]
    making, reading, computing = (
        sum(numbers) / rate for numbers, rate in zip(zip(*parts), rates)
    )
    return making + max(reading, computing)
""",
            hint=2,
            bug="One roofline for the whole model: layers that wait and layers that compute are "
            "taken to overlap.",
        ),
    ],
}
