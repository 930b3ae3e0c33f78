"""What chapter 06 runs beside the learner's code: a full-size model, and what it is compared with.

    Giant          all 88 layers of Super with generated weights; tokens and single layers, timed
    stream         the residual stream of a model, layer by layer
    deep, growth, typical  an untrained model as deep as Super, in miniature, and its stream
    full_size_difference   a learner's block beside one layer of a Giant
    gradient_of_input, lost_in_bf16   what passes along the stream, and what is lost in it
    experts_of_a_prompt   weights that a prompt reads
    write_checkpoint   a small model that transformers made and wrote to a folder in shards
    greedy_text    what transformers writes after a prompt
    reopened_by_transformers   what becomes of a checkpoint that transformers reads and writes
    backbone_weights   the weights of a model without those of its MTP module
    small          an untrained model of a few layers, for any pattern
    calls          how many operations of PyTorch one call makes, without views
    calls_of_a_token       the same for one token, by kind of layer
    shuffled       what the last token of a model notices if the earlier ones change places
    step_sizes, clamped, divergence   dt of a trained model, and what a lower limit of dt changes
    spellings      infinity in three config.json
    rates, vector_rate     bytes and FLOPs per second of this machine
    shown_*        tables of measured numbers; their plain text has none

`Giant` keeps few of its weights. The budget of bytes has room for the head, which passes through
the workspace, and for what is small: norms, routers, latent projections, attention. Everything else
is made again for each token, in each layer alike, so one layer of a kind stands for all of it.

Left out: real weights of this size. What generated ones are, and are not, is in
`offload/generated.py`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_lite import Nemotron, NemotronConfig, hf_config, ledger
from nemotron_lite.course import output
from nemotron_lite.course.display import progress
from nemotron_lite.course.factsheet import tell
from nemotron_lite.course.records import record
from nemotron_lite.layers import Mamba2
from nemotron_lite.offload import Offloaded, count_flops
from nemotron_lite.ops.linear import linear as ops_linear

GIB = 2**30
BUDGET = 2400 * 2**20  # bytes of weights in memory: the workspace, and what is small
ROUNDS = 3  # of a timed layer
HEAD = "head"  # stands beside the letters of a pattern
NAMES = {"M": "Mamba-2", "*": "attention", "E": "LatentMoE", HEAD: "head"}
SHARD = "100KB"  # so small that a tiny model becomes several files
PROMPT = "def read(path):\n    with open("
DT_CLAMP = 0.001  # what transformers reads from time_step_min

# Written by transformers. More than ten experts, so that their order as text is not their order.
TINY = NemotronConfig(
    "MEM*E", vocab_size=256, hidden_size=64, initializer_range=0.1, chunk_size=64,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=1,
    n_routed_experts=12, num_experts_per_tok=4, moe_intermediate_size=48, moe_latent_size=16,
    moe_shared_expert_intermediate_size=64, routed_scaling_factor=2.5,
    mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip

# Super's 88 layers at a 64th of its width.
DEEP = TINY.replace(
    pattern=NemotronConfig.from_preset("super").pattern, initializer_range=0.02,
    mtp_pattern="", mtp_depths=0,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one call did: of the model, or of one layer.

    Attributes:
        seconds: of this machine.
        made: bytes of weights that had to be generated.
        read: bytes of weights that took part.
        weights: numbers in them.
        flops: counted from the operands of every product.
    """

    seconds: float
    made: int
    read: int
    weights: int
    flops: int

    @property
    def in_memory(self) -> tuple[int, int, int]:
        """(made, read, flops) where all weights are in memory."""
        return 0, self.read, self.flops

    @property
    def amounts(self) -> tuple[int, int, int]:
        """(made, read, flops), as `seconds_per_token` takes them."""
        return self.made, self.read, self.flops


class Giant:
    """All layers of a config with generated weights, of which few are in memory.

    Args:
        config: Super's, unless a test takes a smaller one.
        budget: bytes of weights in memory.
    """

    def __init__(self, config: NemotronConfig | None = None, budget: int = BUDGET) -> None:
        config = config or NemotronConfig.from_preset("super")
        self.config = config.replace(mtp_pattern="", mtp_depths=0)
        model = Nemotron.from_config(self.config, weights="generated", seed=0, budget=budget)
        assert isinstance(model, Offloaded)
        self.model: Offloaded = model
        self.cache = model.empty_cache(1)
        self.tokens: list[int] = [self.config.bos_token_id]  # the next call reads the last one

    @property
    def gib_in_memory(self) -> float:
        """GiB of weights that are in memory now."""
        return self.model.store.nbytes / GIB

    def token(self, *, timed: bool = True) -> Work:
        """Read the last token and write the next one; a bar shows the layers, perhaps the time."""
        layers: Any = self.model.backbone.layers
        bar = progress(range(len(layers)), f"one token through {len(layers)} layers", timed=timed)

        def step(*_: Any) -> None:  # what a hook returns would replace the output
            next(bar)

        handles = [layer.register_forward_hook(step) for layer in layers]
        try:
            with self._counted() as work, torch.inference_mode():
                logits = self.model(torch.tensor([self.tokens[-1:]]), self.cache).logits
        finally:
            for handle in handles:
                handle.remove()
        for _ in bar:  # ends it
            pass
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the logits of the full-size model are not finite.")
        self.tokens.append(int(logits[0, -1].argmax()))
        return work[0]

    def part(self, letter: str) -> Work:
        """One layer of a kind, or the head, on one token: the median of some rounds.

        The layer is the second of its kind where there is one. Its input is random.
        """
        x = torch.randn(1, 1, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        x = x.to(self.model.dtype)
        layers: Any = self.model.backbone.layers
        places = [i for i, kind in enumerate(self.config.pattern) if kind == letter]
        module = self.model.lm_head if letter == HEAD else layers[places[:2][-1]]
        found = []
        for _ in range(ROUNDS + 1):  # the first one makes what stays
            cache = None if letter == HEAD else self.model.empty_cache(1).layers[places[:2][-1]]
            arguments = (x,) if letter == HEAD else (x, cache)
            with self._counted() as work, torch.inference_mode():
                module(*arguments)
            found.append(work[0])
        return replace(found[-1], seconds=median(work.seconds for work in found[1:]))

    def parts(self) -> dict[str, Work]:
        """`part` for each kind of layer and for the head."""
        return {kind: self.part(kind) for kind in [*dict.fromkeys(self.config.pattern), HEAD]}

    @contextmanager
    def _counted(self) -> Iterator[list[Work]]:
        """A list that holds the work of the block when it ends."""
        traffic, found = self.model.store.traffic, list[Work]()
        traffic.reset()
        with count_flops(self.model) as count:
            start = time.perf_counter()
            yield found
            seconds = time.perf_counter() - start
        made, used = traffic.fetched_bytes, traffic.used_bytes
        found.append(Work(seconds, made, used, traffic.weights, count.total))


@torch.no_grad()
def full_size_difference(block: Any, giant: Giant, number: int) -> float:
    """How far a learner's `Block` is from one full-size layer with the same generated weights.

    Only for `M` and `*`: the experts of one `E` of Super are 5.6 GB in BF16.

    Args:
        block: of the Giant's sizes; it takes the weights.
        giant: computes in BF16, the block in float32.
        number: of the layer.

    Returns:
        The size of the difference of both streams, divided by the size of what the layer adds.
    """
    for name, tensor in block.state_dict().items():
        tensor.copy_(giant.model.read(f"backbone.layers.{number}.{name}"))
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(1, 4, giant.config.hidden_size, generator=draw).to(giant.model.dtype)
    layers: Any = giant.model.backbone.layers
    theirs = layers[number](x).float()
    return _rms(block(x.float())[0] - theirs) / _rms(theirs - x.float())


def weights_of_a_token(config: NemotronConfig) -> int:
    """What the ledger says that a token uses: all but the embedding, of which it takes one row."""
    return ledger.parameters(config).active_without_embedding + config.hidden_size


def together(pattern: str, parts: Mapping[str, Work]) -> float:
    """Seconds of all layers and the head, from one measured layer of each kind."""
    return sum(parts[letter].seconds for letter in [*pattern, HEAD])


def rates(giant: Giant) -> tuple[float, float, float]:
    """(made, read, flops) per second: the best of some rounds with one large matrix of a layer.

    Reading is a product with one row, so it contains a multiplication, and memory alone may be
    faster. Experts are multiplied by this call; `vector_rate` is that of the other matrices. FLOPs
    are those of a product with many rows.
    """
    weight, name = _large_matrix(giant)
    one, many = (torch.ones(rows, weight.shape[1], dtype=weight.dtype) for rows in (1, 64))
    store = giant.model.store
    with torch.inference_mode():
        making = _fastest(lambda: store.source.read(name, weight))
        reading = _fastest(lambda: F.linear(one, weight))
        computing = _fastest(lambda: F.linear(many, weight))
    return weight.nbytes / making, weight.nbytes / reading, 2 * 64 * weight.numel() / computing


def vector_rate(giant: Giant) -> float:
    """Bytes of weights per second by the product that `M`, `*` and the head take for one row.

    It is `ops.linear`: without gradients a product of a matrix and a vector. On some machines that
    is faster than the product of matrices in `rates`, on others slower.
    """
    weight, _ = _large_matrix(giant)
    row = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    with torch.inference_mode():
        return weight.nbytes / _fastest(lambda: ops_linear(row, weight))


def _large_matrix(giant: Giant) -> tuple[Tensor, str]:
    """`in_proj` of a Mamba layer, filled with ones, and its name."""
    name = f"backbone.layers.{giant.config.pattern.index('M')}.mixer.in_proj.weight"
    shape = giant.config.mamba_in_proj_size, giant.config.hidden_size
    return torch.ones(shape, dtype=giant.model.dtype), name


def _fastest(call: Any) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class Added:
    """What one layer did to the residual stream of a text.

    Attributes:
        kind: its letter; "" for the embedding.
        size: root mean square of what it added.
        after: root mean square of the stream behind it.
    """

    kind: str
    size: float
    after: float


@torch.no_grad()
def stream(model: Nemotron, tokens: Int[Tensor, "b t"]) -> list[Added]:
    """The embedding and every layer of a model on a text."""
    x = model.backbone.embed(tokens)
    found = [Added("", _rms(x), _rms(x))]
    for block in model.backbone.layers:
        before, x = x, block(x)
        kind: Any = block.kind
        found.append(Added(kind, _rms(x - before), _rms(x)))
    return found


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def deep(wider: int = 1) -> NemotronConfig:
    """`DEEP` with all its widths times a factor: of the stream, the mixers and the experts."""
    widths = (
        "hidden_size", "num_attention_heads", "mamba_num_heads", "moe_intermediate_size",
        "moe_latent_size", "moe_shared_expert_intermediate_size",
    )  # fmt: skip
    return DEEP.replace(**{name: wider * getattr(DEEP, name) for name in widths})


def growth(config: NemotronConfig, seed: int = 0) -> list[Added]:
    """`stream` of an untrained model on random tokens.

    Args:
        config: such as `deep()`.
        seed: of the weights and the tokens.
    """
    model = Nemotron(config, seed=seed).eval()
    draw = torch.Generator().manual_seed(seed)
    return stream(model, torch.randint(config.vocab_size, (2, 64), generator=draw))


def typical(run: Sequence[Added]) -> dict[str, float]:
    """What one layer of each kind adds, as a multiple of the embedding: root mean square."""
    found = {}
    for kind in "M*E":
        sizes = [(layer.size / run[0].after) ** 2 for layer in run if layer.kind == kind]
        found[kind] = math.sqrt(sum(sizes) / len(sizes))
    return found


def gradient_of_input(*, post_norm: bool, layers: int = 44) -> float:
    """The gradient at the embedding divided by the gradient at the end of an untrained model.

    Its matrices are large enough that an `M` adds about as much as the stream holds.

    Args:
        post_norm: take norm(x + mixer(x)) in every layer instead of x + mixer(norm(x)).
        layers: how many of the 88 to run.
    """
    large = 1 / math.sqrt(DEEP.hidden_size)
    model = Nemotron(DEEP.replace(initializer_range=large, rescale_prenorm_residual=False), seed=0)
    draw = torch.Generator().manual_seed(0)
    begin = torch.randn(1, 32, DEEP.hidden_size, generator=draw).requires_grad_()
    x = begin
    blocks: Any = model.backbone.layers
    for block in blocks[:layers]:
        x = block.norm(x + block.mixer(x)) if post_norm else block(x)
    end = torch.randn(x.shape, generator=draw)
    (gradient,) = torch.autograd.grad(x, begin, end)
    return _rms(gradient) / _rms(end)


@torch.no_grad()
def lost_in_bf16(model: Nemotron, tokens: Int[Tensor, "b t"]) -> list[float]:
    """For each layer the share of its numbers that change nothing if the stream is in BF16."""
    x = model.backbone.embed(tokens)
    shares = []
    for block in model.backbone.layers:
        before, x = x, block(x)
        stored = before.bfloat16()
        added = (x - before).bfloat16()
        shares.append(float((stored + added == stored).double().mean()))
    return shares


def experts_of_a_prompt(config: NemotronConfig, tokens: int) -> float:
    """Weights that a prompt uses if every token chooses its experts at random."""
    counted = ledger.parameters(config)
    experts = [row for row in counted.rows if row.name == "experts" and not row.mtp]
    every, chosen = (sum(v) for v in zip(*((r.total, r.active) for r in experts), strict=True))
    rest = counted.active_without_embedding - chosen
    left_out = (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    return float(rest + every * (1 - left_out) + tokens * config.hidden_size)


def quiet_transformers() -> Any:
    """The library without its bars and its advice about CUDA packages; imported when needed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def write_checkpoint(folder: str | Path) -> Any:
    """Let transformers make a model of `TINY`'s sizes and save it in shards. It has no MTP module.

    Returns:
        The model of transformers.
    """
    library = quiet_transformers()
    keys = hf_config.to_hf(TINY.replace(mtp_pattern="", mtp_depths=0))
    for key in ("architectures", "model_type"):
        keys.pop(key)
    sizes = library.NemotronHConfig(**keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = library.NemotronHForCausalLM(sizes).eval()
    model.save_pretrained(folder, max_shard_size=SHARD)
    return model


@torch.no_grad()
def greedy_text(model: Any, tokens: Int[Tensor, "1 t"], count: int) -> list[int]:
    """The tokens that a model of transformers writes, without a stop token.

    The mask is given: `generate` would otherwise hide each token of the prompt that is equal to
    the padding token.
    """
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens)
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False)
    written: list[int] = found[0, tokens.shape[1] :].tolist()
    return written


def reopened_by_transformers(folder: str | Path, to: str | Path) -> dict[str, int]:
    """Tensors of a checkpoint before and after transformers has read and written it.

    Returns:
        "mtp in the files", "mtp written again": tensors of the MTP module.
        "modules in config.json": what the new file says of MTP modules.
    """
    library = quiet_transformers()
    library.NemotronHForCausalLM.from_pretrained(folder).save_pretrained(to)
    sizes = json.loads((Path(to) / "config.json").read_text())
    return {
        "mtp in the files": _mtp_tensors(folder),
        "mtp written again": _mtp_tensors(to),
        "modules in config.json": sizes["num_nextn_predict_layers"],
    }


def _mtp_tensors(folder: str | Path) -> int:
    from safetensors import safe_open

    count = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(name.startswith("mtp.") for name in tensors.keys())  # noqa: SIM118
    return count


def backbone_weights(model: Nemotron) -> dict[str, Tensor]:
    """The tensors of a model without its MTP module, by name."""
    return {n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")}


def small(pattern: str) -> Nemotron:
    """An untrained model with `TINY`'s sizes and another pattern."""
    return Nemotron(TINY.replace(pattern=pattern, mtp_pattern="", mtp_depths=0), seed=0).eval()


class _Counter(TorchDispatchMode):
    """Counts the operations that PyTorch runs inside the block; a view computes nothing."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def calls(run: Callable[[], Any]) -> int:
    """How many operations of PyTorch a call makes, without views; most of them are a kernel."""
    with _Counter() as counter:
        run()
    return counter.calls


def calls_by_kind(model: Any, pattern: str, run: Callable[[], Any]) -> dict[str, int]:
    """`calls` of one run: those of all layers of each kind, of the rest, and all.

    Args:
        model: has its layers in `backbone.layers`, as a learner's `Backbone` does.
        pattern: their letters.
        run: calls the model.
    """
    found = dict.fromkeys([*dict.fromkeys(pattern), "rest", "all"], 0)
    before: list[int] = []
    handles = []
    with _Counter() as counter:

        def enter(*_: Any) -> None:
            before.append(counter.calls)

        def leave(letter: str) -> Any:
            def hook(*_: Any) -> None:  # what a hook returns would replace the output
                found[letter] += counter.calls - before.pop()

            return hook

        for layer, letter in zip(model.backbone.layers, pattern, strict=True):
            handles.append(layer.register_forward_pre_hook(enter))
            handles.append(layer.register_forward_hook(leave(letter)))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    found["all"] = counter.calls
    found["rest"] = counter.calls - sum(found[letter] for letter in set(pattern))
    return found


@torch.no_grad()
def calls_of_a_token(
    mine: Any, model: Nemotron, tokens: Int[Tensor, "1 t"]
) -> dict[str, dict[str, int]]:
    """`calls_by_kind` for one token after others: of the learner's model and of the package's."""
    _, caches = mine(tokens)
    cache = model.empty_cache(1)
    for piece in (tokens, tokens[:, -1:]):  # the first token prepares the next ones
        model(piece, cache)
    last, pattern = tokens[:, -1:], model.config.pattern
    return {
        "your model": calls_by_kind(mine, pattern, lambda: mine(last, caches)),
        "the package's": calls_by_kind(model, pattern, lambda: model(last, cache)),
    }


@torch.no_grad()
def shuffled(model: nn.Module, tokens: Int[Tensor, "1 t"], generator: torch.Generator) -> float:
    """How much the logits of the last token change if all earlier ones change places.

    Args:
        model: a learner's `Backbone`, which returns (logits, caches).
        tokens: a text.
        generator: of the order.
    """
    order = torch.randperm(tokens.shape[1] - 1, generator=generator)
    other = torch.cat([tokens[:, :-1][:, order], tokens[:, -1:]], dim=1)
    (first, _), (second, _) = model(tokens), model(other)
    return float((first[:, -1] - second[:, -1]).abs().max() / first[:, -1].abs().max())


@torch.no_grad()
def step_sizes(model: Nemotron, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "m n"]:
    """dt of every Mamba layer m, head and token of a text, before any limit."""
    found: list[Tensor] = []
    handles = []

    def keep(mixer: Mamba2) -> Any:
        def hook(module: Any, arguments: Any, projected: Tensor) -> None:
            dt = projected.split_with_sizes(list(mixer.splits), dim=-1)[2]
            found.append(F.softplus(dt.float() + mixer.dt_bias.float()).flatten())

        return hook

    for module in model.modules():
        if isinstance(module, Mamba2):
            handles.append(module.in_proj.register_forward_hook(keep(module)))
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def python_text() -> str:
    """A long text that Python's standard library has everywhere: the source of argparse."""
    return inspect.getsource(argparse)


def clamped(model: Nemotron, low: float = DT_CLAMP) -> Nemotron:
    """The same weights with a lower limit of dt, as transformers has in prefill."""
    other = Nemotron(model.config.replace(time_step_limit=(low, math.inf)), seed=0).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def divergence(model: Nemotron, other: Nemotron, tokens: Int[Tensor, "b t"]) -> tuple[float, float]:
    """Mean KL divergence of the next tokens in nats, and the share of equal first choices."""
    one, two = (m(tokens).logits.log_softmax(-1) for m in (model, other))
    kl = (one.exp() * (one - two)).sum(-1).mean()
    return float(kl), float((one.argmax(-1) == two.argmax(-1)).double().mean())


def spellings() -> dict[str, str]:
    """`time_step_limit` without an upper limit, in three files: the same value in each."""
    return {
        "json.dumps": '{"time_step_limit": [0.0, Infinity]}',
        "transformers 5": '{"time_step_limit": [0.0, {"__float__": "Infinity"}]}',
        "Ultra's file": '{"time_step_limit": [0, 1e308]}',
    }


def limit_read(text: str) -> tuple[float, float]:
    """The limits of dt that the package reads from such a file."""
    keys = hf_config.to_hf(TINY) | json.loads(text)
    return hf_config.from_hf(keys).time_step_limit


def is_strict_json(text: str) -> bool:
    """Whether a parser that follows the standard reads it; JSON has no infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def shown_first_token(giant: Giant, work: Work) -> None:
    """A table of the first token; only the HTML has what differs between machines."""
    parameters = ledger.parameters(giant.config).backbone
    rows = [
        ["parameters of the model", f"{parameters:,}"],
        ["their bytes in BF16", f"{2 * parameters / 1e9:.0f} GB"],
        ["weights in memory now", f"{giant.gib_in_memory:.2f} GiB"],
        ["token read, token written", f"{giant.tokens[-2]} → {giant.tokens[-1]}"],
    ]
    table = output.html_table(["", ""], rows, title="All layers, one token")
    output.show_output("One token went through all layers; its logits are finite.", table)


def shown_parts(
    parts: Mapping[str, Work], seconds: Mapping[str, float], speed: Sequence[float], vector: float
) -> None:
    """One layer of each kind: its work, the time that was measured, and the estimate.

    Args:
        parts: a layer of each kind, and the head.
        seconds: the estimates.
        speed: from `rates`.
        vector: from `vector_rate`.
    """
    rows = [
        [
            NAMES[kind], f"{work.made / 1e6:.0f}", f"{work.read / 1e6:.0f}",
            f"{work.flops / 1e9:.2f}", f"{1000 * work.seconds:.0f}", f"{1000 * seconds[kind]:.0f}",
        ]
        for kind, work in parts.items()
    ]  # fmt: skip
    head = ["one", "made, MB", "read, MB", "GFLOP", "measured, ms", "estimated, ms"]
    made, read, flops = speed
    machine = [
        ["made: scaled copies of a table of 8 MB", f"{made / 1e9:.1f} GB"],
        ["read: multiplied by one row, as experts are", f"{read / 1e9:.1f} GB"],
        ["the same by the call of M, * and head (not in the estimate)", f"{vector / 1e9:.1f} GB"],
        ["computed: a product with 64 rows", f"{flops / 1e9:.0f} GFLOP"],
    ]
    title = "Rates: the best of three with one matrix"
    rates = output.html_table(["this machine", "in a second"], machine, title=title)
    plain = f"measured and estimated: {', '.join(NAMES[kind] for kind in parts)}"
    output.show_output(plain, rates + output.html_table(head, rows, title="One token, one layer"))


def shown_seconds(seconds: Mapping[str, float], title: str) -> None:
    """Times of one token by name."""
    rows = [[output.inline_html(name), _time(value)] for name, value in seconds.items()]
    output.show_output(
        f"{title}: {', '.join(seconds)}", output.html_table(["", ""], rows, title=title)
    )


def shown_numbers(found: Mapping[str, float], title: str) -> None:
    """Measured numbers by name."""
    rows = [[output.inline_html(name), f"{value:.3g}"] for name, value in found.items()]
    output.show_output(
        f"{title}: {', '.join(found)}", output.html_table(["", ""], rows, title=title)
    )


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def shown_calls(found: Mapping[str, Mapping[str, int]], pattern: str) -> None:
    """Operations of one token by model and kind of layer."""
    rows = [
        [output.inline_html(name), *(f"{count:,}" for count in counts.values())]
        for name, counts in found.items()
    ]
    kinds = next(iter(found.values()))
    head = [f"{pattern.count(kind)} {kind}" if kind in pattern else kind for kind in kinds]
    table = output.html_table(["", *head], rows, title="Calls of one token, without views")
    output.show_output(f"calls of one token: {', '.join(found)}", table)


def show_text(title: str, text: str) -> None:
    """Show what a model wrote. It may differ between machines; the compared text is the title."""
    output.show_output(title, f"<b>{escape(title)}</b><pre>{escape(text)}</pre>")


def shown_clamp(share: float, kl: float, same: float) -> None:
    """What a lower limit of dt changes in our model."""
    rows = [
        [f"dt below {DT_CLAMP}", f"{100 * share:.1f} %"],
        ["KL divergence (0 if both models predict the same)", f"{kl:.1e} nats"],
        ["the same first choice", f"{100 * same:.1f} %"],
    ]
    table = output.html_table(["", ""], rows, title="The limit in our trained model")
    output.show_output("the limit in our model: share of dt, KL, first choice", table)


@dataclass(frozen=True)
class Recorded:
    """The record of a GPU: the first layers of Super, one row.

    Attributes:
        pattern: of these layers.
        seconds: of a token after 512 others.
        rates: (made, read, flops) per second; nothing is made.
    """

    pattern: str
    seconds: float
    rates: tuple[float, float, float]


def h200() -> Recorded:
    """What `gpu_model_nvidia_h200.json` holds of Super."""
    found = record("gpu_model_nvidia_h200")
    part = found["slices"]["super"]
    run = next(
        m for m in part["measurements"]
        if (m["what"], m.get("batch"), m.get("context")) == ("decode", 1, 512)
    )  # fmt: skip
    limits = found["ceilings"]
    speed = (math.inf, limits["bytes_per_s"], limits["flops_per_s"])
    return Recorded(part["pattern"], 1 / run["tokens_per_second"]["ours"], speed)


def dt_clamp_elsewhere() -> None:
    """What others measured, from facts.toml."""
    tell("""
On Nano the authors of [a fix](https://github.com/huggingface/transformers/pull/48989) measured a
mean KL divergence to the reference of {hf.dt_clamp_kl} with the limit, and {hf.no_clamp_kl}
without.""")
