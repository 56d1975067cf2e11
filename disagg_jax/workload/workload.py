"""Workloads: requests for the simulator and the engine alike, from one source."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.workload.lengths import FixedLengths, Lengths, parse_lengths
from disagg_jax.workload.requests import (
    LENGTHS_ONLY,
    POISSON,
    Arrivals,
    TokenOptions,
    build_requests,
    spawn_streams,
)
from disagg_jax.workload.traces import TooLong, Trace, TraceRow, fit_rows
from disagg_jax.workload.traces.stretches import first_of, stretch, why_shared


class Workload(Protocol):
    """A source of requests with common random numbers.

    Equal seeds give equal requests, whichever system or runner asks for them.
    """

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """Return `n` requests at `rate_rps`; another rate stretches the same gaps."""
        ...

    def prompts_only(self) -> Workload:
        """Return the same workload with one output token per request."""
        ...

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """Say why runs of `n` requests are no independent samples; '' if they are."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWorkload:
    """A `Workload` of random lengths; a longer run begins with the shorter one."""

    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = POISSON
    max_total_tokens: int | None = None  # longer requests lose output, then prompt
    extra_tokens: int = 0  # generated beyond the output length
    tokens: TokenOptions = LENGTHS_ONLY

    @classmethod
    def parse(cls, prompt: str, output: str, **fields: Any) -> RandomWorkload:
        """Return one whose lengths are texts that `parse_lengths` reads.

        Args:
          fields: other fields.
        """
        return cls(prompt=parse_lengths(prompt), output=parse_lengths(output), **fields)

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """Draw `n` requests at `rate_rps`.

        Raises:
          ValueError: if `n` < 1, `rate_rps` is not > 0, or `seed` < 0.
        """
        streams = spawn_streams(seed)
        arrivals_s = self.arrivals.times_s(n, rate_rps, streams.arrivals)
        prompts = self.prompt.sample(n, streams.prompt_lengths)
        outputs = self.output.sample(n, streams.output_lengths)
        if self.max_total_tokens is not None:
            prompts = np.minimum(prompts, self.max_total_tokens - 1)
            outputs = np.minimum(outputs, self.max_total_tokens - prompts)
        return build_requests(
            arrivals_s=arrivals_s.tolist(),
            prompt_tokens=prompts.tolist(),
            output_tokens=(outputs + self.extra_tokens).tolist(),
            streams=streams,
            tokens=self.tokens,
        )

    def prompts_only(self) -> RandomWorkload:
        """Return the same workload with one output token per request."""
        return dataclasses.replace(self, output=FixedLengths(tokens=1), extra_tokens=0)

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """Return '': each seed has draws of its own."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsWorkload:
    """A `Workload` that goes through given prompts, again and again.

    Each seed begins at another prompt. Arrivals are those of a `RandomWorkload`.

    Raises:
      ValueError: if there is no prompt.
    """

    prompts: tuple[tuple[int, ...], ...]  # token ids
    output: Lengths
    arrivals: Arrivals = POISSON
    tokens: TokenOptions = LENGTHS_ONLY

    def __post_init__(self) -> None:
        count = len(self.prompts)
        require(count > 0, "prompts: expected at least one", count)

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """Return `n` requests at `rate_rps`.

        Raises:
          ValueError: as `RandomWorkload.requests`, or on an empty prompt.
        """
        streams, count = spawn_streams(seed), len(self.prompts)
        start = first_of(seed, n, count)
        chosen = [self.prompts[(start + i) % count] for i in range(n)]
        # A prompt that comes again has the output length that it had before.
        outputs = self.output.sample(count, streams.output_lengths).tolist()
        return build_requests(
            arrivals_s=self.arrivals.times_s(n, rate_rps, streams.arrivals).tolist(),
            prompt_tokens=[len(prompt) for prompt in chosen],
            output_tokens=[outputs[i % count] for i in range(n)],
            prompts=chosen,
            streams=streams,
            tokens=self.tokens,
        )

    def prompts_only(self) -> PromptsWorkload:
        """Return the same workload with one output token per request."""
        return dataclasses.replace(self, output=FixedLengths(tokens=1))

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """Say how runs share prompts."""
        return why_shared(seeds, n, len(self.prompts), "prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceWorkload:
    """A `Workload` with the lengths and gaps of a trace.

    Each seed has a stretch of its own, as long as the trace has rows for it. After
    that the trace begins again, and seeds share rows.

    Raises:
      ValueError: unless there are two rows or more, in time order, all of them with
        tokens, and not all at one time.
    """

    # As `load_trace` returns them: rows of one tick of a coarse clock are spread over
    # it, or kept at one time.
    rows: tuple[TraceRow, ...]
    arrivals: Arrivals = POISSON  # of rows without times
    tokens: TokenOptions = LENGTHS_ONLY
    # How the rows were read and which were left out, for a run's records.
    facts: Mapping[str, Any] = dataclasses.field(
        default_factory=dict[str, Any], compare=False
    )

    def __post_init__(self) -> None:
        require(len(self.rows) >= 2, "trace: expected two rows or more", len(self.rows))
        fewest = min(min(row.prompt_tokens, row.output_tokens) for row in self.rows)
        require(fewest >= 1, "trace: expected rows with tokens only", fewest)
        times = [row.arrival_s for row in self.rows]  # nan in a trace without times
        unordered = any(b < a for a, b in itertools.pairwise(times))
        require(not unordered, "trace: expected rows in time order", "another")
        span_s = times[-1] - times[0]
        require(span_s != 0, "trace: expected a span > 0 s", span_s)

    @classmethod
    def fitting(
        cls,
        trace: Trace,
        max_total_tokens: int,
        *,
        too_long: TooLong = "drop",
        scale: float = 1.0,
        limit_name: str = "",
        arrivals: Arrivals = POISSON,
        tokens: TokenOptions = LENGTHS_ONLY,
    ) -> TraceWorkload:
        """Return a workload of the rows that can be served; see `fit_rows`.

        Args:
          scale: factor on all lengths before they are compared with the maximum. A
            prompt or an output that has tokens keeps at least one.
          limit_name: where a user sets the maximum, for the notes.

        Raises:
          ValueError: if fewer than two rows are left.
        """
        scaled_rows = (_scaled(row, scale) for row in trace.rows)
        fitted = fit_rows(scaled_rows, max_total_tokens, too_long)
        named = f" ({limit_name})" if limit_name else ""
        notes = [str(trace), *fitted.notes(f"{max_total_tokens} tokens{named}")]
        if scale != 1:
            notes.insert(1, f"lengths x {scale:g}")
        facts = {
            **trace.facts,
            "scale": scale,
            "left_out_empty": fitted.left_out_empty,
            "left_out_long": fitted.left_out_long,
            "cut": fitted.cut,
            "said": notes,
        }
        rows = tuple(fitted.rows)
        return cls(rows=rows, arrivals=arrivals, tokens=tokens, facts=facts)

    @property
    def rate_rps(self) -> float | None:
        """Return the mean rate of the rows by their own times; None without times."""
        span_s = self.rows[-1].arrival_s - self.rows[0].arrival_s
        return None if math.isnan(span_s) else (len(self.rows) - 1) / span_s

    @property
    def notes(self) -> Sequence[str]:
        """Where the rows come from and what was done to them, beside results."""
        return self.facts.get("said", ())

    def requests(self, n: int, rate_rps: float, seed: int) -> list[Request]:
        """Return `n` requests whose mean rate is `rate_rps`; the first arrives at 0."""
        chosen = stretch(self.rows, n, seed)
        # One request has no rate, and neither have several at one time.
        alone = chosen[-1].arrival_s == chosen[0].arrival_s
        rate = None if alone else rate_rps
        return requests_of_rows(chosen, rate, seed, self.arrivals, self.tokens)

    def prompts_only(self) -> TraceWorkload:
        """Return the same workload with one output token per request."""
        rows = tuple(row._replace(output_tokens=1) for row in self.rows)
        return dataclasses.replace(self, rows=rows)

    def why_dependent(self, n: int, seeds: Sequence[int]) -> str:
        """Say how runs share rows of the trace."""
        return why_shared(seeds, n, len(self.rows), "rows of the trace that fit")


def requests_of_rows(
    rows: Sequence[TraceRow],
    rate_rps: float | None = None,
    seed: int = 0,
    arrivals: Arrivals = POISSON,
    tokens: TokenOptions = LENGTHS_ONLY,
) -> list[Request]:
    """Return one request per row of a trace; the first arrives at 0.

    Prefixes that a trace says are shared are not.

    Args:
      rows: at least one, in time order, each with prompt and output tokens.
      rate_rps: stretches time so that the mean rate, (n - 1) / (last - first arrival),
        is this one. None keeps the times of the rows.
      seed: of prompts and sampling, and of the arrivals of rows without times.
      arrivals: of rows without times, at `rate_rps`.

    Raises:
      ValueError: if rows without times have no rate, rows at one time have one, or an
        argument is out of its range.
    """
    streams = spawn_streams(seed)
    times_s = np.array([row.arrival_s for row in rows])
    if math.isnan(times_s[0]):
        if rate_rps is None:
            raise ValueError("rate: expected one for a trace without times, got none")
        arrivals_s = arrivals.times_s(len(rows), rate_rps, streams.arrivals)
    else:
        arrivals_s = (times_s - times_s[0]) * _time_factor(times_s, rate_rps)
    return build_requests(
        arrivals_s=arrivals_s.tolist(),
        prompt_tokens=[row.prompt_tokens for row in rows],
        output_tokens=[row.output_tokens for row in rows],
        streams=streams,
        tokens=tokens,
    )


def _time_factor(times_s: NDArray[np.float64], rate_rps: float | None) -> float:
    if rate_rps is None:
        return 1.0
    require(rate_rps > 0, "rate_rps: expected > 0 requests per second", rate_rps)
    span_s = float(times_s[-1] - times_s[0])
    require(span_s > 0, "trace: to set a rate, expected a span > 0 s", span_s)
    return (len(times_s) - 1) / span_s / rate_rps


def _scaled(row: TraceRow, scale: float) -> TraceRow:
    """Return a row with its lengths scaled; a length > 0 stays at least 1."""
    prompt, output = (max(1, round(n * scale)) if n else 0 for n in row[1:])
    return TraceRow(row.arrival_s, prompt, output)
