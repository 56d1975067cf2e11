"""Compiles what a simulation spends its time in, to simulate faster.

    pip install -e '.[fast]'
    python -m experiments.compile_core
    python -m experiments.compile_core --remove

mypyc makes extension modules of the controller, its records and the virtual clock; it
needs a C compiler. They lie beside the source and are imported instead of it until they
are removed; when the source changes, `disagg_jax` refuses them. Results are the same.
Policies, cost models and all that holds parameters stay as they are: a new one needs no
compiling. What is compiled is a copy of the source in which records have the `__init__`
that `dataclasses` makes written out: made at run time it would stay interpreted, and
records take a quarter of a compiled simulation's time then.

Half a minute. `python -m experiments.simulator_speed` says how fast it is then.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import app, flags

_REMOVE = flags.DEFINE_bool("remove", False, "Remove what was compiled.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "disagg_jax"

# What runs for every event. Whatever goes to worker processes is left out: compiled
# frozen dataclasses cannot be unpickled.
MODULES = (
    "backend",
    "cluster",
    "controller",
    "decode_batch",
    "kv_blocks",
    "sim/clock",
    "spans",
    "state",
    "work",
)


def compile_core() -> None:
    """Puts the extension modules of `MODULES` beside their source.

    Raises:
      SystemExit: if mypyc or a C compiler is missing, or cannot compile.
    """
    try:
        from mypyc.build import mypycify
    except ModuleNotFoundError:
        sys.exit("error: expected mypyc to be installed: pip install -e '.[fast]'")
    from setuptools import setup

    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / PACKAGE.name
        ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
        shutil.copytree(PACKAGE, copy, ignore=ignored)
        for module in MODULES:
            path = copy / f"{module}.py"
            path.write_text(with_constructors(path.read_text()))
        with contextlib.chdir(scratch):
            # Any: setuptools puts its own class in the place of this one at run time.
            extensions: list[Any] = mypycify(
                [
                    "--ignore-missing-imports",
                    "--follow-imports=silent",
                    f"--cache-dir={scratch}/mypy",
                    *[f"{PACKAGE.name}/{module}.py" for module in MODULES],
                ],
                opt_level="3",
                target_dir=scratch,
                group_name=f"{PACKAGE.name}.core",
            )
            setup(
                name="core",
                packages=[],
                ext_modules=extensions,
                script_args=["-q", "build_ext", "--inplace"],
            )
        for path in _extensions(copy):
            shutil.copy2(path, PACKAGE / path.relative_to(copy))


def with_constructors(source: str) -> str:
    """`source` with the `__init__` of its dataclasses written out.

    Only of those that are `slots=True` and nothing else: events, work, and records.
    """
    lines = source.splitlines()
    # From the end, so that the lines before keep their numbers.
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ClassDef) and (decorator := _of_record(node)):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            end = fields[-1].end_lineno
            lines[end:end] = ["", *_constructor(node, fields)]
            at = decorator.lineno - 1
            lines[at] = lines[at].replace("slots=True", "slots=True, init=False")
    return "\n".join(lines) + "\n"


def _of_record(node: ast.ClassDef) -> ast.expr | None:
    """The decorator of a class that makes it such a dataclass."""
    known = (
        "dataclasses.dataclass(slots=True)",
        "dataclasses.dataclass(slots=True, eq=False)",
    )
    found = [each for each in node.decorator_list if ast.unparse(each) in known]
    return found[0] if found else None


def _constructor(node: ast.ClassDef, fields: Sequence[ast.AnnAssign]) -> list[str]:
    """The lines of the `__init__` that `dataclasses` would make."""
    parameters, body = ["self"], list[str]()
    for field in fields:
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        options: dict[str, str] = {}
        if isinstance(field.value, ast.Call):  # dataclasses.field(...)
            options = {k.arg or "": ast.unparse(k.value) for k in field.value.keywords}
        if options.get("init") == "False":
            continue
        value = name
        if factory := options.get("default_factory"):
            parameters.append(f"{name}: {kind} | None = None")
            value = f"{factory}() if {name} is None else {name}"
        elif field.value is not None:
            parameters.append(f"{name}: {kind} = {ast.unparse(field.value)}")
        else:
            parameters.append(f"{name}: {kind}")
        body.append(f"        self.{name} = {value}")
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    if "__post_init__" in methods:
        body.append("        self.__post_init__()")
    return [f"    def __init__({', '.join(parameters)}) -> None:", *body]


def _extensions(package: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in package.rglob("*") if path.suffix in (".so", ".pyd")]


def remove() -> int:
    """Removes extension modules, those for other versions of Python too: how many."""
    found = _extensions(PACKAGE)
    for path in found:
        path.unlink()
    return len(found)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    if _REMOVE.value:
        print(f"{remove()} files removed from {PACKAGE}")
        return
    if not os.access(PACKAGE, os.W_OK):
        sys.exit(f"error: cannot write to {PACKAGE}")
    remove()
    compile_core()
    print(f"{len(MODULES)} modules of {PACKAGE} compiled")


if __name__ == "__main__":
    app.run(main)
