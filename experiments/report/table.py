"""Rows of text in columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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


def underlined(rows: Sequence[Row]) -> list[str]:
    """Align rows of one name and numbers, with a rule under the first."""
    head, *body = numbers(rows)
    return [head, "-" * len(head), *body]


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table with the first row as its head."""
    lines = ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
