"""A table of programs, compiled before serving and only looked up while it goes on."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterable, Iterator

from jax.stages import Compiled

from disagg_jax.programs import StepShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program that a table has, or is to have.

    Attributes:
      kind: prefill, decode or mixed, which are steps; draw, gather or insert.
      size: the shape of a step, the rows of a draw, the blocks of a gather or insert.
      layers: of the model, that the program computes or moves.
      name: one of its kind, size and layers; the layers are left out if they are all.
      instance: index of its instance in the deployment; a model alone is instance 0.
    """

    kind: str
    size: StepShape | int
    layers: range
    name: str
    table: Programs
    key: Hashable
    build: Callable[[], Compiled]
    instance: int = 0

    @property
    def is_compiled(self) -> bool:
        """Return whether the table has the program."""
        return self.key in self.table

    def compile(self) -> Compiled:
        """Return the program, compiled now unless it was before."""
        if not self.is_compiled:
            self.table.add(self.key, self.build())
        return self.table[self.key]


def compile_all(
    programs: Iterable[Program], progress: Callable[[str], None] = lambda text: None
) -> None:
    """Compile those programs that are not, as many at a time as the host has cores.

    Args:
      progress: told which program is next, and how many there are, in any thread.
    """
    missing = [program for program in programs if not program.is_compiled]

    def compile_next(i: int, program: Program) -> None:
        progress(f"compiling {program.name} ({i} of {len(missing)})")
        program.compile()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        # A list, since only reading the results raises what a thread raised.
        list(threads.map(compile_next, range(1, len(missing) + 1), missing))


class Programs:
    """Compiled programs by key. Serving looks them up, so it cannot compile."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Compiled] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._compiled

    def __iter__(self) -> Iterator[Compiled]:
        return iter(list(self._compiled.values()))

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


def program_name(kind: str, layers: range, of: int) -> str:
    """Return `kind`, and the `layers` unless they are all `of` the model."""
    whole = len(layers) == of
    return kind if whole else f"{kind}/layers_{layers.start}-{layers.stop - 1}"
