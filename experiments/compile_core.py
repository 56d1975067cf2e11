"""Compiles what a simulation spends its time in, to simulate faster.

    pip install -e '.[fast]'
    python -m experiments.compile_core
    python -m experiments.compile_core --remove

mypyc makes extension modules of the controller, its records, the virtual clock, and the
policies and cost models that come with it; it needs a C compiler. They lie beside the
source and are imported instead of it until they are removed; when the source changes,
`disagg_jax` refuses them. Results are the same. A policy or a cost model of your own
needs no compiling, and may be a subclass of a compiled one. `as_compiled` says what is
different in the copy of the source that is compiled.

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

from experiments.cli.command import command

_REMOVE = flags.DEFINE_bool("remove", False, "Remove what was compiled.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "disagg_jax"

# What runs for every event, or for every request.
MODULES = (
    "backend",
    "cluster",
    "controller",
    "decode_batch",
    "deployment",
    "instance_index",
    "kv_blocks",
    "metrics",
    "plan_check",
    "request",
    "scheduling/decode_only",
    "scheduling/decoding",
    "scheduling/orca",
    "scheduling/prefill_chunked",
    "scheduling/prefill_first",
    "scheduling/prefill_only",
    "scheduling/routing",
    "scheduling/sarathi",
    "scheduling/sarathi_serve",
    "scheduling/simdistserve",
    "scheduling/splitfuse",
    "scheduling/view",
    "control/virtual_clock",
    "sim/cost",
    "control/fifo_link",
    "sim/fitted",
    "sim/link",
    "sim/network",
    "control/shared_link",
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
            path.write_text(as_compiled(path.read_text()))
        with contextlib.chdir(scratch):
            # Any: setuptools puts its own class in the place of this one at run time.
            extensions: list[Any] = mypycify(
                [
                    "--ignore-missing-imports",
                    "--follow-imports=silent",
                    f"--cache-dir={scratch}/mypy",
                    *[f"{PACKAGE.name}/{module}.py" for module in MODULES],
                ],
                opt_level="1",  # 3 takes twice as long and makes it no faster
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


def as_compiled(source: str) -> str:
    """`source` with its dataclasses changed, in three ways.

    Records, which are those that are not frozen, have their `__init__` written out:
    made by `dataclasses` at run time it would stay interpreted, and records take a
    quarter of a simulation's time then. What is frozen, as policies are, may have
    interpreted subclasses. And all are pickled by their fields, as worker processes
    need: the attributes of a compiled class are not where pickle looks for them.
    """
    lines = source.splitlines()
    # From the end, so that the lines before keep their numbers.
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ClassDef) and (decorator := _decorator(node)):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            options = {keyword.arg for keyword in decorator.keywords}
            end, at = fields[-1].end_lineno or 0, decorator.lineno - 1
            added = ["", *_REDUCE]
            if "frozen" in options:
                lines[end:end] = added
                lines[at:at] = _SUBCLASSES
            else:
                added += ["", *_constructor(node, fields, "kw_only" in options)]
                lines[end:end] = added
                lines[at] = lines[at].replace("slots=True", "slots=True, init=False")
    return "\n".join(lines) + "\n"


_REDUCE = (
    "    def __reduce__(self) -> tuple[object, ...]:",
    "        from disagg_jax.compiled import reduced",
    "",
    "        return reduced(self)",
)
_SUBCLASSES = (
    "from mypy_extensions import mypyc_attr",
    "@mypyc_attr(allow_interpreted_subclasses=True)",
)


def _decorator(node: ast.ClassDef) -> ast.Call | None:
    """What makes a class a dataclass."""
    for each in node.decorator_list:
        if isinstance(each, ast.Call) and ast.unparse(each.func) == _DATACLASS:
            return each
    return None


_DATACLASS = "dataclasses.dataclass"


def _constructor(
    node: ast.ClassDef, fields: Sequence[ast.AnnAssign], kw_only: bool
) -> list[str]:
    """The lines of the `__init__` that `dataclasses` would make."""
    parameters, body = ["self", *["*"] * kw_only], list[str]()
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


@command
def main() -> None:
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
