"""Find an object by its name, so that users can add their own without a change here.

Nothing is registered or stored. So a name means the same in every process that can
import its module, also in the worker processes of a run.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def find_named(
    name: str,
    listed: Mapping[str, T],
    *,
    kind: str,
    what: str,
    is_one: Callable[[Any], bool],
) -> T:
    """Return the object of that name.

    Args:
      name: a key of `listed`, or else `package.module:attribute`, an object to import,
        or else an entry point of an installed package.
      kind: as errors call it, such as "system". Entry points are those of the group
        "disagg_jax.systems" then.
      what: an object of this kind in words, such as "a mapping of roles to policies".
      is_one: whether an object from outside `listed` is of this kind.

    Raises:
      ValueError: naming what is known, or what could not be imported, or what an object
        should have been.
    """
    if name in listed:
        return listed[name]
    found = _imported(name, kind) if ":" in name else _installed(name, listed, kind)
    if not is_one(found):
        raise ValueError(f"{kind}: expected {what} at '{name}', got {found!r}")
    return found


def _imported(name: str, kind: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{kind}: expected package.module:attribute that Python can import from "
            f"here, got '{name}': {error}"
        ) from error


def _installed(name: str, listed: Mapping[str, object], kind: str) -> Any:
    group = f"disagg_jax.{kind.replace(' ', '_')}s"
    points = {
        point.name: point for point in importlib.metadata.entry_points(group=group)
    }
    if name not in points:
        known = sorted({*listed, *points})
        raise ValueError(
            f"{kind}: expected one of {known} or package.module:attribute, got '{name}'"
        )
    return points[name].load()
