"""What becomes of the rows of a trace that cannot be served."""

import pytest

from disagg_jax.workload.traces import TraceRow, fit_rows

ROWS = [
    TraceRow(3.0, 100, 10),
    TraceRow(4.0, 100, 0),  # nothing to generate
    TraceRow(5.0, 900, 10),
    TraceRow(6.0, 500, 30),
    TraceRow(7.0, 200, 20),
]


def test_only_rows_without_tokens_are_left_out_where_nothing_is_too_long():
    fitted = fit_rows(ROWS)
    assert fitted.rows == [ROWS[0], *ROWS[2:]]
    assert fitted.notes("") == ("1 of 5 rows are left out: no prompt or output tokens",)


@pytest.mark.parametrize(("most", "kept"), [(530, 3), (529, 2), (220, 2), (219, 1)])
def test_rows_over_a_total_are_dropped_and_counted(most, kept):
    fitted = fit_rows(ROWS, most)
    fits = [row for row in ROWS if row[1] + row[2] <= most and row[2]]
    assert fitted.rows == fits and len(fits) == kept
    counts = (fitted.left_out_empty, fitted.left_out_long, fitted.cut)
    assert counts == (1, 4 - kept, 0)
    assert fitted.notes("so many tokens") == (
        "1 of 5 rows are left out: no prompt or output tokens",
        f"{4 - kept} of 5 rows are left out: over so many tokens",
    )


def test_rows_are_clipped_to_half_of_a_total_each_and_counted():
    fitted = fit_rows(ROWS, 41, too_long="clip")
    assert [row[1:] for row in fitted.rows] == [(20, 10), (20, 10), (20, 20), (20, 20)]
    assert [row.arrival_s for row in fitted.rows] == [3, 5, 6, 7]
    counts = (fitted.left_out_empty, fitted.left_out_long, fitted.cut)
    assert counts == (1, 0, 4)
    some = fit_rows(ROWS, 1000, too_long="clip")  # 900 is over 500, and 500 is not
    assert some.rows[1:3] == [TraceRow(5.0, 500, 10), ROWS[3]]
    assert some.notes("it")[1:] == (
        "1 of 5 rows are cut to half of it, prompt and output each",
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "expected some rows to serve"),
        (ROWS[1:4], {"max_total_tokens": 9}, "to serve, got {'empty': 1, 'long': 2}"),
        (ROWS, {"max_total_tokens": 0}, "maximum: expected >= 1 token, got 0"),
        (ROWS, {"max_total_tokens": 1, "too_long": "clip"}, "expected >= 1 token, g"),
        (ROWS, {"too_long": "cut"}, "expected drop or clip, got 'cut'"),
    ],
)
def test_errors(rows, options, message):
    with pytest.raises(ValueError, match=message):
        fit_rows(rows, **options)
