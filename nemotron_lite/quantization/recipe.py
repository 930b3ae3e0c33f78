"""Which matrix of a model runs in what: precision recipes as data.

Nemotron 3 Super was trained in NVFP4 for 25T tokens, but not all of it. The report's table 3:

    all matrices unless listed            NVFP4
    the last 15 % of the layers           BF16    (what they get wrong, no later layer can mend)
    latent projections                    BF16    (every expert of a layer reads through them)
    attention: q, k, v and output         BF16    (few layers, and the only global ones)
    Mamba out_proj                        MXFP8   (NVFP4 flushed up to 40 % of it to zero on Nano)
    embeddings, head, MTP module          BF16
    router                                FP32

What is no matrix product of weights (norms, softmax, convolution, scan, and the sums in all of
them) is computed as in BF16 training. Master weights, gradients and AdamW's moments are FP32.

A `Recipe` holds such a table together with the `GemmRecipe`, the treatment of the five operands of
the three products of one NVFP4 layer. Both are plain values: an ablation is `replace` away, and a
checkpoint can store what a run was made with. `placements` applies a recipe to the sizes of a
model, which needs no torch, so `nemotron-lite info` can draw the map of Super at once.

Source: Nemotron 3 Super report table 3; arXiv 2509.25149 section 4; Transformer Engine's
NVFP4BlockScaling; reference sheet 6.3 and 6.5. The report does not say how 15 % is rounded: 16 of
Ultra's 108 layers is the one number it gives, and it agrees with rounding to nearest, which makes
13 of Super's 88. Megatron-LM's test of Super's release, which is in MXFP8, keeps 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nemotron_lite.config import LAYER_KINDS, NemotronConfig

FORMATS = ("fp32", "bf16", "mxfp8", "nvfp4")
ROLES = {
    "embedding": "embedding",
    "head": "head",
    "mamba.in_proj": "Mamba in_proj",
    "mamba.out_proj": "Mamba out_proj",
    "attention": "attention q, k, v, o",
    "router": "router",
    "latent": "latent projections",
    "experts": "routed experts",
    "shared": "shared expert",
    "mlp": "MLP",
    "mtp": "MTP module",
}
OPERANDS = {  # fields of GemmRecipe, and the products that read them
    "activation": "y",
    "weight": "y, dx",
    "gradient": "dx",
    "activation_along_tokens": "dW",
    "gradient_along_tokens": "dW",
}
INGREDIENTS = ("stochastic", "hadamard", "square", "tail")


@dataclass(frozen=True)
class Operand:
    """How one input of a matrix product becomes NVFP4.

    Attributes:
        block: "1x16" along the dimension that is summed over, or "16x16".
        hadamard: turn sixteen neighbours along that dimension first.
        stochastic: round by chance, right on average; otherwise to nearest.
    """

    block: str = "1x16"
    hadamard: bool = False
    stochastic: bool = False


@dataclass(frozen=True)
class GemmRecipe:
    """The operands of y = x W^T, dx = dy W and dW = dy^T x.

    | operand                | product       | block | Hadamard | rounding   |
    |------------------------|---------------|-------|----------|------------|
    | activation             | y             | 1x16  | no       | nearest    |
    | weight                 | y and dx      | 16x16 | no       | nearest    |
    | gradient               | dx            | 1x16  | no       | stochastic |
    | activation_along_tokens| dW            | 1x16  | yes      | nearest    |
    | gradient_along_tokens  | dW            | 1x16  | yes      | stochastic |

    Every one is made from the unquantized tensor, with its own largest magnitude. A square weight
    is quantized once: W and W^T are then the same numbers, and dx is the gradient of the y that was
    computed. In 1x16 blocks the backward pass reads another matrix than the forward pass.

    Raises:
        ValueError: only one input of dW is turned, or an activation or gradient in square blocks.
    """

    activation: Operand = Operand()
    weight: Operand = Operand(block="16x16")
    gradient: Operand = Operand(stochastic=True)
    activation_along_tokens: Operand = Operand(hadamard=True)
    gradient_along_tokens: Operand = Operand(hadamard=True, stochastic=True)

    def __post_init__(self) -> None:
        if self.activation_along_tokens.hadamard != self.gradient_along_tokens.hadamard:
            raise ValueError("both inputs of dW must be turned, or none: the turns cancel only so.")
        rows = (self.activation, self.gradient, self.weight)
        if any(operand.hadamard for operand in rows):
            raise ValueError("only the inputs of dW are turned: nothing would turn y or dx back.")
        if self.weight.stochastic:
            raise ValueError("weights are rounded to nearest: dice on them cost accuracy.")
        tokens = (self.activation_along_tokens, self.gradient_along_tokens)
        if any(operand.block != "1x16" for operand in (*rows[:2], *tokens)):
            raise ValueError("activations and gradients have blocks of 1x16.")
        if self.weight.block not in ("1x16", "16x16"):
            raise ValueError(f"weight blocks of {self.weight.block!r}: expected 1x16 or 16x16.")


@dataclass(frozen=True)
class Recipe:
    """What runs in which of `FORMATS`.

    Attributes:
        name: for messages and records.
        default: the format of every matrix that `others` does not name.
        others: (role, format) pairs; roles are the keys of `ROLES`.
        tail: share of the backbone's last layers that runs in BF16.
        gemm: the operands of the NVFP4 products.

    Raises:
        ValueError: an unknown role or format, a format that the role's code does not offer, or a
            tail outside 0 to 1.
    """

    name: str
    default: str
    others: tuple[tuple[str, str], ...] = (("router", "fp32"),)
    tail: float = 0.0
    gemm: GemmRecipe = field(default_factory=GemmRecipe)

    def __post_init__(self) -> None:
        for role, form in (("mlp", self.default), *self.others):
            if role not in ROLES or form not in FORMATS:
                raise ValueError(
                    f"{role!r} in {form!r}: expected a role of {', '.join(ROLES)} and a format of "
                    f"{', '.join(FORMATS)}."
                )
        for role in ROLES:
            if self.of(role) not in _offered(role, self.mixed):
                raise ValueError(
                    f"{role} in {self.of(role)} is not built: expected one of "
                    f"{', '.join(_offered(role, self.mixed))} beside default={self.default!r}."
                )
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail={self.tail}: expected a share of the layers, 0 to 1.")

    @property
    def mixed(self) -> bool:
        """True where products that are not quantized run in BF16, False where in FP32."""
        return self.default != "fp32"

    def of(self, role: str) -> str:
        """The format of a role outside the tail."""
        return dict(self.others).get(role, self.default)

    def uses(self, form: str) -> bool:
        """Whether any matrix runs in this format."""
        return any(self.of(role) == form for role in ROLES)

    def tail_layers(self, layers: int) -> int:
        """How many of the last layers run in BF16."""
        return int(self.tail * layers + 0.5)

    def without(self, ingredient: str) -> Recipe:
        """This recipe less one of `INGREDIENTS`, as ablations need it.

        Raises:
            ValueError: an unknown ingredient.
        """
        gemm, tail = self.gemm, self.tail
        if ingredient == "stochastic":
            gemm = replace(
                gemm, gradient=replace(gemm.gradient, stochastic=False),
                gradient_along_tokens=replace(gemm.gradient_along_tokens, stochastic=False),
            )  # fmt: skip
        elif ingredient == "hadamard":
            gemm = replace(
                gemm,
                activation_along_tokens=replace(gemm.activation_along_tokens, hadamard=False),
                gradient_along_tokens=replace(gemm.gradient_along_tokens, hadamard=False),
            )
        elif ingredient == "square":
            gemm = replace(gemm, weight=Operand(block="1x16"))
        elif ingredient == "tail":
            tail = 0.0
        else:
            raise ValueError(f"{ingredient!r}: expected one of {', '.join(INGREDIENTS)}.")
        return replace(self, name=f"{self.name} without {ingredient}", gemm=gemm, tail=tail)


def _offered(role: str, mixed: bool) -> tuple[str, ...]:
    """Formats that the code can run a role in, under BF16 or FP32 for everything else."""
    if role == "router":
        return ("fp32",)
    plain = "bf16" if mixed else "fp32"
    if role in ("embedding", "head", "mtp"):
        return (plain,)
    return (plain, "nvfp4") if role == "experts" else (plain, "mxfp8", "nvfp4")


RECIPES = {
    "fp32": Recipe("fp32", "fp32"),
    "bf16": Recipe("bf16", "bf16"),
    "nvfp4": Recipe(
        "nvfp4",
        "nvfp4",
        others=(
            ("embedding", "bf16"), ("head", "bf16"), ("mtp", "bf16"), ("router", "fp32"),
            ("attention", "bf16"), ("latent", "bf16"), ("mamba.out_proj", "mxfp8"),
        ),
        tail=0.15,
    ),
}  # fmt: skip


def recipe(which: str | Recipe) -> Recipe:
    """A recipe by its name, or itself.

    Raises:
        ValueError: no such recipe.
    """
    if isinstance(which, Recipe):
        return which
    if which not in RECIPES:
        raise ValueError(f"precision={which!r}: expected one of {', '.join(RECIPES)}.")
    return RECIPES[which]


@dataclass(frozen=True)
class Placement:
    """One module and its format.

    Attributes:
        path: in the model, as in `model.get_submodule(path)`.
        role: a key of `ROLES`.
        format: one of `FORMATS`.
        parameters: numbers in its matrices.
        layer: its place in the pattern; None outside the backbone's layers.
        tail: True where the tail, not the role, decided.
    """

    path: str
    role: str
    format: str
    parameters: int
    layer: int | None = None
    tail: bool = False


def placements(config: NemotronConfig, which: str | Recipe) -> tuple[Placement, ...]:
    """Every module with matrices of a model of these sizes, in order, and what it runs in."""
    chosen = recipe(which)
    first = config.num_layers - chosen.tail_layers(config.num_layers)
    table = config.vocab_size * config.hidden_size
    found = [Placement("backbone.embeddings", "embedding", chosen.of("embedding"), table)]
    for i, letter in enumerate(config.pattern):
        for name, role, size in _matrices(config, LAYER_KINDS[letter]):
            tail = i >= first and role != "router"
            form = "bf16" if tail else chosen.of(role)
            path = f"backbone.layers.{i}.mixer.{name}"
            found.append(Placement(path, role, form, size, i, tail))
    found.append(Placement("lm_head", "head", chosen.of("head"), table))
    if config.mtp_pattern:
        joined = 2 * config.hidden_size**2
        found.append(Placement("mtp.layers.0.eh_proj", "mtp", chosen.of("mtp"), joined))
    for i, letter in enumerate(config.mtp_pattern):
        for name, role, size in _matrices(config, LAYER_KINDS[letter]):
            role = "router" if role == "router" else "mtp"
            path = f"mtp.layers.{i}.mixer.{name}"
            found.append(Placement(path, role, chosen.of(role), size))
    return tuple(found)


def _matrices(config: NemotronConfig, kind: str) -> Iterator[tuple[str, str, int]]:
    """(name, role, numbers) of the modules with matrices in one mixer."""
    d = config.hidden_size
    if kind == "mamba":
        yield "in_proj", "mamba.in_proj", d * config.mamba_in_proj_size
        yield "out_proj", "mamba.out_proj", config.mamba_inner_size * d
    elif kind == "attention":
        queries = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        for name, width in zip("qkvo", (queries, shared, shared, queries), strict=True):
            yield f"{name}_proj", "attention", d * width
    elif kind == "mlp":
        for name in ("up_proj", "down_proj"):
            yield name, "mlp", d * config.intermediate_size
    else:
        experts, hidden, width = (
            config.n_routed_experts, config.moe_intermediate_size, config.expert_size,
        )  # fmt: skip
        yield "gate", "router", experts * d
        if config.moe_latent_size is not None:
            yield "fc1_latent_proj", "latent", d * width
        yield "experts", "experts", 2 * experts * hidden * width
        if config.moe_latent_size is not None:
            yield "fc2_latent_proj", "latent", d * width
        if config.n_shared_experts:
            for name in ("up_proj", "down_proj"):
                size = d * config.moe_shared_expert_intermediate_size
                yield f"shared_experts.{name}", "shared", size
