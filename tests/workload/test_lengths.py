"""Moments, ends and errors of the length distributions."""

import json

import numpy as np
import pytest

from disagg_jax.workload.lengths import (
    FixedLengths,
    HistogramLengths,
    LognormalLengths,
    NormalLengths,
    UniformLengths,
    parse_lengths,
)

N = 40_000  # draws for moments: the mean of unit-variance draws is good to 0.5 %


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_fixed():
    assert FixedLengths(tokens=9).sample(2, rng()).tolist() == [9, 9]


def test_uniform_includes_both_ends():
    lengths = UniformLengths(low=3, high=6).sample(N, rng())
    values, counts = np.unique(lengths, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    # A share of 1/4 has a standard error of sqrt(3 / 16 N) = 0.22 %.
    assert counts / N == pytest.approx(0.25, abs=0.01)


def test_normal_is_clipped():
    lengths = NormalLengths(mean=2600, deviation=780, high=10**6).sample(N, rng())
    # Errors: mean 780 / sqrt(N) = 4 tokens, deviation 0.35 %.
    assert lengths.mean() == pytest.approx(2600, abs=15)
    assert lengths.std() == pytest.approx(780, rel=0.015)
    narrow = NormalLengths(mean=10, deviation=20, low=5, high=20).sample(N, rng())
    assert (narrow.min(), narrow.max()) == (5, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": 0}, "normal lengths: expected a finite mean > 0, got 0"),
        ({"deviation": -1}, "normal lengths: expected a finite deviation >= 0, got -1"),
        ({"low": 0}, r"normal lengths: expected 1 <= low <= high, got \(0, 20\)"),
    ],
)
def test_normal_refuses(change, message):
    good = {"mean": 10, "deviation": 1, "high": 20}
    with pytest.raises(ValueError, match=message):
        NormalLengths(**{**good, **change})


def test_lognormal():
    lengths = LognormalLengths(median=500, sigma=0.5, high=10**6).sample(N, rng())
    # Errors: median 1.25 * 0.5 / sqrt(N) = 0.3 %, deviation of the log 0.35 %.
    assert np.median(lengths) == pytest.approx(500, rel=0.01)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.015)


@pytest.mark.parametrize(
    ("tokens", "length"), [(2.4, 2), (2.6, 3), (3.4, 3), (3.6, 4), (0.2, 1), (9.7, 9)]
)
def test_lengths_are_rounded_to_the_nearest(tokens, length):
    for lengths in (
        LognormalLengths(median=tokens, sigma=0, high=9),
        LognormalLengths.from_mean(mean=tokens, sigma=0, high=9),
        NormalLengths(mean=tokens, deviation=0, high=9),
    ):
        assert lengths.sample(2, rng()).tolist() == [length, length]
    # A histogram's are rounded down, so that a bin from 2 to 4 has 2s and 3s.
    narrow = HistogramLengths(edges=(tokens, tokens + 1e-6), weights=(1,))
    assert narrow.sample(1, rng()).tolist() == [max(1, int(tokens))]


def test_lognormal_from_mean():
    by_mean = LognormalLengths.from_mean(mean=300, sigma=1.0, high=10**6)
    half = LognormalLengths.from_mean(mean=300, sigma=0.5, high=10**6)
    assert half.median == pytest.approx(300 / np.exp(0.125))
    # The coefficient of variation is sqrt(e - 1) = 1.3: 0.65 % over N.
    assert by_mean.sample(N, rng()).mean() == pytest.approx(300, rel=0.02)


def test_lognormal_is_clipped():
    lengths = LognormalLengths(median=10, sigma=2, low=5, high=20).sample(N, rng())
    assert (lengths.min(), lengths.max()) == (5, 20)
    by_mean = LognormalLengths.from_mean(mean=10, sigma=2, low=5, high=20)
    lengths = by_mean.sample(N, rng())
    assert (lengths.min(), lengths.max()) == (5, 20)


def test_histogram():
    histogram = HistogramLengths(edges=(0, 2, 10, 11, 20), weights=(1, 0, 3, 0))
    values, counts = np.unique(histogram.sample(N, rng()), return_counts=True)
    # The first bin holds 0 and 1, and 0 becomes 1; empty bins stay empty; [10, 11)
    # is 10 alone. The share's standard error is 0.22 %.
    assert values.tolist() == [1, 10]
    assert counts / N == pytest.approx([0.25, 0.75], abs=0.01)


class Draws:
    """A generator of given numbers."""

    def __init__(self, *rows):
        self._rows = rows

    def random(self, shape):
        return np.array(self._rows).reshape(shape)


def test_a_draw_on_the_edge_of_a_bin_is_of_the_next_and_never_of_an_empty_one():
    histogram = HistogramLengths(edges=(0, 10, 20, 30), weights=(0, 1, 1))
    draws = Draws((0.0, 0.5), (0.5, 0.5), (0.49, 0.0), (0.99, 0.999))
    assert histogram.sample(4, draws).tolist() == [15, 25, 10, 29]


def test_histogram_is_uniform_within_a_bin():
    lengths = HistogramLengths(edges=(10, 30), weights=(2,)).sample(N, rng())
    assert (lengths.min(), lengths.max()) == (10, 29)
    # 10..29: mean 19.5, deviation 5.77, so 0.03 over N.
    assert lengths.mean() == pytest.approx(19.5, abs=0.1)


def test_figure_of_a_paper(shared_dir):
    """ShareGPT prompts: 40 bars of DistServe's Fig. 7, whose legend says 755.5."""
    path = shared_dir / "facts" / "fig7_hist.json"
    if not path.is_file():
        pytest.skip(f"no reference data: {path} is missing")
    figure = json.loads(path.read_text(encoding="utf-8"))
    histogram = HistogramLengths(
        edges=tuple(figure["bin_width"] * i for i in range(41)),
        weights=tuple(figure["mass"]["sharegpt_in"]),
    )
    # Deviation about 530 tokens, so 2.7 over N.
    assert histogram.sample(N, rng()).mean() == pytest.approx(755.5, abs=8)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FixedLengths, {"tokens": 0}, "expected tokens >= 1, got 0"),
        (UniformLengths, {"low": 0, "high": 3}, r"1 <= low <= high, got \(0, 3\)"),
        (UniformLengths, {"low": 4, "high": 3}, r"1 <= low <= high, got \(4, 3\)"),
        (LognormalLengths, {"median": 0, "sigma": 1, "high": 9}, "median > 0"),
        (LognormalLengths, {"median": 5, "sigma": -1, "high": 9}, "sigma >= 0"),
        (LognormalLengths, {"median": 5, "sigma": 1, "high": 0}, "low <= high"),
        (HistogramLengths, {"edges": (1, 2), "weights": (1, 1)}, "one edge more"),
        (HistogramLengths, {"edges": (1,), "weights": ()}, "one edge more"),
        (HistogramLengths, {"edges": (2, 1), "weights": (1,)}, "increase"),
        (HistogramLengths, {"edges": (1, 1), "weights": (1,)}, "increase"),
        (HistogramLengths, {"edges": (-1, 1), "weights": (1,)}, "increase"),
        (HistogramLengths, {"edges": (0, 1), "weights": (0,)}, "positive, finite"),
        (
            HistogramLengths,
            {"edges": (0, 1, 2), "weights": (2, -1)},
            "weights >= 0",
        ),
    ],
)
def test_errors(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("fixed:7", FixedLengths(tokens=7)),
        ("uniform:3:9", UniformLengths(low=3, high=9)),
        ("lognormal:20:0.5:99", LognormalLengths(median=20, sigma=0.5, high=99)),
    ],
)
def test_lengths_are_read(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "fixed", "fixed:x", "uniform:9:3", "zipf:2"])
def test_bad_lengths_are_an_error_that_quotes_them(text):
    with pytest.raises(ValueError, match=f"'{text}'"):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed:inf", "lengths 'fixed:inf': cannot convert float infinity"),
        ("uniform:1:nan", "lengths 'uniform:1:nan': cannot convert float NaN"),
        ("lognormal:9:1", "LOW:HIGH or lognormal:MEDIAN:SIGMA:HIGH, got 'lognormal:9"),
        ("fixed:1:2", "expected fixed:N, uniform"),
    ],
)
def test_lengths_that_are_no_numbers_or_too_many_are_refused(text, message):
    with pytest.raises(ValueError) as error:
        parse_lengths(text)
    assert message in str(error.value)


def test_a_median_may_lie_between_two_lengths():
    assert parse_lengths("lognormal:2.5:0.5:99").median == 2.5
