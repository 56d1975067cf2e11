"""Trace files as records: CSV, JSON lines or a JSON list, plain or gzipped, streamed.

The first bytes of a file say what it is; its name does not count.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import NamedTuple, TextIO, cast

Path = str | os.PathLike[str]
_CHUNK = 2**20  # characters of a JSON list to read at once
_BETWEEN = re.compile(r"[\s,]*")
_SHOWN = 120  # characters of a bad line; a line of Mooncake has hundreds of hashes


class Record(NamedTuple):
    """A row of a file: its cells by name, and where it stands."""

    where: str
    cells: Mapping[str, object]


class Records(NamedTuple):
    """The records of a file."""

    where: str  # where the names are: a CSV file's header, or the first record
    names: frozenset[str]
    rows: Iterator[Record]


@contextlib.contextmanager
def open_records(path: Path) -> Generator[Records, None, None]:
    """Open a trace file.

    Raises:
      ValueError: if the file is no text or has no names; while rows are taken, naming
        file and line, on a line that is no record.
      OSError: if the file cannot be opened.
    """
    try:
        with _open_text(path) as text:
            start = text.read(4096).lstrip()[:1]
            text.seek(0)
            if start in ("{", "["):
                objects = _list_entries if start == "[" else _lines
                yield _json_records(path, objects(path, text))
            else:
                yield _csv_records(path, text)
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: expected a whole CSV, JSON lines or JSON file in UTF-8, plain or "
            f"gzipped, got one that cannot be read: {error}"
        ) from error


@contextlib.contextmanager
def _open_text(path: Path) -> Generator[TextIO, None, None]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        data = cast("io.BufferedReader", gzip.GzipFile(fileobj=raw) if packed else raw)
        with io.TextIOWrapper(data, encoding="utf-8-sig", newline="") as text:
            yield text


def bad_record(path: Path, where: str, expected: str, got: object) -> ValueError:
    """Return the error about a line that is not as expected."""
    shown = got if isinstance(got, str) else repr(got)
    shown = f"{shown[:_SHOWN]}..." if len(shown) > _SHOWN else shown
    return ValueError(f"{path}, {where}: expected {expected}, got {shown}")


# ---- CSV -----------------------------------------------------------------------------


def _csv_records(path: Path, text: TextIO) -> Records:
    lines = _csv_lines(path, text)
    where, header = next(lines, ("line 1", list[str]()))
    names = [name.strip() for name in header]
    return Records(where, frozenset(names), _csv_rows(path, names, lines))


def _csv_rows(
    path: Path, names: list[str], lines: Iterable[tuple[str, list[str]]]
) -> Iterator[Record]:
    expected = f"{len(names)} cells, as in the header"
    for where, cells in lines:
        if len(cells) != len(names):
            raise bad_record(path, where, expected, cells)
        yield Record(where, dict(zip(names, cells, strict=True)))


def _csv_lines(path: Path, text: TextIO) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines that are not empty."""
    lines = csv.reader(text)
    while True:
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"line {lines.line_num}"
            raise bad_record(path, where, "a line of CSV", str(error)) from error
        if len(cells) > 1 or "".join(cells).strip():
            yield f"line {lines.line_num}", cells


# ---- JSON ----------------------------------------------------------------------------


def _json_records(path: Path, objects: Iterator[tuple[str, object]]) -> Records:
    records = _objects_only(path, objects)
    first = next(records, None)
    if first is None:
        return Records("line 1", frozenset(), iter(()))
    return Records(first.where, frozenset(first.cells), _with(first, records))


def _with(first: Record, others: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from others


def _objects_only(path: Path, found: Iterator[tuple[str, object]]) -> Iterator[Record]:
    for where, value in found:
        if not isinstance(value, dict):
            raise bad_record(path, where, "a JSON object", value)
        yield Record(where, cast("dict[str, object]", value))


def _lines(path: Path, text: TextIO) -> Iterator[tuple[str, object]]:
    """Yield the objects of JSON lines, skipping empty lines."""
    for number, line in enumerate(text, start=1):
        if line := line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                where = f"line {number}"
                raise bad_record(path, where, "a JSON object", line) from error


def _list_entries(path: Path, text: TextIO) -> Iterator[tuple[str, object]]:
    """Yield the entries of a JSON list, holding only part of its text at once."""
    decoder, number = json.JSONDecoder(), 0
    buffer, at = text.read(_CHUNK).lstrip(), 1
    while True:
        at = _BETWEEN.match(buffer, at).end()  # pyright: ignore  # it always matches
        if buffer.startswith("]", at):
            return
        try:
            entry, at = decoder.raw_decode(buffer, at)
        except ValueError as error:
            more = text.read(max(_CHUNK, len(buffer)))
            if not more:
                where = f"entry {number + 1}"
                got = buffer[at:] or "the end of the file"
                raise bad_record(path, where, "a JSON object", got) from error
            buffer, at = buffer[at:] + more, 0
            continue
        number += 1
        yield f"entry {number}", entry
