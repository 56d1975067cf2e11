"""The formats of traces, told apart by the names of their columns or keys.

A name may be a column in a CSV file's header or a JSON key. The format says the unit of
times; their size is no evidence, except for times since 1970, whose unit is certain.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import sys
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from disagg_jax.workload.traces.files import Path, bad_record
from disagg_jax.workload.traces.rows import UNITS_PER_S, Unit


@dataclasses.dataclass(frozen=True, slots=True)
class TraceFormat:
    """The names of a format's columns or keys, and the unit of its times."""

    name: str
    time: str | None  # None: the file has lengths only
    prompt: str
    output: str
    unit: str | None = None  # of numbers; None: the file does not say
    marks: Collection[str] = ()  # one of these names tells it from similar formats

    @property
    def names(self) -> tuple[str, ...]:
        """The names that every file of the format has."""
        times = () if self.time is None else (self.time,)
        return (*times, self.prompt, self.output)

    def matches(self, names: frozenset[str]) -> bool:
        """Return whether a file with these names is of the format."""
        marked = not self.marks or not names.isdisjoint(self.marks)
        return marked and names.issuperset(self.names)


_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_VIDUR = ("num_prefill_tokens", "num_decode_tokens")
_LENGTHS = ("timestamp", "input_length", "output_length")
# Columns of this project, and of simdistserve.
_TIMES = (("arrival_s", "s"), ("arrival_ms", "ms")) + tuple(
    (name, None) for name in ("arrival", "arrival_time", "timestamp", "time")
)
_COLUMNS = itertools.product(
    _TIMES, ("prompt_tokens", "prompt_len"), ("output_tokens", "output_len")
)

# The first format that matches counts.
FORMATS = (
    # Image tokens are inside ContextTokens.
    TraceFormat("azure 2025", *_AZURE, marks=["NumImages"]),
    TraceFormat("azure", *_AZURE),
    TraceFormat("burstgpt 2", *_BURSTGPT, "s", marks=["Session ID"]),
    TraceFormat("burstgpt", *_BURSTGPT, "s"),
    TraceFormat("vidur", "arrived_at", *_VIDUR, "s"),
    TraceFormat("vidur, lengths only", None, *_VIDUR),
    TraceFormat("splitwise-sim", "arrival_timestamp", "prompt_size", "token_size", "s"),
    TraceFormat("bailian", *_LENGTHS, "s", marks=["chat_id", "parent_chat_id", "turn"]),
    TraceFormat("mooncake", *_LENGTHS, "ms", marks=["hash_ids"]),
    TraceFormat("input_length and output_length", *_LENGTHS),
    *(
        TraceFormat("columns", time, prompt, output, unit)
        for (time, unit), prompt, output in _COLUMNS
    ),
)


def find_format(path: Path, where: str, names: frozenset[str]) -> TraceFormat:
    """Return the format of a file with these names.

    Raises:
      ValueError: listing the formats, if none matches.
    """
    for each in FORMATS:
        if each.matches(names):
            return each
    known = [f"{f.name} ({', '.join(f.names)})" for f in FORMATS if f.name != "columns"]
    expected = (
        "a header with one of arrival_s/arrival_ms and one of prompt_tokens/prompt_len "
        "and one of output_tokens/output_len, or the columns or keys of "
        f"{', '.join(known)} or sharegpt (conversations)"
    )
    raise bad_record(path, where, expected, ", ".join(sorted(names)) or "none")


# ---- cells ---------------------------------------------------------------------------


class TimeCells(NamedTuple):
    """How to read the time cells of a file."""

    read: Callable[[object], float]
    units_per_s: int
    unit: str  # to show


DATES = "dates"  # the unit of times that are no numbers
_EPOCH = 10**9  # a first time of at least this number counts from 1970
_YEARS_S = (1e9, 4.2e9)  # 2001 to 2103


def time_cells(form: TraceFormat, unit: Unit, first: object) -> TimeCells:
    """Return how to read the times of a file, by its format and its first time.

    Raises:
      ValueError: saying what was expected, if the first time is no time, its unit is
        not known, or a unit is given for dates.
    """
    named = form.time in ("arrival_s", "arrival_ms")  # the name says the unit
    try:
        value = _number(first)
    except ValueError:
        return _dates(form, unit, first)
    if unit != "auto":
        return TimeCells(_number, UNITS_PER_S[unit], unit)
    if abs(value) >= _EPOCH and not named:
        return _since_1970(value)
    if form.unit is None:
        raise ValueError(f"the unit of '{form.time}' to be known ({ASK})")
    if abs(value) / UNITS_PER_S[form.unit] > _YEARS_S[1]:
        raise ValueError(f"a time in {form.unit} before the year 2103 ({ASK})")
    return TimeCells(_number, UNITS_PER_S[form.unit], form.unit)


ASK = (
    "--trace_unit=s, ms, us or ns, or --set workload.trace_unit=... in a sweep, says it"
)


def _dates(form: TraceFormat, unit: Unit, first: object) -> TimeCells:
    try:
        _microseconds(first)
    except ValueError:
        raise ValueError(f"a finite time, or a date, in '{form.time}'") from None
    if unit != "auto":
        raise ValueError(f"no unit ({unit}) beside dates")
    return TimeCells(_microseconds, 10**6, DATES)


def _since_1970(value: float) -> TimeCells:
    for unit, per_s in UNITS_PER_S.items():
        if _YEARS_S[0] <= value / per_s <= _YEARS_S[1]:
            return TimeCells(_number, per_s, f"{unit} since 1970")
    raise ValueError(f"the unit of a time so large to be known ({ASK})")


def _number(cell: object) -> float:
    """Read a finite number; whole numbers are exact, however large.

    Raises:
      ValueError: if the cell is no such number.
    """
    if isinstance(cell, str):
        try:
            cell = int(cell)
        except ValueError:
            cell = float(cell)
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        raise ValueError("no number")
    if not abs(cell) <= sys.float_info.max:  # an int may be larger
        raise ValueError("not finite")
    return cell


def _microseconds(cell: object) -> float:
    """Read a date in ISO 8601 as a time; without a time zone it is UTC.

    A 7th decimal, as in Azure's traces, is ignored.
    """
    if not isinstance(cell, str):
        raise ValueError("no date")
    time = datetime.datetime.fromisoformat(cell.strip())
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    epoch = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return (time - epoch) // datetime.timedelta(microseconds=1)


def count(cell: object) -> int:
    """Read a number of tokens; pandas writes 374 as 374.0 beside missing cells.

    Raises:
      ValueError: if the cell is no whole number, or below 0.
    """
    value = _number(cell)
    whole = int(value)
    if whole != value or whole < 0:
        raise ValueError("no count")
    return whole


# ---- ShareGPT ------------------------------------------------------------------------

SHAREGPT = "conversations"  # the key that shows the format
_FEWEST, _MOST, _MOST_TOGETHER = 4, 1024, 2048
SHAREGPT_FILTER = (
    f"no question and answer of {_FEWEST} to {_MOST} tokens each, "
    f"{_MOST_TOGETHER} together"
)


def sharegpt_lengths(
    cells: Mapping[str, object], tokens_of: Callable[[str], int]
) -> tuple[int, int] | None:
    """Return the first question of a conversation and its answer, in tokens.

    Returns:
      None where they are missing, or outside the filter that vLLM's benchmark uses.

    Raises:
      ValueError: if the record is no conversation.
    """
    turns = cells[SHAREGPT]
    if not isinstance(turns, list):
        raise ValueError("no list")
    said = [_turn(turn) for turn in turns]  # pyright: ignore
    for (speaker, prompt), (other, output) in itertools.pairwise(said):
        if speaker == "human":
            if other != "gpt":
                return None
            lengths = tokens_of(prompt), tokens_of(output)
            fits = _FEWEST <= min(lengths) and max(lengths) <= _MOST
            return lengths if fits and sum(lengths) <= _MOST_TOGETHER else None
    return None


def _turn(turn: object) -> tuple[str, str]:
    if isinstance(turn, Mapping):
        speaker, text = turn.get("from"), turn.get("value")  # pyright: ignore
        if isinstance(speaker, str) and isinstance(text, str):
            return speaker, text
    raise ValueError("no turn of a conversation")
