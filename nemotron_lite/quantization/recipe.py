"""Which matrix of a model runs in which number format: precision recipes as data.

Nemotron 3 Super was trained in NVFP4 for 25T tokens, but not all of its matrices were. Table 3 of
the report:

    all matrices unless listed            NVFP4
    the last 15 % of the layers           BF16    (no later layer can correct their errors)
    latent projections                    BF16    (every expert of a layer reads through them)
    attention: q, k, v and output         BF16    (there are few, and only they see all tokens)
    Mamba out_proj                        MXFP8   (NVFP4 flushed up to 40 % of it to zero on Nano)
    embeddings, head, MTP module          BF16
    router                                FP32

Operations without a weight matrix (norms, softmax, convolution, scan, and the sums in all of them)
are computed as in BF16 training. Master weights, gradients and AdamW's moments are FP32.

A `Recipe` holds such a table, together with a `GemmRecipe`: how the five operands of the three
matrix products of an NVFP4 layer are quantized. Both are plain dataclasses. So an ablation is one
`replace` call, and a checkpoint can store the recipe of its run. The recipes themselves need no
torch, so `nemotron-lite --help` can name them at once.

`module_formats` applies a recipe to the sizes of a model, without building it. Each mixer says
which matrices it has (`Mixer.matrices`).

Source: Nemotron 3 Super report table 3; arXiv 2509.25149 section 4; Transformer Engine's
NVFP4BlockScaling; reference sheet 6.3 and 6.5. The report does not say how 15 % is rounded. It
gives one number, 16 of Ultra's 108 layers, which agrees with rounding to nearest. That makes 13 of
Super's 88. Megatron-LM's test of Super's release, which is in MXFP8, keeps 14.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nemotron_lite.config import NemotronConfig

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
OPERANDS = {  # field of GemmRecipe -> the products that read this operand
    "activation": "y",
    "weight": "y, dx",
    "gradient": "dx",
    "activation_along_tokens": "dW",
    "gradient_along_tokens": "dW",
}
INGREDIENTS = ("stochastic", "hadamard", "square", "tail")  # what `Recipe.without` can remove


@dataclass(frozen=True)
class Operand:
    """How one operand of a matrix product is quantized to NVFP4.

    Attributes:
        block: "1x16" along the dimension that the product sums over, or "16x16".
        hadamard: apply the Hadamard transform to each 16 numbers along that dimension first.
        stochastic: stochastic rounding, which is unbiased; otherwise rounding to nearest.
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

    Each operand is quantized from the unquantized tensor, with its own largest magnitude. A weight
    in 16x16 blocks is quantized once: W and W^T then have the same values, so dx is the gradient of
    the y that was computed. With 1x16 blocks the backward pass reads a different matrix than the
    forward pass.

    Raises:
        ValueError: the Hadamard transform on only one operand of dW, or on an operand of y or dx;
            stochastic rounding of the weight; a block shape that the operand cannot have.
    """

    activation: Operand = Operand()
    weight: Operand = Operand(block="16x16")
    gradient: Operand = Operand(stochastic=True)
    activation_along_tokens: Operand = Operand(hadamard=True)
    gradient_along_tokens: Operand = Operand(hadamard=True, stochastic=True)

    def __post_init__(self) -> None:
        if self.activation_along_tokens.hadamard != self.gradient_along_tokens.hadamard:
            raise ValueError(
                "the Hadamard transform is on for only one of activation_along_tokens and "
                "gradient_along_tokens. Apply the Hadamard transform to both operands of dW, or to "
                "neither."
            )
        for name in ("activation", "weight", "gradient"):
            if getattr(self, name).hadamard:
                raise ValueError(
                    f"{name} has hadamard=True; only the operands of dW may have it, because in y "
                    "and dx the transform would not cancel. Set hadamard=False."
                )
        if self.weight.stochastic:
            raise ValueError(
                "weight has stochastic=True; weights are rounded to nearest, because stochastic "
                "rounding of them costs accuracy. Set stochastic=False."
            )
        for name in ("activation", "gradient", "activation_along_tokens", "gradient_along_tokens"):
            if getattr(self, name).block != "1x16":
                raise ValueError(
                    f"{name} has block={getattr(self, name).block!r}; activations and gradients "
                    "have blocks of 1x16."
                )
        if self.weight.block not in ("1x16", "16x16"):
            raise ValueError(f"weight has block={self.weight.block!r}; expected 1x16 or 16x16.")


@dataclass(frozen=True)
class Recipe:
    """Which role of matrix runs in which of `FORMATS`.

    Attributes:
        name: for messages and records.
        default: the format of every role that `overrides` does not name.
        overrides: (role, format) pairs; roles are the keys of `ROLES`.
        tail: share of the backbone's layers, counted from the last one, that runs in BF16.
        gemm: how the operands of the NVFP4 products are quantized.

    Raises:
        ValueError: an unknown role or format, a format that is not implemented for the role, or a
            tail outside 0 to 1.
    """

    name: str
    default: str
    overrides: tuple[tuple[str, str], ...] = (("router", "fp32"),)
    tail: float = 0.0
    gemm: GemmRecipe = field(default_factory=GemmRecipe)

    def __post_init__(self) -> None:
        for role, format in (("mlp", self.default), *self.overrides):
            if role not in ROLES or format not in FORMATS:
                raise ValueError(
                    f"{role!r} in {format!r}: expected a role of {', '.join(ROLES)} and a format "
                    f"of {', '.join(FORMATS)}."
                )
        for role in ROLES:
            offered = _implemented_formats(role, self.mixed)
            if self.format_of(role) not in offered:
                raise ValueError(
                    f"{role} in {self.format_of(role)} is not implemented: expected one of "
                    f"{', '.join(offered)} with default={self.default!r}."
                )
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail={self.tail}: expected a share of the layers, 0 to 1.")

    @property
    def mixed(self) -> bool:
        """Whether unquantized matrix products run in BF16 (otherwise in FP32)."""
        return self.default != "fp32"

    def format_of(self, role: str) -> str:
        """The format of a role outside the tail."""
        return dict(self.overrides).get(role, self.default)

    def uses(self, format: str) -> bool:
        """Whether any role runs in this format."""
        return any(self.format_of(role) == format for role in ROLES)

    def tail_layers(self, layers: int) -> int:
        """How many of a model's last layers run in BF16."""
        return int(self.tail * layers + 0.5)

    def without(self, ingredient: str) -> Recipe:
        """This recipe without one of `INGREDIENTS`, for an ablation.

        Raises:
            ValueError: an unknown ingredient.
        """
        gemm, tail = self.gemm, self.tail
        if ingredient == "stochastic":
            gemm = replace(
                gemm,
                gradient=replace(gemm.gradient, stochastic=False),
                gradient_along_tokens=replace(gemm.gradient_along_tokens, stochastic=False),
            )
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


def _implemented_formats(role: str, mixed: bool) -> tuple[str, ...]:
    """The formats a role can run in, where unquantized products run in BF16 (`mixed`) or FP32."""
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
        overrides=(
            ("embedding", "bf16"),
            ("head", "bf16"),
            ("mtp", "bf16"),
            ("router", "fp32"),
            ("attention", "bf16"),
            ("latent", "bf16"),
            ("mamba.out_proj", "mxfp8"),
        ),
        tail=0.15,
    ),
}


def get_recipe(name: str | Recipe) -> Recipe:
    """The recipe of this name; a `Recipe` is returned as it is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        raise ValueError(f"precision={name!r}: expected one of {', '.join(RECIPES)}.")
    return RECIPES[name]


@dataclass(frozen=True)
class ModuleFormat:
    """The format that one module of a model runs in.

    Attributes:
        path: in the model, as in `model.get_submodule(path)`.
        role: a key of `ROLES`.
        format: one of `FORMATS`.
        parameters: count, in its matrices.
        layer: index in the pattern; None outside the backbone's layers.
        in_tail: whether the module is in BF16 because its layer is one of the last.
    """

    path: str
    role: str
    format: str
    parameters: int
    layer: int | None = None
    in_tail: bool = False


def module_formats(config: NemotronConfig, recipe: str | Recipe) -> tuple[ModuleFormat, ...]:
    """Every module with matrices of a model of these sizes, in order, and its format."""
    from nemotron_lite.layers import MIXERS  # needs torch, and the rest of this file does not

    recipe = get_recipe(recipe)
    tail_start = config.num_layers - recipe.tail_layers(config.num_layers)
    table = config.vocab_size * config.hidden_size
    found = [ModuleFormat("backbone.embeddings", "embedding", recipe.format_of("embedding"), table)]
    for i, letter in enumerate(config.pattern):
        for name, role, size in MIXERS[letter].matrices(config):
            in_tail = i >= tail_start and role != "router"
            format = "bf16" if in_tail else recipe.format_of(role)
            path = f"backbone.layers.{i}.mixer.{name}"
            found.append(ModuleFormat(path, role, format, size, i, in_tail))
    found.append(ModuleFormat("lm_head", "head", recipe.format_of("head"), table))
    if config.mtp_pattern:
        size = 2 * config.hidden_size**2
        found.append(ModuleFormat("mtp.layers.0.eh_proj", "mtp", recipe.format_of("mtp"), size))
    for i, letter in enumerate(config.mtp_pattern):
        for name, role, size in MIXERS[letter].matrices(config):
            role = "router" if role == "router" else "mtp"
            path = f"mtp.layers.{i}.mixer.{name}"
            found.append(ModuleFormat(path, role, recipe.format_of(role), size))
    return tuple(found)
