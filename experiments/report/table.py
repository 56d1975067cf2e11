"""Rows of text in columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

Row = Sequence[str]


def align(rows: Sequence[Row], right: Collection[int] = ()) -> list[str]:
    """Return a line for each row; columns in `right` end together, others begin so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def numbers(rows: Sequence[Row], labels: int = 1) -> list[str]:
    """Align rows of `labels` columns of names, then of numbers."""
    return align(rows, right=range(labels, len(rows[0])))


def side_by_side(title: str, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Align columns of numbers, name -> label -> number, whose labels are equal."""
    labels = next(iter(columns.values()))
    rows = [(label, *(of[label] for of in columns.values())) for label in labels]
    return numbers([(title, *columns), *rows])


def underlined(lines: Sequence[str]) -> list[str]:
    """Put a rule under the first line of a table."""
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table with the first row as its head."""
    lines = ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
