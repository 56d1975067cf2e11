"""The programs of an engine that compiles ahead, and which of them a step takes.

Such an engine lists the shapes it has programs for, and pads each step to the smallest
that holds it. What a step takes is then what its program takes, however full it is. So
a cost model of that engine has to round as the engine does; `ProgramList` says how.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from disagg_jax.errors import require
from disagg_jax.work import StepLoad

KINDS = ("prefill", "decode", "mixed")


class Program(NamedTuple):
    """One listed shape of a step."""

    kind: str  # of `KINDS`
    tokens: int  # that go through the layers, padding included
    rows: int  # that get logits
    context: int = 0  # mixed: KV blocks that chunks of prompts attend to
    decodes: int = 0  # decode, mixed: tokens that may be decodes
    blocks: int = 0  # decode, mixed: the front of the pool that these attend to

    def __str__(self) -> str:
        sizes = zip("TRCBP", self[1:], strict=True)
        return "_".join([self.kind, *(f"{name}{size}" for name, size in sizes if size)])

    def holds(self, other: Program) -> bool:
        """Whether a step that needs at least `other` can be padded to this."""
        return (
            self.tokens >= other.tokens
            and self.rows >= other.rows
            and self.context >= other.context
            and self.blocks >= other.blocks
        )


@dataclasses.dataclass(frozen=True)
class ProgramList:
    """What one instance has programs for.

    A load says how much context decodes have, but mostly not where in the pool it is.
    The lowest free blocks are used first, so the front that holds it is then taken to
    be as long as the blocks are many, their last ones half full. That is too short
    where others have blocks too, or had some before: what is decoded may lie above.

    Raises:
      ValueError: on a kind that is unknown, or a block without tokens.
    """

    programs: tuple[Program, ...]  # of each kind in the order in which they are tried
    block_tokens: int

    def __post_init__(self) -> None:
        for program in self.programs:
            require(program.kind in KINDS, f"kind: expected one of {KINDS}", program)
        size = self.block_tokens
        require(size >= 1, "block_tokens: expected >= 1", size)

    @functools.cached_property
    def of_kind(self) -> Mapping[str, tuple[Program, ...]]:
        """The programs of each kind, in order."""
        return {k: tuple(p for p in self.programs if p.kind == k) for k in KINDS}

    @functools.cached_property
    def most_decodes(self) -> int:
        """Of a decode step."""
        return max((p.decodes for p in self.of_kind["decode"]), default=0)

    @functools.cached_property
    def pool(self) -> int:
        """Blocks of the longest front there are programs for: the whole pool."""
        return max((p.blocks for p in self.programs), default=0)

    def find(self, load: StepLoad) -> Program:
        """The program that a step runs.

        Raises:
          ValueError: if it is larger than all of them.
        """
        most, mixes = self.most_decodes, self.of_kind["mixed"]
        if mixes:
            load = _with_last_tokens(load, most)
        if not load.chunks and (load.decodes <= most or not mixes):
            if load.front:
                return self._decode(load.decodes, load.front)
            return self.decode(load.decodes, load.context)
        tokens = load.prompt_tokens + load.decodes
        rows = len(load.chunks) + load.decodes
        if not mixes:
            return self._first(Program("prefill", tokens, rows))
        decodes = min(load.decodes, most)  # the others count as chunks
        each = load.context / load.decodes if load.decodes else 0.0
        ends = [start + count for start, count in load.chunks]
        ends += [math.ceil(each)] * (load.decodes - decodes)
        context = sum(-(-end // self.block_tokens) for end in ends)
        front = load.front or self.front(decodes, round(each * decodes))
        return self._first(Program("mixed", tokens, rows, context, decodes, front))

    def decode(self, decodes: int, context: int) -> Program:
        """The program of a step of decodes only; see `find`."""
        return self._decode(decodes, self.front(decodes, context))

    def _decode(self, decodes: int, front: int) -> Program:
        return self._first(Program("decode", decodes, decodes, 0, decodes, front))

    def front(self, decodes: int, context: int) -> int:
        """Blocks of the pool's front that hold `context` tokens of so many requests.

        A guess, but never more than the pool has.
        """
        blocks = math.ceil((context + decodes * self._spare) / self.block_tokens)
        return min(blocks, self.pool)

    def context(self, decodes: int, blocks: int) -> int:
        """The most context of so many requests that a front of `blocks` holds."""
        return math.floor(blocks * self.block_tokens - decodes * self._spare)

    @property
    def _spare(self) -> float:
        """Tokens that a request's last block has room for, on average."""
        return (self.block_tokens - 1) / 2

    def _first(self, needed: Program) -> Program:
        listed = self.of_kind[needed.kind]
        for program in listed:
            if program.holds(needed):
                return program
        largest = max(listed, default="none")
        raise ValueError(f"{needed.kind}: expected at most {largest}, got {needed}")


def _with_last_tokens(load: StepLoad, most: int) -> StepLoad:
    """`load` with the last token of a chunked prompt counted as a decode.

    The engine does so (`split_decodes`): it is the same computation.
    """
    chunks, decodes, context = load.chunks, load.decodes, load.context
    while chunks and chunks[-1][0] and chunks[-1][1] == 1 and decodes < most:
        chunks, context = chunks[:-1], context + chunks[-1][0] + 1
        decodes += 1
    return StepLoad(chunks, decodes, context, load.front)
