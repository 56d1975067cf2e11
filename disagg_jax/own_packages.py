"""Raise an ImportError where `models` or `sharding` is another project's package.

Those are common names, and the first folder on Python's path with such a name wins: in
a project that has a `models` folder, `from models.config import ModelConfig` would end
in "No module named 'models.config'", which names neither folder.

A room that needs these packages imports this module first; so the check costs nothing
elsewhere, and a project with a `models` folder can use the other rooms. It reads the
path only (0.2 ms) and imports neither package.
"""

from __future__ import annotations

import importlib.util
import pathlib

_HOME = pathlib.Path(__file__).resolve().parents[1]


def check(name: str) -> None:
    """Raise an ImportError unless the package `name` lies beside `disagg_jax`."""
    spec = importlib.util.find_spec(name)
    found = pathlib.Path(spec.origin) if spec and spec.origin else None
    if found is None or found.resolve() != _HOME / name / "__init__.py":
        raise ImportError(
            f"disagg_jax: expected its own package '{name}' in {_HOME}, got "
            f"{found or 'none'}, which Python finds first. Rename or move that one, or "
            "start Python elsewhere: it looks first in the folder of the script, or in "
            "the current one, and then in PYTHONPATH"
        )


check("models")
check("sharding")
