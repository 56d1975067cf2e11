"""A table of programs, compiled before serving and only looked up while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

Compiled = Callable[..., Any]


class Programs:
    """Compiled programs by key. Serving looks them up, so it cannot compile."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Compiled] = {}

    def compile(
        self, key: Hashable, build: Callable[..., Compiled], *args: object
    ) -> None:
        """Keep `build(*args)` under `key`, unless done before."""
        if key not in self._compiled:
            self._compiled[key] = build(*args)

    def __getitem__(self, key: Hashable) -> Compiled:
        """Return the program under `key`.

        Raises:
          ValueError: if none was compiled.
        """
        program = self._compiled.get(key)
        if program is None:
            raise ValueError(f"{key}: no such program was compiled before serving")
        return program
