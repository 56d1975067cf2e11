"""What a trace says of one request, and the words for its times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Of a file's times; auto: as its format says.
Unit = Literal["auto", "s", "ms", "us", "ns"]
UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class TraceRow(NamedTuple):
    """When one request of a trace came and how much it asked for."""

    arrival_s: float  # since the first row; `math.nan` in a trace without times
    prompt_tokens: int
    output_tokens: int


def with_times(
    rows: Sequence[TraceRow], times_s: NDArray[np.float64]
) -> list[TraceRow]:
    """The rows at other times."""
    moved = zip(rows, times_s.tolist(), strict=True)
    return [row._replace(arrival_s=time_s) for row, time_s in moved]
