"""Arrivals x lengths -> requests, and trace readers.

The primitives (`Arrivals.times_s`, `Lengths.sample`) take a numpy Generator. The
builders take a seed and spawn one stream for each thing that is random, so that systems
compared at one seed see common random numbers: at another rate the arrivals are the
same ones scaled, and lengths and prompts are the same; a longer run begins with the
shorter one; changing one distribution leaves the draws of the others alone.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from disagg_jax.request import GREEDY, Request, Sampling


def _expect(ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{expected}, got {got!r}")


def _check_bounds(name: str, low: int, high: int) -> None:
    _expect(1 <= low <= high, f"{name}: expected 1 <= low <= high", (low, high))


# ---- arrivals ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """How requests are spread in time, whatever the rate.

    Raises:
      ValueError: on an unknown kind, or a `burstiness` that is not > 0 or that the kind
        does not use.
    """

    kind: Literal["poisson", "gamma", "fixed"] = "poisson"
    burstiness: float = 1.0  # gamma shape, as in vLLM: 1 is Poisson, < 1 burstier

    def __post_init__(self) -> None:
        kinds = ("poisson", "gamma", "fixed")
        _expect(self.kind in kinds, f"arrivals: expected one of {kinds}", self.kind)
        positive = 0 < self.burstiness < math.inf
        _expect(positive, "burstiness: expected > 0 and finite", self.burstiness)
        if self.kind != "gamma":
            only = f"burstiness: expected 1 unless gamma ({self.kind} has none)"
            _expect(self.burstiness == 1, only, self.burstiness)

    def times_s(
        self, n: int, rate_rps: float, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """`[n]` arrival times in seconds, ascending; the first comes after one gap.

        Gaps of mean 1 are divided by `rate_rps`; an infinite rate has all arrive at 0.
        vLLM's generator moreover stretches each run to last exactly n / rate, which
        hides the variation between seeds; this one does not.

        Raises:
          ValueError: if `n` < 1 or `rate_rps` is not > 0.
        """
        _expect(n >= 1, "n: expected at least one request", n)
        _expect(rate_rps > 0, "rate_rps: expected > 0 requests per second", rate_rps)
        return np.cumsum(self._unit_gaps(n, rng)) / rate_rps

    def _unit_gaps(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        if self.kind == "fixed":
            return np.ones(n)
        if self.kind == "gamma":
            return rng.standard_gamma(self.burstiness, n) / self.burstiness
        return rng.standard_exponential(n)


POISSON = Arrivals()


# ---- lengths -------------------------------------------------------------------------


class Lengths(Protocol):
    """A distribution of prompt or output lengths."""

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens, each at least 1."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedLengths:
    """Every request has the same length."""

    tokens: int  # >= 1

    def __post_init__(self) -> None:
        _expect(self.tokens >= 1, "fixed lengths: expected tokens >= 1", self.tokens)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens; draws nothing from `rng`."""
        return np.full(n, self.tokens, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UniformLengths:
    """Each length from `low` to `high` is as likely as any other."""

    low: int  # >= 1
    high: int  # >= low, included

    def __post_init__(self) -> None:
        _check_bounds("uniform lengths", self.low, self.high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens."""
        return rng.integers(self.low, self.high, size=n, endpoint=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LognormalLengths:
    """Log-normal, rounded, and clipped to [low, high] (which moves the mean)."""

    median: float  # > 0, tokens, before clipping
    sigma: float  # >= 0, standard deviation of the log of the length
    low: int = 1  # >= 1
    high: int  # >= low, included; a log-normal tail is long, so it must be chosen

    def __post_init__(self) -> None:
        name = "lognormal lengths"
        positive = 0 < self.median < math.inf
        _expect(positive, f"{name}: expected a finite median > 0", self.median)
        valid = 0 <= self.sigma < math.inf
        _expect(valid, f"{name}: expected a finite sigma >= 0", self.sigma)
        _check_bounds(name, self.low, self.high)

    @classmethod
    def from_mean(
        cls, *, mean: float, sigma: float, high: int, low: int = 1
    ) -> LognormalLengths:
        """The one whose mean before clipping is `mean` = median * exp(sigma^2 / 2)."""
        median = mean / math.exp(sigma**2 / 2)
        return cls(median=median, sigma=sigma, low=low, high=high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens."""
        lengths = self.median * np.exp(self.sigma * rng.standard_normal(n))
        return np.clip(np.rint(lengths), self.low, self.high).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HistogramLengths:
    """Lengths known by a histogram, such as a figure of a paper.

    Within a bin, uniform over [left edge, right edge), rounded down; 0 becomes 1. So
    whole edges mean what they do in `np.histogram`: left included, right not.
    """

    edges: tuple[float, ...]  # tokens, increasing, from 0 up; one more than weights
    weights: tuple[float, ...]  # >= 0, of any positive sum

    def __post_init__(self) -> None:
        name = "histogram lengths"
        got = (len(self.edges), len(self.weights))
        shaped = got[0] == got[1] + 1 >= 2
        _expect(shaped, f"{name}: expected one edge more than weights", got)
        rising = all(low < high for low, high in itertools.pairwise(self.edges))
        rising = rising and self.edges[0] >= 0 and math.isfinite(self.edges[-1])
        _expect(rising, f"{name}: expected edges that increase from >= 0", self.edges)
        valid = all(weight >= 0 for weight in self.weights)
        valid = valid and 0 < sum(self.weights) < math.inf
        expected = f"{name}: expected weights >= 0 with a positive, finite sum"
        _expect(valid, expected, self.weights)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens."""
        # One row a request, so that a longer run begins with the shorter one.
        draws = rng.random((n, 2))
        cumulative = np.cumsum(self.weights)
        shares = cumulative / cumulative[-1]  # ends with 1 exactly, above every draw
        bins = np.searchsorted(shares, draws[:, 0], side="right")
        edges = np.asarray(self.edges)
        lengths = edges[bins] + draws[:, 1] * np.diff(edges)[bins]
        return np.maximum(np.floor(lengths), 1).astype(np.int64)


# ---- requests ------------------------------------------------------------------------


class TraceRow(NamedTuple):
    """When one request comes and how much it asks for."""

    arrival_s: float  # since the first row of a trace, since the start of a run
    prompt_tokens: int
    output_tokens: int


class _Streams(NamedTuple):
    """Independent streams of one seed. Append only: the order is part of every seed."""

    arrivals: np.random.Generator
    prompt_lengths: np.random.Generator
    output_lengths: np.random.Generator
    prompts: np.random.Generator
    sampling: np.random.Generator


def _streams(seed: int) -> _Streams:
    _expect(seed >= 0, "seed: expected >= 0", seed)
    return _Streams(*np.random.default_rng(seed).spawn(len(_Streams._fields)))


def make_requests(
    *,
    n: int,
    rate_rps: float,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    seed: int,
    arrivals: Arrivals = POISSON,
    vocab_size: int | None = None,
    ignore_eos: bool = True,
    eos_token: int | None = None,
    sampling: Sampling = GREEDY,
) -> list[Request]:
    """`n` requests, ids 0 to n - 1 in order of arrival.

    Args:
      vocab_size: with it, prompts are random token ids in [0, vocab_size), 0 included;
        without it, requests have lengths only (enough for a simulation).
      sampling: of every request, but for its seed, which is drawn for each.

    Raises:
      ValueError: if `n` < 1, `rate_rps` is not > 0, `vocab_size` < 1 or `seed` < 0.
    """
    streams = _streams(seed)
    times = arrivals.times_s(n, rate_rps, streams.arrivals).tolist()
    prompt_tokens = prompt_lengths.sample(n, streams.prompt_lengths).tolist()
    output_tokens = output_lengths.sample(n, streams.output_lengths).tolist()
    rows = list(map(TraceRow, times, prompt_tokens, output_tokens))
    prompts = _random_prompts(rows, vocab_size, streams.prompts)
    return _build(rows, prompts, streams.sampling, ignore_eos, eos_token, sampling)


def requests_from_prompts(
    *,
    n: int,
    rate_rps: float,
    prompts: Sequence[Sequence[int]],
    output_tokens: Sequence[int],
    seed: int,
    arrivals: Arrivals = POISSON,
    ignore_eos: bool = True,
    eos_token: int | None = None,
    sampling: Sampling = GREEDY,
) -> list[Request]:
    """`n` requests that go through given prompts (token ids), again and again.

    The arrivals are those of `make_requests` at the same seed. `output_tokens[i]` goes
    with `prompts[i]`.

    Raises:
      ValueError: as `make_requests`, or on no prompts, an empty prompt, or another
        number of output lengths than of prompts.
    """
    _expect(len(prompts) > 0, "prompts: expected at least one", len(prompts))
    same = len(prompts) == len(output_tokens)
    expected = f"output_tokens: expected one for each of {len(prompts)} prompts"
    _expect(same, expected, len(output_tokens))
    streams = _streams(seed)
    times = arrivals.times_s(n, rate_rps, streams.arrivals).tolist()
    chosen = [tuple(prompts[i % len(prompts)]) for i in range(n)]
    outputs = [output_tokens[i % len(prompts)] for i in range(n)]
    rows = list(map(TraceRow, times, map(len, chosen), outputs))
    return _build(rows, chosen, streams.sampling, ignore_eos, eos_token, sampling)


def _random_prompts(
    rows: Sequence[TraceRow], vocab_size: int | None, rng: np.random.Generator
) -> Iterable[tuple[int, ...] | None]:
    if vocab_size is None:
        return [None] * len(rows)
    _expect(vocab_size >= 1, "vocab_size: expected >= 1", vocab_size)
    sizes = [row.prompt_tokens for row in rows]
    return [tuple(rng.integers(vocab_size, size=size).tolist()) for size in sizes]


def _build(
    rows: Sequence[TraceRow],
    prompts: Iterable[tuple[int, ...] | None],
    rng: np.random.Generator,
    ignore_eos: bool,
    eos_token: int | None,
    sampling: Sampling,
) -> list[Request]:
    seeds = rng.integers(2**31, size=len(rows)).tolist()  # Sampling's range of seeds
    return [
        Request(
            id=i,
            arrival_s=row.arrival_s,
            prompt_tokens=row.prompt_tokens,
            max_tokens=row.output_tokens,
            prompt=prompt,
            sampling=dataclasses.replace(sampling, seed=seed),
            eos_token=eos_token,
            ignore_eos=ignore_eos,
        )
        for i, (row, prompt, seed) in enumerate(zip(rows, prompts, seeds, strict=True))
    ]


# ---- requests from traces ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequests:
    """Requests made of a trace, and what was done to its rows on the way."""

    requests: list[Request]
    dropped_empty: int  # rows with no prompt or no output tokens: nothing to serve
    dropped_long: int  # rows over a maximum, where those are dropped
    clipped: int  # rows over a maximum, where those are clipped


def requests_from_trace(
    rows: Iterable[TraceRow],
    *,
    seed: int,
    n: int | None = None,
    rate_rps: float | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    too_long: Literal["drop", "clip"] = "drop",
    vocab_size: int | None = None,
    ignore_eos: bool = True,
    eos_token: int | None = None,
    sampling: Sampling = GREEDY,
) -> TraceRequests:
    """The first `n` rows that can be served, as requests; the first arrives at 0.

    Args:
      seed: for prompts and sampling; arrivals and lengths are the trace's.
      n: None takes all.
      rate_rps: stretches time so that the mean rate, (n - 1) / (last - first arrival),
        is this one. None keeps the trace's own times.
      max_prompt_tokens: the longest prompt to serve; `max_output_tokens` likewise.
      too_long: whether rows over a maximum are dropped or clipped to it.
      vocab_size: as in `make_requests`. Prefixes that a trace says are shared are not.

    Raises:
      ValueError: if fewer than `n` (or no) rows are left, all at one time though a rate
        is asked for, or an argument is out of its range.
    """
    _expect(n is None or n >= 1, "n: expected at least one request", n)
    _expect(too_long in ("drop", "clip"), "too_long: expected drop or clip", too_long)
    limits = (_limit(max_prompt_tokens), _limit(max_output_tokens))
    kept, fates = _select(rows, n, limits, too_long)
    kept = _retimed(kept, rate_rps)
    streams = _streams(seed)
    prompts = _random_prompts(kept, vocab_size, streams.prompts)
    return TraceRequests(
        requests=_build(
            kept, prompts, streams.sampling, ignore_eos, eos_token, sampling
        ),
        dropped_empty=fates["empty"],
        dropped_long=fates["long"],
        clipped=fates["clipped"],
    )


def _limit(most_tokens: int | None) -> int:
    if most_tokens is None:
        return sys.maxsize
    _expect(most_tokens >= 1, "maximum: expected >= 1 token", most_tokens)
    return most_tokens


def _select(
    rows: Iterable[TraceRow],
    n: int | None,
    limits: tuple[int, int],
    too_long: Literal["drop", "clip"],
) -> tuple[list[TraceRow], collections.Counter[str]]:
    """The rows to serve, as they are then served, and how many rows fared how."""
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
    _expect(enough, f"trace: expected {n or 'some'} rows to serve", dict(fates))
    return kept, fates


def _fate(
    row: TraceRow, limits: tuple[int, int], too_long: Literal["drop", "clip"]
) -> Literal["empty", "fits", "long", "clipped"]:
    if min(row.prompt_tokens, row.output_tokens) < 1:
        return "empty"
    if row.prompt_tokens <= limits[0] and row.output_tokens <= limits[1]:
        return "fits"
    return "long" if too_long == "drop" else "clipped"


def _retimed(rows: Sequence[TraceRow], rate_rps: float | None) -> list[TraceRow]:
    """The rows from time 0, at the mean rate asked for."""
    times = [row.arrival_s for row in rows]
    span_s = times[-1] - times[0]
    _expect(times == sorted(times), "trace: expected rows in time order", "another")
    stretch = 1.0
    if rate_rps is not None:
        _expect(rate_rps > 0, "rate_rps: expected > 0 requests per second", rate_rps)
        _expect(span_s > 0, "trace: to set a rate, expected a span > 0 s", span_s)
        stretch = (len(rows) - 1) / span_s / rate_rps
    return [
        row._replace(arrival_s=(row.arrival_s - times[0]) * stretch) for row in rows
    ]


# ---- trace files ---------------------------------------------------------------------


class _Raw(NamedTuple):
    """A row as it stands in a file: absolute time, in the file's own unit."""

    time: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: str | os.PathLike[str]) -> list[TraceRow]:
    """The rows of a trace: `.csv` in the Azure format, `.jsonl` in Mooncake's.

    Raises:
      ValueError: on another extension, or as the reader of the format does.
    """
    readers = {".csv": read_azure, ".jsonl": read_mooncake}
    extension = pathlib.Path(path).suffix
    if extension not in readers:
        raise ValueError(
            f"{path}: expected one of {sorted(readers)}, got {extension!r}"
        )
    return readers[extension](path)


AZURE_HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure(path: str | os.PathLike[str]) -> list[TraceRow]:
    """Azure LLM inference traces, 2023 and 2024 (Azure/AzurePublicDataset; Splitwise).

    `TIMESTAMP` is ISO 8601 with 7 decimals, of which the last (0.1 us) is ignored.
    Rows with 0 tokens are kept here; blank lines are skipped.

    Raises:
      ValueError: naming file and line, on another header, a field that cannot be read,
        a negative count, or a time before the row above; also on no rows.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = tuple(next(lines, ()))
        if header != AZURE_HEADER:
            raise _bad_line(path, 1, f"the header {','.join(AZURE_HEADER)}", header)
        parsed = ((lines.line_num, line, _azure(line)) for line in lines if line)
        expected = "an ISO 8601 time and two token counts >= 0"
        return _checked(path, parsed, expected, units_per_s=10**6)


def _azure(fields: Sequence[str]) -> _Raw | None:
    """The row, its time in us; None if malformed."""
    try:
        stamp, prompt, output = fields
        time = datetime.datetime.fromisoformat(stamp)
        counts = int(prompt), int(output)
    except ValueError:
        return None
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    epoch = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return _Raw((time - epoch) // datetime.timedelta(microseconds=1), *counts)


def read_mooncake(path: str | os.PathLike[str]) -> list[TraceRow]:
    """Mooncake traces (kvcache-ai/Mooncake, FAST'25): one JSON object a line.

    Read are `timestamp` (ms), `input_length` and `output_length` (tokens). `hash_ids`,
    which say what prefixes are shared, are not. Rows with 0 tokens are kept here; blank
    lines are skipped.

    Raises:
      ValueError: naming file and line, on a line that cannot be read, a negative count,
        or a time before the row above; also on no rows.
    """
    with open(path, encoding="utf-8") as file:
        parsed = (
            (number, line, _mooncake(line))
            for number, line in enumerate(file, start=1)
            if line.strip()
        )
        expected = (
            "a JSON object with numbers timestamp, input_length and output_length >= 0"
        )
        return _checked(path, parsed, expected, units_per_s=1000)


def _mooncake(line: str) -> _Raw | None:
    """The row, its time in ms; None if malformed."""
    try:
        row: object = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict):
        return None
    fields = cast("dict[str, object]", row)
    time = fields.get("timestamp")
    prompt, output = fields.get("input_length"), fields.get("output_length")
    if not isinstance(time, int | float) or not math.isfinite(time):
        return None
    if not isinstance(prompt, int) or not isinstance(output, int):
        return None
    return _Raw(time, prompt, output)


def _checked(
    path: str | os.PathLike[str],
    parsed: Iterable[tuple[int, object, _Raw | None]],
    expected: str,
    units_per_s: int,
) -> list[TraceRow]:
    """Rows from (line number, line, row); times become relative to the first."""
    rows: list[_Raw] = []
    for number, line, row in parsed:
        if row is None or min(row.prompt_tokens, row.output_tokens) < 0:
            raise _bad_line(path, number, expected, line)
        if rows and not row.time >= rows[-1].time:
            # Not sorted silently: a trace out of order is often a broken one.
            raise _bad_line(path, number, "a time not before the row above", line)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    first = rows[0].time
    return [TraceRow((time - first) / units_per_s, *counts) for time, *counts in rows]


def _bad_line(
    path: str | os.PathLike[str], number: int, expected: str, got: object
) -> ValueError:
    shown = repr(got)
    if len(shown) > 120:  # a Mooncake line can hold hundreds of hashes
        shown = shown[:120] + "..."
    return ValueError(f"{path}, line {number}: expected {expected}, got {shown}")
