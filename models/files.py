"""Checks of any model file: a Git LFS pointer, an empty or damaged file, no reader."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def package_needed(package: str, purpose: str) -> Iterator[None]:
    """Name the extra to install in an ImportError of `package` raised inside."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {package}: pip install 'disagg-jax[weights]'"
        ) from error


def require_content(path: pathlib.Path) -> None:
    """Raise a ValueError if `path` is empty or a pointer of Git LFS."""
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise ValueError(
            f"{path}: expected the file itself, got a Git LFS pointer to it; "
            f"`git lfs pull` in its folder gets it"
        )
    if not head:
        raise ValueError(
            f"{path}: expected a model file, got an empty one; get it again"
        )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file of any of JSON's encodings, with a BOM or not.

    Raises:
      ValueError: naming the file, if it holds no JSON object.
      FileNotFoundError: if it does not exist.
    """
    require_content(path)
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got a damaged file: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
