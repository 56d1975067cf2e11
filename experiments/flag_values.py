"""What flags hold, checked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence


def integers(name: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, got {list(texts)}") from error


def writable(path: str | None) -> pathlib.Path | None:
    if path is None:
        return None
    out = pathlib.Path(path)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: expected a file in a writable folder, got '{path}'")
    return out
