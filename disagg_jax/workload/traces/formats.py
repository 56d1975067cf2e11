"""The formats of traces, told apart by the names of their columns or keys.

A name may stand in a CSV file's header or be a JSON key: both are read alike. Units are
the format's, never a guess from how large the numbers are; but for times since 1970,
whose unit no other can be taken for.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from disagg_jax.workload.traces.files import Path, bad_record
from disagg_jax.workload.traces.rows import UNITS_PER_S, Unit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """The names of a format, and what its times count in."""

    name: str
    time: str | None  # None: the file has lengths only
    prompt: str
    output: str
    unit: str | None = None  # of numbers; None: the file does not say
    marks: frozenset[str] = frozenset()  # one of them tells it from its like

    @property
    def names(self) -> tuple[str, ...]:
        """The names that every file of the format has."""
        times = () if self.time is None else (self.time,)
        return (*times, self.prompt, self.output)

    def matches(self, names: frozenset[str]) -> bool:
        """Whether a file with these names is of the format."""
        marked = not self.marks or bool(self.marks & names)
        return marked and names.issuperset(self.names)


def _azure(name: str, *marks: str) -> Format:
    return Format(
        name=name,
        time="TIMESTAMP",
        prompt="ContextTokens",
        output="GeneratedTokens",
        marks=frozenset(marks),
    )


def _burstgpt(name: str, *marks: str) -> Format:
    return Format(
        name=name,
        time="Timestamp",
        unit="s",
        prompt="Request tokens",
        output="Response tokens",
        marks=frozenset(marks),
    )


def _vidur(name: str, time: str | None) -> Format:
    return Format(
        name=name,
        time=time,
        unit="s",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    )


def _lengths(name: str, unit: str | None, *marks: str) -> Format:
    """Of one of the formats with these keys, which only others tell apart."""
    return Format(
        name=name,
        time="timestamp",
        unit=unit,
        prompt="input_length",
        output="output_length",
        marks=frozenset(marks),
    )


def _plain() -> list[Format]:
    """This project's own columns, and simdistserve's."""
    times = [("arrival_s", "s"), ("arrival_ms", "ms")]
    times += [(name, None) for name in ("arrival", "arrival_time", "timestamp", "time")]
    return [
        Format(name="columns", time=time, unit=unit, prompt=prompt, output=output)
        for (time, unit), prompt, output in itertools.product(
            times, ("prompt_tokens", "prompt_len"), ("output_tokens", "output_len")
        )
    ]


FORMATS = (
    _azure("azure 2025", "NumImages"),  # image tokens are inside ContextTokens
    _azure("azure"),
    _burstgpt("burstgpt 2", "Session ID"),
    _burstgpt("burstgpt"),
    _vidur("vidur", "arrived_at"),
    _vidur("vidur, lengths only", None),
    Format(
        name="splitwise-sim",
        time="arrival_timestamp",
        unit="s",
        prompt="prompt_size",
        output="token_size",
    ),
    _lengths("bailian", "s", "chat_id", "parent_chat_id", "turn"),
    _lengths("mooncake", "ms", "hash_ids"),
    _lengths("input_length and output_length", None),
    *_plain(),
)


def find_format(path: Path, where: str, names: frozenset[str]) -> Format:
    """The format of a file with these names.

    Raises:
      ValueError: listing the formats, if it is none of them.
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
    """How the cells of a file's times are read."""

    read: Callable[[object], float]
    units_per_s: int
    unit: str  # to show


DATES = "dates"  # the unit of times that are no numbers
_EPOCH = 10**9  # from this number on a first time is one since 1970
_YEARS_S = (1e9, 4.2e9)  # 2001 to 2103


def time_cells(form: Format, unit: Unit, first: object) -> TimeCells:
    """How to read the times of a file, by its format and its first time.

    Raises:
      ValueError: saying what was expected, if it is no time, its unit is not known, or
        one is given for dates.
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


def _dates(form: Format, unit: Unit, first: object) -> TimeCells:
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
    """A finite number; whole ones exactly, however large.

    Raises:
      ValueError: if it is none.
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
    """The time of a date in ISO 8601; without a time zone it is UTC.

    A 7th decimal, which Azure's traces have, is ignored.
    """
    if not isinstance(cell, str):
        raise ValueError("no date")
    time = datetime.datetime.fromisoformat(cell.strip())
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    epoch = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return (time - epoch) // datetime.timedelta(microseconds=1)


def count(cell: object) -> int:
    """A number of tokens; pandas writes 374 as 374.0 beside missing cells.

    Raises:
      ValueError: if it is no whole number, or below 0.
    """
    value = _number(cell)
    whole = int(value)
    if whole != value or whole < 0:
        raise ValueError("no count")
    return whole


# ---- ShareGPT ------------------------------------------------------------------------

SHAREGPT = "conversations"  # the key that shows it
_FEWEST, _MOST, _MOST_TOGETHER = 4, 1024, 2048
SHAREGPT_FILTER = (
    f"no question and answer of {_FEWEST} to {_MOST} tokens each, "
    f"{_MOST_TOGETHER} together"
)


def sharegpt_lengths(
    cells: Mapping[str, object], tokens_of: Callable[[str], int]
) -> tuple[int, int] | None:
    """The first question of a conversation and its answer, in tokens.

    Returns:
      None where there are none, or they are outside of the filter that vLLM and others
      use.

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
