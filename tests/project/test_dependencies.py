"""One list of dependencies: pyproject.toml says what, everything else only repeats it.

`environment.yml` may name conda packages for Python itself and for tools that pip does not own;
`constraints.txt` may only pin what pyproject asks for, inside its ranges.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
ENVIRONMENT = (ROOT / "environment.yml").read_text()

PIP_PART = ["-c constraints.txt", "-e .[lab,dev]"]
# Import names that differ from the name of the package that brings them.
PACKAGE_OF = {"yaml": "pyyaml", "xdist": "pytest-xdist", "PIL": "pillow"}
# What comes with a package that is declared: JupyterLab is nothing without these two.
BROUGHT_BY = {"IPython": "jupyterlab", "traitlets": "jupyterlab"}
# Packages that may import more than the core: what a chapter uses comes with `lab`, and the tools
# that publish, check and grade chapters come with `dev`. `export` is an extra of its own.
EXTRAS_OF = {
    "course": {"lab"}, "authoring": {"lab", "dev"}, "coursework": {"lab", "dev"},
    "export": {"export"},
}  # fmt: skip


def declared(pyproject: str) -> dict[str, Requirement]:
    """Every requirement, core and extras, by name."""
    project = tomllib.loads(pyproject)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {r.name: r for group in groups for r in map(Requirement, group)}


def core(pyproject: str) -> set[str]:
    """Names of what is installed without any extra."""
    return {Requirement(r).name for r in tomllib.loads(pyproject)["project"]["dependencies"]}


def allowed_in(path: str, pyproject: str) -> set[str]:
    """What a file of the package may import, by its path inside the package."""
    extras = EXTRAS_OF.get(path.partition("/")[0], set())
    groups = tomllib.loads(pyproject)["project"]["optional-dependencies"]
    listed = {Requirement(r).name for extra in extras for r in groups[extra]}
    return core(pyproject) | listed


def constraint_faults(constraints: str, pyproject: str) -> list[str]:
    """Pins that pyproject does not ask for, that miss its range, or that are missing."""
    asked = declared(pyproject)
    pins: dict[str, str] = {}
    faults = []
    for line in constraints.splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        pin = Requirement(line)
        (spec,) = pin.specifier
        pins[pin.name] = spec.version
        if spec.operator != "==":
            faults.append(f"{line}: a constraint is an exact pin, with ==")
        elif pin.name not in asked:
            faults.append(f"{pin.name} is pinned but pyproject does not ask for it")
        elif not asked[pin.name].specifier.contains(spec.version):
            faults.append(f"{line} is outside {asked[pin.name].specifier} of pyproject")
        elif str(pin.marker or "") != str(asked[pin.name].marker or ""):
            faults.append(f"{line}: pyproject says `{asked[pin.name].marker}`")
    return faults + [f"{name} is not pinned" for name in sorted(set(asked) - set(pins))]


def environment_faults(environment: str, pyproject: str) -> list[str]:
    """Ways in which conda's file says something that pyproject does not."""
    content: dict[str, Any] = yaml.safe_load(environment)
    faults = []
    pip_parts = [d["pip"] for d in content["dependencies"] if isinstance(d, dict)]
    if pip_parts != [PIP_PART]:
        faults.append(f"the pip part is {pip_parts}; it delegates with {PIP_PART}")
    for spec in (d for d in content["dependencies"] if isinstance(d, str)):
        name, _, version = spec.partition("=")
        if name in declared(pyproject):
            faults.append(f"{spec}: pip installs {name}, from pyproject")
        if name == "python":
            wanted = SpecifierSet(tomllib.loads(pyproject)["project"]["requires-python"])
            if not wanted.contains(Version(version)):
                faults.append(f"{spec} is not {wanted}")
    return faults


def undeclared_imports(source: str, allowed: set[str]) -> list[str]:
    """Third-party packages that `source` imports anywhere and `allowed` does not hold."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    own = {"nemotron_lite", "nemotron_kernels", "benchmarks", "tests"}
    outside = names - set(sys.stdlib_module_names) - own
    package_of = PACKAGE_OF | BROUGHT_BY
    return sorted(n for n in outside if package_of.get(n, n) not in allowed)


def without_a_reason(pyproject: str) -> list[str]:
    """Requirements whose line does not say what they are for."""
    listed = re.findall(r'^    "([\w-]+[^"]*)",(.*)$', pyproject.partition("[tool.")[0], re.M)
    names = set(declared(pyproject))
    found = {Requirement(r).name: c for r, c in listed if re.match(r"[\w-]+", r)[0] in names}
    assert set(found) == names, "one requirement a line, because each line ends with its reason"
    return sorted(name for name, comment in found.items() if not re.search(r"# \w{2}", comment))


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    assert constraint_faults(CONSTRAINTS, PYPROJECT) == []


def test_environment_delegates_to_pyproject() -> None:
    assert environment_faults(ENVIRONMENT, PYPROJECT) == []


def test_every_dependency_has_a_reason() -> None:
    assert without_a_reason(PYPROJECT) == []


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "nemotron_lite").rglob("*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_each_file_imports_only_what_it_may(path: Path) -> None:
    allowed = allowed_in(str(path.relative_to(ROOT / "nemotron_lite")), PYPROJECT)
    assert undeclared_imports(path.read_text(), allowed) == []


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_and_benchmarks_import_only_declared_dependencies(folder: str) -> None:
    """Except the peers of the kernel benchmarks: they are measured where they are installed.

    benchmarks/kernels/peers.py says how to install them, and leaves them out where they are not.
    """
    peers = {"fla", "mamba_ssm", "torchao"} if folder == "benchmarks" else set()
    allowed = set(declared(PYPROJECT)) | peers
    missing = {
        name
        for p in (ROOT / folder).rglob("*.py")
        for name in undeclared_imports(p.read_text(), allowed)
    }
    assert missing == set()


def test_the_makefile_installs_from_the_same_two_files() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "PIP_CONSTRAINT := constraints.txt" in makefile
    assert "install --quiet -e '.[lab,dev]'" in makefile


# A small project of three files, and what each checker says when one of them goes wrong.
SMALL = """
[project]
requires-python = ">=3.11"
dependencies = [
    "numpy>=2.0",  # arrays
    "triton>=3.6; sys_platform == 'linux'",  # kernels
]
[project.optional-dependencies]
dev = [
    "pytest>=8",  # tests
]
[tool.x]
"""
PINS = 'numpy==2.4.6\ntriton==3.7.1; sys_platform == "linux"\npytest==9.2.0'
CONDA = """
dependencies: [python=3.11, pip, make, pip: [-c constraints.txt, "-e .[lab,dev]"]]
"""


def test_the_small_project_is_in_order() -> None:
    assert constraint_faults(PINS, SMALL) == []
    assert environment_faults(CONDA, SMALL) == []
    assert without_a_reason(SMALL) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("numpy==2.4.6", "numpy==1.26.4", "outside >=2.0"),
        ("numpy==2.4.6", "numpy>=2.4", "exact pin"),
        ("pytest==9.2.0", "", "pytest is not pinned"),
        ("pytest==9.2.0", "pytest==9.2.0\nscipy==1.16.0", "does not ask for it"),
        ('; sys_platform == "linux"', "", "pyproject says"),
    ],
)
def test_a_wrong_constraint_is_found(old: str, new: str, fault: str) -> None:
    faults = constraint_faults(PINS.replace(old, new), SMALL)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("python=3.11", "python=3.10", "is not >=3.11"),
        ("make,", "make, numpy=2.4,", "pip installs numpy"),
        ("-c constraints.txt, ", "", "it delegates with"),
    ],
)
def test_a_drifting_environment_is_found(old: str, new: str, fault: str) -> None:
    faults = environment_faults(CONDA.replace(old, new), SMALL)
    assert len(faults) == 1
    assert fault in faults[0]


def test_an_undeclared_import_and_a_missing_reason_are_found() -> None:
    assert undeclared_imports("import torch, scipy.linalg, os", {"torch"}) == ["scipy"]
    assert undeclared_imports("def f():\n    from yaml import load", {"pyyaml"}) == []
    assert without_a_reason(SMALL.replace("# arrays", "")) == ["numpy"]


def test_only_the_course_may_use_the_lab_and_only_its_tools_more() -> None:
    assert "plotly" not in allowed_in("ops/ssd.py", PYPROJECT)
    assert "plotly" in allowed_in("course/plotting/theme.py", PYPROJECT)
    assert "nbclient" not in allowed_in("course/exercises.py", PYPROJECT)
    assert {"nbclient", "plotly", "torch"} <= allowed_in("authoring/publish.py", PYPROJECT)
    assert undeclared_imports("import IPython", allowed_in("course/x.py", PYPROJECT)) == []
    assert undeclared_imports("import IPython", allowed_in("ops/x.py", PYPROJECT)) == ["IPython"]
