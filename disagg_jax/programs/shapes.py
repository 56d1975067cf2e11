"""The shape of a step's program, and which slices of a step count as decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from disagg_jax.work import Slice, last_tokens

KINDS = ("prefill", "decode", "mixed")


class StepShape(NamedTuple):
    """One listed shape of a step: an engine compiles a program for it ahead of time.

    A prefill computes whole prompts, one after the other. A decode computes one token
    of each request. A mixed step computes decodes and, behind them, chunks of prompts.
    """

    kind: str  # one of `KINDS`
    tokens: int  # T: tokens that go through the layers, padding included
    rows: int  # R: rows that get logits
    context: int = 0  # C: KV blocks that the chunks of a mixed step attend to
    decodes: int = 0  # B: leading tokens that may be decodes
    blocks: int = 0  # P: KV blocks that decodes attend to, a block for each of them

    @classmethod
    def prefill(cls, tokens: int, rows: int) -> StepShape:
        """Return the shape of `rows` whole prompts of `tokens` tokens together."""
        return cls("prefill", tokens, rows)

    @classmethod
    def decode(cls, rows: int, blocks: int) -> StepShape:
        """Return the shape of `rows` decodes over `blocks` KV blocks together."""
        return cls("decode", rows, rows, 0, rows, blocks)

    @classmethod
    def mixed(
        cls, tokens: int, rows: int, context: int, decodes: int, blocks: int
    ) -> StepShape:
        """Return the shape of chunks of prompts beside up to `decodes` decodes."""
        return cls("mixed", tokens, rows, context, decodes, blocks)

    def __str__(self) -> str:
        """Return the shape's part of a key of a step-time table."""
        match self.kind:
            case "prefill":
                return f"prefill_T{self.tokens}_R{self.rows}"
            case "decode":
                return f"decode_B{self.rows}_P{self.blocks}"
            case _:
                return f"mixed_T{self.tokens}_C{self.context}_P{self.blocks}"


def split_decodes(
    slices: Sequence[Slice], most: int
) -> tuple[Sequence[Slice], Sequence[Slice]]:
    """Return the chunks of a step and its decodes: up to `most` of the last slices."""
    last = last_tokens([(part.start, part.count) for part in slices], most)
    first = len(slices) - last
    return slices[:first], slices[first:]
