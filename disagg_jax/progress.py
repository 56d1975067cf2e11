"""What long work tells of how far it is, and asks whether it may go on."""

from __future__ import annotations

from collections.abc import Callable

# Is told a part of the work, its steps that are done, all of them, and the state.
Progress = Callable[[str, int, int, str], None]
Stop = Callable[[], bool]  # whether nothing more is to be begun


def silent(part: str, done: int, total: int, text: str) -> None:
    """Tell nobody: a `Progress`."""


def never() -> bool:
    """Go on to the end: a `Stop`."""
    return False
