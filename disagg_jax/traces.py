"""Trace files -> rows -> requests, with every row that is lost on the way counted."""

from __future__ import annotations

import collections
import csv
import dataclasses
import datetime
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

from disagg_jax.expect import expect
from disagg_jax.request import GREEDY, Request, Sampling
from disagg_jax.workload import build_requests, random_prompts, spawn_streams


class TraceRow(NamedTuple):
    """When one request of a trace came and how much it asked for."""

    arrival_s: float  # since the first row
    prompt_tokens: int
    output_tokens: int


# ---- files ---------------------------------------------------------------------------


class _Raw(NamedTuple):
    """A row as it stands in a file: absolute time, in the file's own unit."""

    time: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: str | os.PathLike[str]) -> list[TraceRow]:
    """The rows of a trace: `.csv` of Azure or with plain columns, Mooncake's `.jsonl`.

    Raises:
      ValueError: on another extension, or as the reader of the format does.
    """
    readers = {".csv": _read_csv, ".jsonl": read_mooncake}
    extension = pathlib.Path(path).suffix
    if extension not in readers:
        raise ValueError(
            f"{path}: expected one of {sorted(readers)}, got {extension!r}"
        )
    return readers[extension](path)


def _read_csv(path: str | os.PathLike[str]) -> list[TraceRow]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), list[str]())
    plain = header and "TIMESTAMP" not in header
    return read_columns(path) if plain else read_azure(path)


# Columns that say the same: name -> units per second, or per token.
ARRIVAL_COLUMNS = {"arrival_s": 1, "arrival_ms": 1000}
PROMPT_COLUMNS = ("prompt_tokens", "prompt_len")
OUTPUT_COLUMNS = ("output_tokens", "output_len")


def read_columns(path: str | os.PathLike[str]) -> list[TraceRow]:
    """A CSV file with columns for arrival, prompt and output; others are ignored.

    simdistserve's inputs and results are such files, and so is this project's
    `requests.csv`.

    Raises:
      ValueError: naming file and line, without one of each kind of columns, on a field
        that cannot be read, a negative count, or a time before the row above; also on
        no rows.
    """
    kinds = (tuple(ARRIVAL_COLUMNS), PROMPT_COLUMNS, OUTPUT_COLUMNS)
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = next(lines, list[str]())
        names = [next((n for n in kind if n in header), None) for kind in kinds]
        columns = [header.index(name) for name in names if name is not None]
        if len(columns) < len(kinds):
            one_each = " and ".join(f"one of {'/'.join(kind)}" for kind in kinds)
            raise _bad_line(path, 1, f"a header with {one_each}", header)
        parsed = (
            (lines.line_num, line, _plain(line, columns)) for line in lines if line
        )
        expected = "a finite arrival and two token counts >= 0"
        units = ARRIVAL_COLUMNS[names[0] or ""]
        return _checked(path, parsed, expected, units_per_s=units)


def _plain(fields: Sequence[str], columns: Sequence[int]) -> _Raw | None:
    """The row; None if malformed."""
    try:
        time, prompt, output = (fields[column] for column in columns)
        row = _Raw(float(time), int(prompt), int(output))
    except (ValueError, IndexError):
        return None
    return row if math.isfinite(row.time) else None


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


# ---- requests ------------------------------------------------------------------------


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
      too_long: whether rows over a maximum are dropped or clipped to it.
      vocab_size: as in `make_requests`. Prefixes that a trace says are shared are not.

    Raises:
      ValueError: if fewer than `n` (or no) rows are left, all at one time though a rate
        is asked for, or an argument is out of its range.
    """
    expect(n is None or n >= 1, "n: expected at least one request", n)
    expect(too_long in ("drop", "clip"), "too_long: expected drop or clip", too_long)
    limits = (_limit(max_prompt_tokens), _limit(max_output_tokens))
    kept, fates = _select(rows, n, limits, too_long)
    kept = _retimed(kept, rate_rps)
    streams = spawn_streams(seed)
    prompt_tokens = [row.prompt_tokens for row in kept]
    return TraceRequests(
        requests=build_requests(
            arrivals_s=[row.arrival_s for row in kept],
            prompt_tokens=prompt_tokens,
            output_tokens=[row.output_tokens for row in kept],
            prompts=random_prompts(prompt_tokens, vocab_size, streams.prompts),
            rng=streams.sampling,
            ignore_eos=ignore_eos,
            eos_token=eos_token,
            stop_tokens=stop_tokens,
            sampling=sampling,
        ),
        dropped_empty=fates["empty"],
        dropped_long=fates["long"],
        clipped=fates["clipped"],
    )


def _limit(most_tokens: int | None) -> int:
    if most_tokens is None:
        return sys.maxsize
    expect(most_tokens >= 1, "maximum: expected >= 1 token", most_tokens)
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
    expect(enough, f"trace: expected {n or 'some'} rows to serve", dict(fates))
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
    expect(times == sorted(times), "trace: expected rows in time order", "another")
    stretch = 1.0
    if rate_rps is not None:
        expect(rate_rps > 0, "rate_rps: expected > 0 requests per second", rate_rps)
        expect(span_s > 0, "trace: to set a rate, expected a span > 0 s", span_s)
        stretch = (len(rows) - 1) / span_s / rate_rps
    return [
        row._replace(arrival_s=(row.arrival_s - times[0]) * stretch) for row in rows
    ]
