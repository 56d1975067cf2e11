"""Who may import whom, and what stands at the top: design rules as tests."""

import ast
import collections
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("disagg_jax", "models", "sharding", "experiments", "tests")
TOP_LEVEL = {*ROOMS, "setup.py", "pyproject.toml", "README.md", ".gitignore", ".ci"}


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@dataclass(frozen=True, kw_only=True)
class Rule:
    rooms: tuple[str, ...]  # modules the rule speaks about ...
    except_for: tuple[str, ...] = ()  # ... but not these
    forbidden: tuple[str, ...]  # dotted names that must not be referred to ...
    but: tuple[str, ...] = ()  # ... save these


# The rooms of the library that may import jax; all others are its core.
WITH_JAX = ("disagg_jax.engine", "disagg_jax.calibration")

# What a cost model needs to know of a model, and helpers that models need too.
MODELS_WITHOUT_JAX = (
    "models.blocks",
    "models.config",
    "models.files",
    "models.lookup",
    "models.named",
    "models.quantization",
)

# Each row may import the rows above it. Rooms of one row do not know each other.
ORDER = (
    ("disagg_jax.errors", "disagg_jax.progress", "disagg_jax.request"),
    ("disagg_jax.deployment", "disagg_jax.formats", "disagg_jax.work"),
    ("disagg_jax.workload", "disagg_jax.metrics", "disagg_jax.scheduling"),
    ("disagg_jax.control",),
    ("disagg_jax.runlog", "disagg_jax.programs"),
    ("disagg_jax.sim", "disagg_jax.engine"),
    ("disagg_jax.search", "disagg_jax.calibration"),
    ("experiments.configs", "experiments.report"),
    ("experiments.cli",),
    ("experiments.runs",),
    (
        *("experiments.papers", "experiments.sweep", "experiments.placement"),
        *("experiments.simulated", "experiments.measured"),
    ),
    ("experiments.comparison", "experiments.benchmarks"),
    ("experiments.accuracy_study", "experiments.compiled", "experiments.device"),
)

RULES = {
    "one module draws": Rule(
        rooms=("disagg_jax", "experiments"),
        except_for=("experiments.report.draw",),
        forbidden=("matplotlib",),
    ),
    "models knows no other room": Rule(
        rooms=("models",),
        forbidden=("sharding", "disagg_jax", "experiments", "tests"),
    ),
    "sharding knows no other room": Rule(
        rooms=("sharding",),
        forbidden=("models", "disagg_jax", "experiments", "tests"),
    ),
    "the core imports no jax": Rule(
        rooms=("disagg_jax",),
        except_for=WITH_JAX,
        forbidden=("jax", "jaxlib", "flax", "optax", "orbax"),
    ),
    "the core does not know what it schedules": Rule(
        rooms=("disagg_jax",),
        except_for=WITH_JAX,
        forbidden=("models", "sharding", "disagg_jax.engine"),
        but=MODELS_WITHOUT_JAX,
    ),
    "nothing below experiments knows it": Rule(
        rooms=("disagg_jax", "models", "sharding"),
        forbidden=("experiments", "tests"),
    ),
    "only experiments reads flags and environment": Rule(
        rooms=("disagg_jax", "models", "sharding"),
        forbidden=(
            "absl.app",
            "absl.flags",
            "argparse",
            "os.environ",
            "os.environb",
            "os.getenv",
            "os.getenvb",
            "sys.argv",
        ),
    ),
}


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The dotted name after `from`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join(base + ([node.module] if node.module else []))


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` for such an expression, None for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


@functools.cache
def references(
    source: str, module: str, is_package: bool
) -> tuple[tuple[int, str], ...]:
    """What `find_references` finds: each file is looked at by many tests."""
    return tuple(find_references(source, module, is_package))


def find_references(
    source: str, module: str, is_package: bool
) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) the source imports or reaches through an import.

    Imports inside functions and under TYPE_CHECKING count. So do attribute chains that
    start at an imported name (`os.environ`), and import_module("a constant").
    """
    tree = ast.parse(source, filename=module)
    bound = {}  # local name -> the dotted name it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                top = alias.name.split(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, is_package)
            for alias in node.names:
                name = base if alias.name == "*" else f"{base}.{alias.name}"
                yield node.lineno, name
                bound[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            head, _, tail = name.partition(".")
            if head in bound:
                yield node.lineno, f"{bound[head]}.{tail}"
        elif isinstance(node, ast.Call) and node.args:
            function = (dotted(node.func) or "").split(".")[-1]
            target = node.args[0]
            if function in ("import_module", "__import__") and isinstance(
                target, ast.Constant
            ):
                yield node.lineno, str(target.value)


def violations(
    rule: Rule, source: str, module: str, is_package: bool = False
) -> list[str]:
    if not within(module, rule.rooms) or within(module, rule.except_for):
        return []
    found = {
        (line, name)
        for line, name in references(source, module, is_package)
        if within(name, rule.forbidden) and not within(name, rule.but)
    }
    return [f"{module}:{line} refers to {name}" for line, name in sorted(found)]


def source_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("name", RULES)
def test_source_keeps_rule(name: str):
    rule = RULES[name]
    files = [path for path in source_files() if within(module_name(path), rule.rooms)]
    assert files, f"no source in {rule.rooms}: the rule checks nothing"
    found = []
    for path in files:
        is_package = path.name == "__init__.py"
        found += violations(rule, path.read_text(), module_name(path), is_package)
    assert not found, f"{name}:\n" + "\n".join(found)


# (rule, module the snippet stands in, snippet that breaks the rule)
BROKEN = [
    ("one module draws", "experiments.x", "from matplotlib import figure"),
    ("models knows no other room", "models.x", "import sharding.rules"),
    ("models knows no other room", "models", "from disagg_jax import request"),
    ("sharding knows no other room", "sharding.x", "from models import config"),
    ("sharding knows no other room", "sharding.x", "def f():\n    import experiments"),
    ("the core imports no jax", "disagg_jax.metrics", "import jax.numpy as jnp"),
    (
        "the core imports no jax",
        "disagg_jax.sim.cost.linear",
        "def f():\n    import jax",
    ),
    ("the core imports no jax", "disagg_jax.x", "import_module('flax.nnx')"),
    (
        "the core imports no jax",
        "disagg_jax.x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jaxlib",
    ),
    ("the core does not know what it schedules", "disagg_jax.x", "import models"),
    (
        "the core does not know what it schedules",
        "disagg_jax.x",
        "from . import engine",
    ),
    (
        "the core does not know what it schedules",
        "disagg_jax.scheduling.x",
        "from ..engine.engine import Engine",
    ),
    (
        "the core does not know what it schedules",
        "disagg_jax.x",
        "import disagg_jax\ndisagg_jax.engine.executor.run()",
    ),
    (
        "nothing below experiments knows it",
        "disagg_jax.engine.x",
        "from experiments import runs",
    ),
    (
        "nothing below experiments knows it",
        "models.x",
        "from tests.dummies import Tiny",
    ),
    (
        "only experiments reads flags and environment",
        "disagg_jax.engine.x",
        "import os as o\nhome = o.environ['HOME']",
    ),
    (
        "only experiments reads flags and environment",
        "models.x",
        "from os import getenv",
    ),
    (
        "only experiments reads flags and environment",
        "sharding.x",
        "from absl import flags",
    ),
]


@pytest.mark.parametrize(("name", "module", "source"), BROKEN)
def test_checker_sees_broken_rule(name: str, module: str, source: str):
    assert violations(RULES[name], source, module)


def test_every_rule_has_a_broken_example():
    assert {name for name, _, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "disagg_jax.engine.x",
            "import jax\nfrom models import layers\nimport sharding",
        ),
        ("disagg_jax.x", "from . import request\nfrom .scheduling import orca"),
        ("disagg_jax.x", "import os.path\nengine = os.path.join('a', 'b')"),
        ("disagg_jax.x", "jax = 1\nenviron = jax.real"),
        (
            "models.x",
            "import jax\nfrom models import config\ndef f():\n    import gguf",
        ),
        ("models.x", "import modelsharding, disagg_jaxish"),
        ("experiments.x", "import os, models, sharding\nos.environ['HOME']"),
    ],
)
def test_checker_lets_good_source_pass(module: str, source: str):
    assert not [v for rule in RULES.values() for v in violations(rule, source, module)]


def test_leading_dots_count_from_the_package():
    source = "from . import engine"
    assert (1, "disagg_jax.engine") in references(source, "disagg_jax", True)
    assert (1, "disagg_jax.sim.engine") in references(source, "disagg_jax.sim.x", False)
    assert (1, "disagg_jax.sim.engine") in references(source, "disagg_jax.sim", True)


def core_files() -> list[Path]:
    files = sorted((ROOT / "disagg_jax").rglob("*.py"))
    return [path for path in files if not within(module_name(path), WITH_JAX)]


def test_importing_the_core_loads_no_jax():
    """Also catches what no import statement shows: a library that loads jax itself."""
    modules = [module_name(path) for path in core_files()]
    assert "disagg_jax.request" in modules
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sorted({'jax', 'jaxlib', 'flax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_pyright_is_strict_on_the_whole_core():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    strict = {
        path
        for pattern in settings["strict"]
        for match in ROOT.glob(pattern)
        for path in (match.rglob("*.py") if match.is_dir() else [match])
    }
    assert strict == set(core_files())


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules of this repository that the file at `path` imports."""
    found = set[str]()
    is_package = path.name == "__init__.py"
    for _, name in references(path.read_text(), module_name(path), is_package):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module_name(path)}


def import_graph() -> dict[str, set[str]]:
    """Module -> modules it imports, without tests and notebooks."""
    paths = {
        module_name(path): path
        for path in source_files()
        if not within(module_name(path), ("tests", "experiments.notebooks"))
    }
    return {name: imported_modules(path, set(paths)) for name, path in paths.items()}


def room_of(module: str) -> str | None:
    """The room of `ORDER` that holds a module; None for commands and free rooms."""
    rooms = [room for row in ORDER for room in row]
    return next((room for room in rooms if within(module, (room,))), None)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports that `ORDER` forbids."""
    level = {room: i for i, row in enumerate(ORDER) for room in row}
    found = list[str]()
    for module, imported in graph.items():
        for other in imported:
            a, b = room_of(module), room_of(other)
            if a and b and a != b and level[a] <= level[b]:
                found.append(f"{module} imports {other}")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] if there are none."""
    done = set[str]()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := visit(other, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def test_rooms_import_only_rooms_below():
    graph = import_graph()
    rooms = {room for row in ORDER for room in row}
    assert {room_of(module) for module in graph} - {None} == rooms
    assert upward(graph) == []


def test_files_do_not_import_each_other_in_a_circle():
    assert circle(import_graph()) == []


def test_every_package_of_the_library_and_of_experiments_is_in_the_order():
    folders = [*(ROOT / "disagg_jax").iterdir(), *(ROOT / "experiments").iterdir()]
    packages = [f"{f.parent.name}.{f.name}" for f in folders if list(f.glob("*.py"))]
    free = {p for p in packages if room_of(p) is None}
    assert free == {"experiments.notebooks"}


def test_order_and_circles_are_seen():
    assert upward({"disagg_jax.control.x": {"disagg_jax.sim.y"}})
    assert upward({"disagg_jax.sim.x": {"disagg_jax.engine.y"}})
    assert not upward({"disagg_jax.sim.x": {"disagg_jax.control.y"}})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def has_main_guard(path: Path) -> bool:
    return '\nif __name__ == "__main__":\n' in path.read_text()


def test_only_commands_lie_directly_in_experiments():
    paths = sorted((ROOT / "experiments").glob("*.py"))
    commands = {path.stem for path in paths if has_main_guard(path)}
    assert commands == {path.stem for path in paths} - {"__init__"}
    in_rooms = [
        path
        for path in source_files()
        if path.parent != ROOT / "experiments"
        and not within(module_name(path), ("tests",))
        and has_main_guard(path)
    ]
    assert in_rooms == []


def git_files() -> list[str]:
    """Tracked files and new ones that git does not ignore, from the checkout's root."""
    try:
        top = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        pytest.skip(f"{ROOT} is not the root of a git checkout: {top.stderr.strip()}")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name]


def test_top_level_holds_only_the_fixed_names():
    tops = {Path(name).parts[0] for name in git_files()}
    present = {name for name in tops if (ROOT / name).exists()}
    assert present <= TOP_LEVEL, f"not of the layout: {sorted(present - TOP_LEVEL)}"


def test_a_class_has_a_name_of_its_own():
    """A reader who meets a name need not know the file to know the word."""
    found = collections.Counter(
        node.name
        for path in source_files()
        if not path.is_relative_to(ROOT / "tests")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, times in found.items() if times > 1]


@pytest.mark.jax
def test_all_experiments_can_be_imported_by_one_process():
    """None of them starts to work, or needs another to be absent."""
    code = (
        "import importlib, pkgutil, experiments\n"
        "for found in pkgutil.walk_packages(experiments.__path__, 'experiments.'):\n"
        "    importlib.import_module(found.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
