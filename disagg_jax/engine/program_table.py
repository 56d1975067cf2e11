"""A table of programs, compiled before serving and only looked up while it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that a table has, or is to have."""

    name: str
    table: Programs
    key: Hashable
    build: Callable[[], Compiled]

    @property
    def is_compiled(self) -> bool:
        """Return whether the table has the program."""
        return self.key in self.table

    def compile(self) -> None:
        """Compile it, unless done before."""
        if not self.is_compiled:
            self.table.add(self.key, self.build())


class Programs:
    """Compiled programs by key. Serving looks them up, so it cannot compile."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Compiled] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._compiled

    def add(self, key: Hashable, compiled: Compiled) -> None:
        """Keep a program under `key`."""
        self._compiled[key] = compiled

    def __getitem__(self, key: Hashable) -> Compiled:
        """Return the program under `key`.

        Raises:
          ValueError: if none was compiled.
        """
        program = self._compiled.get(key)
        if program is None:
            raise ValueError(f"{key}: no such program was compiled before serving")
        return program
