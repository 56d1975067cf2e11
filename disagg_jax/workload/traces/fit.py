"""Which rows of a trace can be served, with every row left out or cut counted."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterable
from typing import Literal

from disagg_jax.errors import require
from disagg_jax.workload.traces.rows import TraceRow

TooLong = Literal["drop", "clip"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FittedRows:
    """The rows of a trace that can be served, as they are then served."""

    rows: list[TraceRow]
    left_out_empty: int  # rows without prompt or output tokens: nothing to serve
    left_out_long: int  # rows over the maximum, with too_long="drop"
    cut: int  # rows over the maximum, with too_long="clip"

    def notes(self, limit: str) -> tuple[str, ...]:
        """Say what happened to the other rows, to print beside a result.

        Args:
          limit: the maximum in a user's words.
        """
        of = f"of {len(self.rows) + self.left_out_empty + self.left_out_long} rows"
        parts = (
            (self.left_out_empty, "are left out: no prompt or output tokens"),
            (self.left_out_long, f"are left out: over {limit}"),
            (self.cut, f"are cut to half of {limit}, prompt and output each"),
        )
        return tuple(f"{number} {of} {what}" for number, what in parts if number)


def fit_rows(
    rows: Iterable[TraceRow],
    max_total_tokens: int | None = None,
    too_long: TooLong = "drop",
) -> FittedRows:
    """Leave out the rows that cannot be served.

    Args:
      max_total_tokens: prompt and output together; None: any number.
      too_long: "drop" leaves out the rows over the maximum. "clip" cuts prompt and
        output to half of the maximum each, as no trace says which of them to cut.

    Raises:
      ValueError: if no row is left, or an argument is out of its range.
    """
    require(too_long in ("drop", "clip"), "too_long: expected drop or clip", too_long)
    clip = too_long == "clip"
    limit = sys.maxsize if max_total_tokens is None else max_total_tokens
    limit = limit // 2 if clip else limit
    require(limit >= 1, "maximum: expected >= 1 token", limit)
    kept: list[TraceRow] = []
    fates: collections.Counter[str] = collections.Counter()
    for row in rows:
        prompt, output = row.prompt_tokens, row.output_tokens
        if min(prompt, output) < 1:
            fates["empty"] += 1
            continue
        if (max(prompt, output) if clip else prompt + output) > limit:
            fates["long"] += 1
            if not clip:
                continue
            row = TraceRow(row.arrival_s, min(prompt, limit), min(output, limit))
        kept.append(row)
    require(len(kept) > 0, "trace: expected some rows to serve", dict(fates))
    return FittedRows(
        rows=kept,
        left_out_empty=fates["empty"],
        left_out_long=0 if clip else fates["long"],
        cut=fates["long"] if clip else 0,
    )
