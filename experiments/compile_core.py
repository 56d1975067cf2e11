"""Compiles what a simulation spends its time in, to simulate faster.

    pip install -e '.[fast]'
    python -m experiments.compile_core
    python -m experiments.compile_core --remove

mypyc makes extension modules of the controller, its records and the virtual clock, from
their source as it is; it needs a C compiler. They lie beside the source and are
imported instead of it until they are removed; when the source changes, `disagg_jax`
refuses them. Results are the same. Policies, cost models and all that holds parameters
stay as they are: a new one needs no compiling.

Half a minute. `python -m experiments.simulator_speed` says how fast it is then.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
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

    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as scratch:
        # Any: setuptools puts its own class in the place of this one at run time.
        extensions: list[Any] = mypycify(
            [
                "--ignore-missing-imports",
                "--follow-imports=silent",
                f"--cache-dir={scratch}/mypy",
                *[f"disagg_jax/{module}.py" for module in MODULES],
            ],
            opt_level="3",
            target_dir=scratch,
            group_name="disagg_jax.core",
        )
        setup(
            name="core",
            packages=[],
            ext_modules=extensions,
            script_args=[
                "-q",
                "build_ext",
                "--inplace",
                f"--build-temp={scratch}",
                f"--build-lib={scratch}",
            ],
        )


def remove() -> int:
    """Removes extension modules, those for other versions of Python too: how many."""
    found = [p for p in PACKAGE.rglob("*") if p.suffix in (".so", ".pyd")]
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
