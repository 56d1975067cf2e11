"""Read a trace file: its format, its rows, its clock, and notes about them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disagg_jax.errors import require
from disagg_jax.workload.traces.clock import (
    NO_CLOCK,
    Clock,
    Ties,
    find_clock,
    spread_ties,
)
from disagg_jax.workload.traces.files import (
    Path,
    Record,
    Records,
    bad_record,
    open_records,
)
from disagg_jax.workload.traces.formats import (
    ASK,
    DATES,
    SHAREGPT,
    SHAREGPT_FILTER,
    TraceFormat,
    count,
    find_format,
    sharegpt_lengths,
    time_cells,
)
from disagg_jax.workload.traces.rows import TraceRow, Unit

# Limits for a trace whose unit is right; a gap of 1 ms may err by a rounding.
_LEAST_GAP_S, _MOST_RPS = 1e-3 * (1 - 1e-6), 1e5
_OTHER_UNIT = f"Name the unit, also to confirm it ({ASK}). "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The rows of a file, and how they were read."""

    rows: list[TraceRow]
    file: str
    format: str
    unit: str  # of its times: s, ms, dates, ...; none: it has lengths only
    clock: Clock  # of the file
    ties: Ties  # what was done to rows in one tick
    notes: tuple[str, ...] = ()  # what else a reader of results must know

    @property
    def timed(self) -> bool:
        """Whether the file says when requests arrived."""
        return self.unit != "none"

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but the rows, for a run's records."""
        return {
            "file": self.file,
            "format": self.format,
            "unit": self.unit,
            "rows": len(self.rows),
            "tick_s": self.clock.tick_s,
            "tied_rows": self.clock.tied_rows,
            "ties": self.ties,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Say how the trace was read, to print beside a result."""
        times = f"times in {self.unit}" if self.timed else "no times"
        parts = [f"{self.format} format", f"{len(self.rows)} rows", times]
        said = [f"trace {self.file}: {', '.join(parts)}", *self.notes]
        return "; ".join([*said[:1], *self._ties(), *said[1:]])

    def _ties(self) -> list[str]:
        tick_s, tied = self.clock.tick_s, self.clock.tied_rows
        if tick_s is None:
            return [f"{tied} rows at the time of the row above"] if tied else []
        done = "stay there" if self.ties == "keep" else "are spread evenly over it"
        return [
            f"its clock ticks every {tick_s:.6g} s: {tied} rows in the tick of the row "
            f"above {done} (ties={self.ties})"
        ]


def has_times(path: Path) -> bool:
    """Return whether a trace says when requests arrived; reads its first record only.

    Raises:
      ValueError: on a file of no known format, or without rows.
      OSError: if the file cannot be opened.
    """
    with open_records(path) as records:
        if SHAREGPT in records.names:
            return False
        if not records.names:
            raise _no_rows(path)
        return find_format(path, records.where, records.names).time is not None


def load_trace(
    path: Path,
    *,
    unit: Unit = "auto",
    ties: Ties = "spread",
    max_rows: int = 0,
    tokens_of: Callable[[str], int] | None = None,
) -> Trace:
    """Read a trace in any format of `formats`; rows without tokens are kept.

    Args:
      unit: of the file's times; "auto" takes what the format says.
      ties: spread rows of one tick of a coarse clock evenly over the tick, or keep
        them at one time, where they really arrived together.
      max_rows: rows to read, from the first on; 0: all. Only rows are held in memory.
      tokens_of: counts the tokens of a text, for ShareGPT.

    Raises:
      ValueError: naming file and line, on an unknown format or unit, a cell that cannot
        be read, or a time before the row above; also on no rows, and on times so close
        that the unit must be wrong.
      OSError: if the file cannot be opened.
    """
    require(ties in ("spread", "keep"), "ties: expected spread or keep", ties)
    require(max_rows >= 0, "max_rows: expected >= 0", max_rows)
    with open_records(path) as records:
        if SHAREGPT in records.names:
            _expect_no_times(unit, ties)
            return _sharegpt(path, records, max_rows, tokens_of)
        if not records.names:
            raise _no_rows(path)
        form = find_format(path, records.where, records.names)
        if form.time is None:
            _expect_no_times(unit, ties)
        return _read_lengths(path, form, records, unit, ties, max_rows)


def _no_rows(path: Path) -> ValueError:
    return ValueError(f"{path}: expected at least one row, got none")


def _taken(rows: Iterable[Record], max_rows: int) -> Iterator[Record]:
    return itertools.islice(rows, max_rows or None)


def _expect_no_times(unit: Unit, ties: Ties) -> None:
    """Raise ValueError on options that need times."""
    require(unit == "auto", "unit: expected none, as the trace has no times", unit)
    require(ties == "spread", "ties: expected none, as the trace has no times", ties)


# ---- lengths in tokens ---------------------------------------------------------------


def _read_lengths(
    path: Path,
    form: TraceFormat,
    records: Records,
    unit: Unit,
    ties: Ties,
    max_rows: int,
) -> Trace:
    rows, shown = _read_rows(path, form, records, unit, max_rows)
    times_s = np.array([row.arrival_s for row in rows])
    clock = NO_CLOCK if form.time is None else find_clock(times_s)
    if clock.tick_s is not None:
        times_s = spread_ties(times_s, clock.tick_s)
        if ties == "spread":
            moved = zip(rows, times_s.tolist(), strict=True)
            rows = [row._replace(arrival_s=time_s) for row, time_s in moved]
    if unit == "auto" and form.time is not None:
        _check_pace(path, times_s, shown, ties)
    unused = "hash_ids are not used: no request shares another's prefix"
    return Trace(
        rows=rows,
        file=str(path),
        format=form.name,
        unit=shown,
        clock=clock,
        ties=ties,
        notes=(unused,) if "hash_ids" in records.names else (),
    )


def _read_rows(
    path: Path, form: TraceFormat, records: Records, unit: Unit, max_rows: int
) -> tuple[list[TraceRow], str]:
    """Return the rows, and the unit of the file's times to show."""
    rows, cells, first = list[TraceRow](), None, 0.0
    for record in _taken(records.rows, max_rows):
        arrival_s = math.nan
        if form.time is not None:
            cell = record.cells.get(form.time)
            try:
                cells = cells or time_cells(form, unit, cell)
                time = cells.read(cell)
            except ValueError as error:
                expected = str(error)
                if cells is not None:
                    expected = f"a finite time in '{form.time}' ({cells.unit})"
                raise bad_record(path, record.where, expected, cell) from error
            first = first if rows else time
            # Subtracted before it is divided: whole numbers stay exact.
            arrival_s = (time - first) / cells.units_per_s
            if rows and not arrival_s >= rows[-1].arrival_s:
                # Not sorted silently: a trace out of order is often a broken one.
                above = "a time not before the row above"
                raise bad_record(path, record.where, above, cell)
        rows.append(TraceRow(arrival_s, *_counts(path, form, record)))
    if not rows:
        raise _no_rows(path)
    return rows, cells.unit if cells else "none"


def _counts(path: Path, form: TraceFormat, record: Record) -> tuple[int, int]:
    prompt, output = record.cells.get(form.prompt), record.cells.get(form.output)
    try:
        return count(prompt), count(output)
    except ValueError as error:
        expected = f"token counts >= 0 in '{form.prompt}' and '{form.output}'"
        raise bad_record(path, record.where, expected, (prompt, output)) from error


def _check_pace(
    path: Path, times_s: NDArray[np.float64], unit: str, ties: Ties
) -> None:
    """Raise ValueError on requests at one time, or so close that the unit is wrong."""
    if ties == "keep":
        times_s = np.unique(times_s)
    if len(times_s) < 2:
        return
    gap_s, span_s = float(np.median(np.diff(times_s))), float(times_s[-1] - times_s[0])
    rate_rps = (len(times_s) - 1) / span_s if span_s else math.inf
    if unit == DATES and gap_s > 0:
        return
    if gap_s < _LEAST_GAP_S or rate_rps > _MOST_RPS:
        raise ValueError(
            f"{path}: expected a median gap of 1 ms or more and {_MOST_RPS:.0e} "
            f"requests/s at most, got {gap_s:.3g} s and {rate_rps:.3g}/s with times "
            f"taken to be in {unit}. {_OTHER_UNIT if unit != DATES else ''}If so many "
            "requests really come at one time: --ties=keep, or --set "
            "workload.ties=keep in a sweep"
        )


# ---- lengths of texts: ShareGPT ------------------------------------------------------


def _sharegpt(
    path: Path,
    records: Records,
    max_rows: int,
    tokens_of: Callable[[str], int] | None,
) -> Trace:
    if tokens_of is None:
        raise ValueError(
            f"{path}: expected a tokenizer for ShareGPT's texts (--trace_tokenizer="
            "FILE; a sweep has its model's), got none"
        )
    rows, taken = list[TraceRow](), 0
    for record in _taken(records.rows, max_rows):
        taken += 1
        try:
            lengths = sharegpt_lengths(record.cells, tokens_of)
        except (ValueError, KeyError) as error:
            expected = "a list 'conversations' of turns with 'from' and 'value'"
            raise bad_record(path, record.where, expected, record.cells) from error
        if lengths is not None:
            rows.append(TraceRow(math.nan, *lengths))
    if not rows:
        raise ValueError(f"{path}: expected conversations, got {SHAREGPT_FILTER}")
    left_out = f"{taken - len(rows)} of {taken} conversations are left out: "
    return Trace(
        rows=rows,
        file=str(path),
        format="sharegpt",
        unit="none",
        clock=NO_CLOCK,
        ties="keep",
        notes=(left_out + SHAREGPT_FILTER,) if taken > len(rows) else (),
    )
