"""The form of an error that a user can cause: what was expected, and what came."""

from __future__ import annotations


def require(ok: bool, expected: str, got: object) -> None:
    """Raise a ValueError of what was expected and what came unless `ok`."""
    if not ok:
        raise ValueError(f"{expected}, got {got!r}")
