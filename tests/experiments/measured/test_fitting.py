"""From rows to a profile: which count, when first tokens come, errors of folds."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.calibration.engine_fit import left_out_errors
from disagg_jax.sim.cost.step_terms import EngineFactors
from experiments.cli.progress import ProgressLines
from experiments.measured.engines import STARTS
from experiments.measured.fitting import (
    FOLDS,
    _errors,
    _late_steps,
    fit_profile,
    left_out,
    usable,
)
from experiments.measured.rows import read_rows
from experiments.measured.served import (
    MeanLatencies,
    RowTask,
    SimulatedRow,
    simulate_row,
)
from tests.experiments.measured.measurements import (
    fields,
    measured_by,
    read_one,
    write,
)

START = STARTS["vllm"]
SLOWER = dataclasses.replace(
    START, factors=EngineFactors(linear=1.2, step_s=2e-3), first_token_steps=2.0
)


def fit(rows, start=START):
    return fit_profile(rows, start, map, ProgressLines())


# -- late first tokens ----------------------------------------------------------------


@pytest.fixture
def latencies(tmp_path):
    """Make a row of measured and simulated TTFT, and simulated TPOT, in ms."""
    row = read_one(tmp_path, fields())

    def make(measured_ms, simulated_ms, tpot_ms=10.0):
        means = MeanLatencies(ttft_s=simulated_ms / 1e3, tpot_s=tpot_ms / 1e3)
        timed = dataclasses.replace(row, ttft_s=measured_ms / 1e3)
        return SimulatedRow(row=timed, simulated=means)

    return make


def test_steps_that_first_tokens_are_late(latencies):
    # They lack 1, 3 and 10 steps, each of which is 10, 20 and 5 % of the TTFT: half of
    # the 35 % lies in the second.
    rows = [latencies(200, 100), latencies(100, 90), latencies(50, 20)]
    assert _late_steps(rows) == pytest.approx(3)
    # With more rows like the first half of it lies there.
    assert _late_steps([*rows, *[latencies(200, 100)] * 6]) == pytest.approx(10)


def test_a_first_token_is_not_early(latencies):
    assert _late_steps([latencies(50, 60), latencies(50, 80)]) == 0


@dataclasses.dataclass
class _Timed:
    """What a measured row says of latencies."""

    ttft_s: float
    tpot_s: float = 1.0


@given(
    st.lists(
        st.tuples(*[st.floats(1.0, 1e3)] * 3),
        min_size=1,
        max_size=8,
    )
)
def test_no_other_number_of_steps_has_less_error(drawn):
    rows = [
        SimulatedRow(
            row=_Timed(measured),
            simulated=MeanLatencies(ttft_s=simulated, tpot_s=tpot),
        )
        for measured, simulated, tpot in drawn
    ]

    def error(steps):
        return sum(abs((s + steps * t) / m - 1) for m, s, t in drawn)

    best = error(_late_steps(rows))
    others = [max(0.0, (m - s) / t) for m, s, t in drawn]
    assert best <= min(map(error, [0.0, *others])) * (1 + 1e-9)


# -- rows -----------------------------------------------------------------------------


def test_rows_that_count(tmp_path):
    found = simulate_row(RowTask(row=read_one(tmp_path, fields()), profile=START))
    skipped = dataclasses.replace(found, simulated=None, skipped="why")
    fast = dataclasses.replace(found, is_too_fast=True)
    doubtful = dataclasses.replace(
        found, row=dataclasses.replace(found.row, may_speculate=True)
    )
    assert usable([skipped, fast, found, doubtful]) == [found]


def test_without_a_row_that_counts_nothing_is_fitted(tmp_path):
    with pytest.raises(ValueError, match="rows: expected at least one, got 0"):
        fit([read_one(tmp_path, fields(silicon_tpot_ms=1e-3))])


# -- errors ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two models, two tp, two numbers of clients and two lengths."""
    folder = tmp_path_factory.mktemp("rows")
    every = itertools.product(
        ("llama-3.1-8b", "qwen3-32b"), (2, 4), (2, 64), ((512, 16), (64, 32))
    )
    described = [
        fields(f"{i}", model_path=model, tp_size=tp, concurrency=n, isl=isl, osl=osl)
        for i, (model, tp, n, (isl, osl)) in enumerate(every)
    ]
    return read_rows(write(folder / "a.csv", *measured_by(SLOWER, folder, *described)))


def test_rows_of_an_engine_give_its_profile(rows):
    found = fit(rows)
    # Of 16 rows the prior counts for a twelfth of one, and each is off a little.
    assert found.factors.step_s == pytest.approx(2e-3, rel=0.1)
    assert found.factors.linear == pytest.approx(1.2, rel=0.05)
    assert found.first_token_steps == pytest.approx(2, abs=0.3)
    kept = ("name", "engine", "system", "token_budget", "max_seqs", "versions")
    assert all(getattr(found, name) == getattr(START, name) for name in kept)
    assert (found.provenance["rows"], found.provenance["versions"]) == (16, [""])
    cells = [(e.model, e.hardware, e.precision, e.rows) for e in found.errors]
    assert cells == [
        ("", "", "", 16),
        ("llama-3.1-8b", "h100", "bf16", 8),
        ("qwen3-32b", "h100", "bf16", 8),
    ]
    for error in found.errors:
        assert 0 < max(error.tpot, error.ttft, error.latency) < 0.1
    every, *others = (e.tpot for e in found.errors)
    assert every == pytest.approx(sum(others) / 2)
    assert set(found.provenance["left_out"]) == set(FOLDS)
    assert found.provenance["left_out"]["clients"]["mean"] == pytest.approx(every)


def test_factors_are_drawn_towards_those_of_the_start(rows):
    factors = dataclasses.replace(SLOWER.factors, experts=1.7)
    found = fit(rows, dataclasses.replace(SLOWER, factors=factors))
    assert found.factors.experts == pytest.approx(1.7)  # of which no row has any
    assert found.factors.linear == pytest.approx(1.2)
    assert found.factors.step_s == pytest.approx(2e-3)
    # Steps of the start are not added to those that are found.
    assert found.first_token_steps == pytest.approx(2)


def test_errors_are_those_of_a_fit_without_as_many_clients(rows):
    found = [simulate_row(RowTask(row=row, profile=START)) for row in rows]
    of_few = [one.row.loop.clients == 2 for one in found]
    # Requests with few clients are twice as slow, which the others do not show.
    slow = [
        dataclasses.replace(
            one, row=dataclasses.replace(one.row, tpot_s=(1 + few) * one.row.tpot_s)
        )
        for one, few in zip(found, of_few, strict=True)
    ]
    terms = np.array([one.tpot_terms for one in slow])
    measured_s = np.array([one.row.tpot_s for one in slow])
    expected = np.abs(left_out_errors(terms, measured_s, of_few, START.factors))
    every, *_ = _errors(slow, START.factors)
    assert every.tpot == pytest.approx(expected.mean())
    assert every.latency > 0.1  # which is that of its tokens, above all
    assert expected[of_few].mean() > 0.4
    kinds = left_out(slow, START.factors)
    assert kinds["clients"]["mean"] == pytest.approx(expected.mean())
    assert kinds["clients"]["median"] == pytest.approx(np.median(expected))
    assert kinds["model"]["mean"] < kinds["clients"]["mean"]


def test_errors_of_latencies_have_the_steps_of_other_rows(rows):
    quick = dataclasses.replace(SLOWER, first_token_steps=0.0)
    found = [simulate_row(RowTask(row=row, profile=quick)) for row in rows]
    expected, late = [], []
    for one in found:
        # First tokens of few clients are ten steps late, and those of many are not.
        ours, few = one.simulated, one.row.loop.clients == 2
        ten_s, latency_s = 10 * ours.tpot_s, (one.row.output_tokens - 1) * ours.tpot_s
        real_s, guess_s = (ours.ttft_s + by * ten_s for by in (few, not few))
        ttft = abs(guess_s / real_s - 1)
        latency = abs((guess_s + latency_s) / (real_s + latency_s) - 1)
        expected.append((ttft, latency))
        row = dataclasses.replace(one.row, ttft_s=real_s, tpot_s=ours.tpot_s)
        late.append(dataclasses.replace(one, row=row))
    every, *_ = _errors(late, quick.factors)
    assert every.tpot == pytest.approx(0, abs=1e-6)
    assert (every.ttft, every.latency) == pytest.approx(np.mean(expected, axis=0))


def test_folds_of_one_kind_have_no_errors(rows):
    alike = [row for row in rows if row.loop.clients == 2 and row.model != "qwen3-32b"]
    found = fit(alike)
    assert found.errors == ()
    assert set(found.provenance["left_out"]) == {"parallelism", "lengths"}
    assert "not checked against any" in found.checked("llama-3.1-8b", "h100", "bf16")
