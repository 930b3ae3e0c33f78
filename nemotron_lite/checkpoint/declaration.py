"""What a config file declares about the formats of weights, and where the stored tensors disagree.

Several programs write such declarations (`modelopt_config`, `compressed_tensors`). All say: which
formats the modules have, which modules have another one, and which are not quantized. A declaration
must not contradict the stored tensors. A module that is not mentioned may be stored in any of the
declared formats.

Names of modules may end in `*` or have `*` inside, and a name stands for all modules inside it.
Models have tens of thousands of modules, and a damaged file may have as many patterns. So names
without `*` are looked up, and the number of patterns is bounded (`MOST_PATTERNS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nemotron_lite.checkpoint.errors import count_and_names, shorten
from nemotron_lite.checkpoint.modelopt import FP8, FP8_ROWS, FP8_TILES, TILE, QuantizedModule
from nemotron_lite.checkpoint.names import without_prefix

MOST_PATTERNS = 2048  # with `*` at the end; released files have a few hundred
MOST_GLOBS = 128  # with `*` elsewhere


class ByName:
    """Values by the name of a module, where names may be patterns.

    Args:
        values: by name or pattern, as they are spelled in the file.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        self.exact: dict[str, str] = {}
        prefixes: dict[str, str] = {}
        self._globs: list[tuple[str, str]] = []
        for pattern, value in values.items():
            name, _ = without_prefix(pattern)
            stem = name.removesuffix("*")
            if not any(letter in stem for letter in "*?["):
                (self.exact if stem == name else prefixes)[stem] = value
            else:
                self._globs.append((name, value))
        self._prefixes = prefixes
        self._starts = tuple(prefixes)

    @property
    def problem(self) -> str | None:
        """Too many patterns to look for; None if there are not."""
        if len(self._prefixes) > MOST_PATTERNS or len(self._globs) > MOST_GLOBS:
            return (
                f"{len(self._prefixes) + len(self._globs):,} patterns with *; expected at most "
                f"{MOST_GLOBS}, or {MOST_PATTERNS:,} if * is at the end"
            )
        return None

    def lookup(self, name: str) -> str | None:
        """The value of a module (without prefix): of its name, a module around it, or a pattern."""
        around = name
        while around:
            if around in self.exact:
                return self.exact[around]
            around = around.rpartition(".")[0]
        if self._starts and name.startswith(self._starts):
            return next(v for start, v in self._prefixes.items() if name.startswith(start))
        return next((value for glob, value in self._globs if fnmatchcase(name, glob)), None)


@dataclass(frozen=True)
class Declaration:
    """What one file declares.

    Attributes:
        source: the file, for error messages.
        algo: the format as it is spelled there, for error messages.
        formats: of modules that `layers` does not name; None for any.
        layers: the format of a module.
        excluded: modules that are not quantized.
        tile: rows and columns with one scale in FP8.
    """

    source: str
    algo: str
    formats: frozenset[str] | None
    layers: ByName
    excluded: ByName
    tile: tuple[int, int] = TILE


def contradictions(
    declaration: Declaration, modules: Iterable[QuantizedModule], float_modules: set[str]
) -> list[str]:
    """Where the stored tensors disagree with a declaration: one sentence for each kind.

    Args:
        declaration: of one file.
        modules: those that are stored quantized.
        float_modules: names of the others, without prefix.
    """
    kinds: dict[str, list[str]] = {}
    for module in modules:
        name, _ = without_prefix(module.module)
        declared = declaration.layers.lookup(name)
        formats = declaration.formats if declared is None else {declared}
        if declared is None and declaration.excluded.lookup(name) is not None:
            kinds.setdefault(f"stored as {module.algo}, declared as not quantized", []).append(
                module.module
            )
        elif formats is not None and not _agrees(module, formats):
            wanted = " or ".join(sorted(formats))
            kinds.setdefault(f"stored as {module.algo}, declared as {wanted}", []).append(
                module.module
            )
    for name in sorted(float_modules & declaration.layers.exact.keys()):
        kind = f"not quantized, declared as {declaration.layers.exact[name]}"
        kinds.setdefault(kind, []).append(name)
    return [
        f"{names[0]} is {kind}"
        if len(names) == 1
        else f"{count_and_names(names, 'module')}, are {kind}"
        for kind, names in kinds.items()
    ]


def _agrees(module: QuantizedModule, formats: Iterable[str]) -> bool:
    # A matrix of one row, or of one tile, has one scale in each of the FP8 formats.
    same = {FP8, FP8_ROWS, FP8_TILES} if module.one_scale else set()
    same = same if module.algo in same else {module.algo}
    return not same.isdisjoint(formats)


def check_declarations(
    declarations: list[Declaration],
    modules: Iterable[QuantizedModule],
    float_tensors: Iterable[str],
    *,
    complete: bool,
) -> list[str]:
    """Compare the declarations of a folder with its stored tensors.

    Args:
        declarations: the valid ones.
        modules: the quantized modules in the files.
        float_tensors: names of the tensors that are stored as floats.
        complete: False if other problems were found. Then quantized modules or declarations may be
            absent because of these problems, and their absence is not reported.

    Returns:
        The problems.
    """
    problems = []
    modules = list(modules)
    if declarations and not modules and complete:
        sources = " and ".join(each.source for each in declarations)
        problems.append(
            f"{sources}: the weights are declared as quantized ({declarations[0].algo}), but no "
            "stored weight is. Take files that belong together, or remove the declaration"
        )
    if modules and not declarations and complete:
        problems.append(
            f"{len(modules):,} modules are quantized, such as {shorten([modules[0].module])}, but "
            "neither hf_quant_config.json nor quantization_config in config.json declares it: copy "
            "the file that belongs to them"
        )
    names = {
        without_prefix(name.removesuffix(".weight"))[0]
        for name in float_tensors
        if name.endswith(".weight")
    }
    for each in declarations:
        if found := contradictions(each, modules, names):
            problems.append(f"{each.source} contradicts the stored tensors: {'; '.join(found)}")
    return problems
