"""Modules of this package that are compiled, and whether they are up to date.

`python -m experiments.compile_core` puts extension modules beside some of the source.
Python imports them instead of it, so an outdated one would run what no file says.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import pathlib
from typing import Any

_HERE = pathlib.Path(__file__).parent


def compiled_modules(package: pathlib.Path = _HERE) -> dict[str, pathlib.Path]:
    """The extension modules that this Python would import, by their path in `package`.

    `sim/run` is that of `sim/run.py`.
    """
    found: dict[str, pathlib.Path] = {}
    for path in sorted(package.rglob("*")):
        stem, dot, suffix = path.name.partition(".")
        if dot + suffix in importlib.machinery.EXTENSION_SUFFIXES:
            found[path.with_name(stem).relative_to(package).as_posix()] = path
    return found


def check_compiled(package: pathlib.Path = _HERE) -> None:
    """Raises ImportError if a compiled module is older than its source."""
    for name, path in compiled_modules(package).items():
        source = package / f"{name}.py"
        if source.exists() and source.stat().st_mtime > path.stat().st_mtime:
            raise ImportError(
                f"{source} was changed after it was compiled to {path.name}: compile "
                "it again with `python -m experiments.compile_core`, or have it read "
                "again with `python -m experiments.compile_core --remove`"
            )


def reduced(record: Any) -> tuple[object, tuple[type[Any], dict[str, Any]]]:
    """What pickle is to keep of a dataclass: its fields."""
    fields = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.init
    }
    return rebuild, (record.__class__, fields)


def rebuild(kind: type[Any], fields: dict[str, Any]) -> object:
    """The dataclass that was `reduced`."""
    return kind(**fields)
