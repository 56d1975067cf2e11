"""Rows -> requests, with every row that is left out or cut counted."""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from disagg_jax.errors import require
from disagg_jax.request import GREEDY, Request, Sampling
from disagg_jax.workload.requests import (
    POISSON,
    Arrivals,
    build_requests,
    random_prompts,
    spawn_streams,
)
from disagg_jax.workload.traces.clock import Ties, find_clock, spread_ties
from disagg_jax.workload.traces.rows import TraceRow, with_times
from disagg_jax.workload.traces.stretches import stretch

TooLong = Literal["drop", "clip"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FittedRows:
    """The rows of a trace that can be served, as they are then served."""

    rows: list[TraceRow]
    dropped_empty: int  # rows with no prompt or no output tokens: nothing to serve
    dropped_long: int  # rows over a maximum, where those are dropped
    clipped: int  # rows over a maximum, where those are clipped

    def said(self, limit: str) -> tuple[str, ...]:
        """What happened to the other rows, to print beside a result.

        Args:
          limit: what rows were too long for.
        """
        given = len(self.rows) + self.dropped_empty + self.dropped_long
        of = f"of {given} rows"
        parts = (
            (self.dropped_empty, f"{of} are left out: no prompt or output tokens"),
            (self.dropped_long, f"{of} are left out: over {limit}"),
            (self.clipped, f"{of} are cut to {limit}"),
        )
        return tuple(f"{number} {what}" for number, what in parts if number)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequests:
    """Requests made of a trace, and what was done to its rows on the way."""

    requests: list[Request]
    dropped_empty: int  # these three as in `FittedRows`
    dropped_long: int
    clipped: int


def fit_rows(
    rows: Iterable[TraceRow],
    *,
    n: int | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    max_total_tokens: int | None = None,
    too_long: TooLong = "drop",
) -> FittedRows:
    """The first `n` rows that can be served, None for all: as in `requests_from_trace`.

    Raises:
      ValueError: if fewer than `n` (or no) rows are left, or an argument is out of its
        range.
    """
    require(n is None or n >= 1, "n: expected at least one request", n)
    require(too_long in ("drop", "clip"), "too_long: expected drop or clip", too_long)
    if too_long == "clip":  # which of prompt and output to cut, nobody says
        no_total = "max_total_tokens: expected none where rows are clipped"
        require(max_total_tokens is None, no_total, max_total_tokens)
    maxima = (max_prompt_tokens, max_output_tokens, max_total_tokens)
    return _select(rows, n, [_limit(most) for most in maxima], too_long)


def requests_from_trace(
    rows: Iterable[TraceRow],
    *,
    seed: int,
    n: int | None = None,
    rate_rps: float | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    max_total_tokens: int | None = None,
    too_long: TooLong = "drop",
    ties: Ties = "spread",
    arrivals: Arrivals = POISSON,
    vocab_size: int | None = None,
    ignore_eos: bool = True,
    eos_token: int | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> TraceRequests:
    """The first `n` rows that can be served, as requests; the first arrives at 0.

    Args:
      seed: for prompts and sampling; arrivals and lengths are the trace's.
      n: None takes all.
      rate_rps: stretches time so that the mean rate, (n - 1) / (last - first arrival),
        is this one. None keeps the trace's own times.
      max_prompt_tokens: the longest prompt to serve; `max_output_tokens` likewise.
      max_total_tokens: of prompt and output together.
      too_long: whether rows over a maximum are dropped or clipped to it.
      ties: as in `load_trace`; rows that it has spread have none left.
      arrivals: of rows without times, at `rate_rps`.
      vocab_size: as in `make_requests`. Prefixes that a trace says are shared are not.

    Raises:
      ValueError: if fewer than `n` (or no) rows are left, all at one time though a rate
        is asked for, without times though none is, or an argument is out of its range.
    """
    fitted = fit_rows(
        untied(rows, ties),
        n=n,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        max_total_tokens=max_total_tokens,
        too_long=too_long,
    )
    streams = spawn_streams(seed)
    prompt_tokens = [row.prompt_tokens for row in fitted.rows]
    return TraceRequests(
        requests=build_requests(
            arrivals_s=_arrivals_s(fitted.rows, rate_rps, arrivals, streams.arrivals),
            prompt_tokens=prompt_tokens,
            output_tokens=[row.output_tokens for row in fitted.rows],
            prompts=random_prompts(prompt_tokens, vocab_size, streams.prompts),
            rng=streams.sampling,
            ignore_eos=ignore_eos,
            eos_token=eos_token,
            stop_tokens=stop_tokens,
            sampling=sampling,
        ),
        dropped_empty=fitted.dropped_empty,
        dropped_long=fitted.dropped_long,
        clipped=fitted.clipped,
    )


def stretch_requests(
    rows: Sequence[TraceRow], n: int, rate_rps: float, seed: int, **options: Any
) -> list[Request]:
    """Requests of the stretch of a trace that a seed has to itself; see `stretch`.

    Args:
      rows: that can be served, with their ties as they are to be.
      options: of `requests_from_trace`.
    """
    chosen = stretch(rows, n, seed)
    # One request has no rate; two at the same time have none either.
    alone = chosen[-1].arrival_s == chosen[0].arrival_s
    made = requests_from_trace(
        chosen, seed=seed, rate_rps=None if alone else rate_rps, ties="keep", **options
    )
    return made.requests


def untied(rows: Iterable[TraceRow], ties: Ties) -> list[TraceRow]:
    """The rows, those of one tick of a coarse clock spread over it unless kept.

    Raises:
      ValueError: if they are not in time order.
    """
    rows = list(rows)
    times_s = np.array([row.arrival_s for row in rows])
    if len(rows) < 2 or math.isnan(times_s[0]):
        return rows
    ordered = bool(np.all(np.diff(times_s) >= 0))
    require(ordered, "trace: expected rows in time order", "another")
    require(ties in ("spread", "keep"), "ties: expected spread or keep", ties)
    if ties == "keep":
        return rows
    tick_s = find_clock(times_s).tick_s
    return rows if tick_s is None else with_times(rows, spread_ties(times_s, tick_s))


def _limit(most_tokens: int | None) -> int:
    if most_tokens is None:
        return sys.maxsize
    require(most_tokens >= 1, "maximum: expected >= 1 token", most_tokens)
    return most_tokens


def _select(
    rows: Iterable[TraceRow], n: int | None, limits: Sequence[int], too_long: TooLong
) -> FittedRows:
    kept: list[TraceRow] = []
    fates: collections.Counter[str] = collections.Counter()
    for row in rows:
        if len(kept) == n:
            break
        fate = _fate(row, limits, too_long)
        fates[fate] += 1
        if fate in ("fits", "clipped"):
            tokens = map(min, row[1:], limits)
            kept.append(TraceRow(row.arrival_s, *tokens))
    enough = len(kept) == n if n is not None else len(kept) > 0
    require(enough, f"trace: expected {n or 'some'} rows to serve", dict(fates))
    return FittedRows(
        rows=kept,
        dropped_empty=fates["empty"],
        dropped_long=fates["long"],
        clipped=fates["clipped"],
    )


def _fate(
    row: TraceRow, limits: Sequence[int], too_long: TooLong
) -> Literal["empty", "fits", "long", "clipped"]:
    asked = (*row[1:], row.prompt_tokens + row.output_tokens)
    if min(asked) < 1:
        return "empty"
    if all(tokens <= limit for tokens, limit in zip(asked, limits, strict=True)):
        return "fits"
    return "long" if too_long == "drop" else "clipped"


def _arrivals_s(
    rows: Sequence[TraceRow],
    rate_rps: float | None,
    arrivals: Arrivals,
    rng: np.random.Generator,
) -> list[float]:
    """From time 0, at the mean rate asked for; drawn, where the rows have no times."""
    times_s = [row.arrival_s for row in rows]
    if math.isnan(times_s[0]):
        if rate_rps is None:
            raise ValueError("rate: expected one for a trace without times, got none")
        return arrivals.times_s(len(rows), rate_rps, rng).tolist()
    span_s = times_s[-1] - times_s[0]
    factor = 1.0
    if rate_rps is not None:
        require(rate_rps > 0, "rate_rps: expected > 0 requests per second", rate_rps)
        require(span_s > 0, "trace: to set a rate, expected a span > 0 s", span_s)
        factor = (len(rows) - 1) / span_s / rate_rps
    return [(time_s - times_s[0]) * factor for time_s in times_s]
