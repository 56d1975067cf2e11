"""Rows of text in columns."""

from experiments.report.table import (
    align,
    markdown,
    numbers,
    side_by_side,
    underlined,
)

ROWS = [("a", "long", "x"), ("bcd", "1", "")]


def test_columns_end_or_begin_together():
    assert align(ROWS) == ["a    long  x", "bcd  1"]
    assert align(ROWS, right=(1,)) == ["a    long  x", "bcd     1"]


def test_numbers_end_together_behind_the_labels():
    rows = [("a", "b", "n"), ("c", "dd", "12")]
    assert numbers(rows) == ["a   b   n", "c  dd  12"]
    assert numbers(rows, labels=2) == ["a  b    n", "c  dd  12"]
    assert underlined(numbers(rows)) == ["a   b   n", "---------", "c  dd  12"]


def test_columns_stand_side_by_side():
    columns = {"vllm": {"ms": "1.5", "rps": "12"}, "pair": {"rps": "7", "ms": "2"}}
    assert side_by_side("", columns) == [
        "     vllm  pair",
        "ms    1.5     2",
        "rps    12     7",
    ]


def test_a_bar_in_a_cell_does_not_end_it():
    rows = [("h", "k"), ("a|b", "c")]
    assert markdown(rows) == ["| h | k |", "|---|---|", "| a/b | c |"]
