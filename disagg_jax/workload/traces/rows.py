"""What a trace says of one request, and the units of its times."""

from __future__ import annotations

from typing import Literal, NamedTuple

# "auto": the unit that the file's format says.
Unit = Literal["auto", "s", "ms", "us", "ns"]
UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class TraceRow(NamedTuple):
    """When one request of a trace arrived and how many tokens it asked for."""

    arrival_s: float  # since the first row; `math.nan` in a trace without times
    prompt_tokens: int
    output_tokens: int
