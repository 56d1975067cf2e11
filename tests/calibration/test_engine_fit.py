"""The fit of an engine's factors: known ones come back, and what bounds them."""

import dataclasses

import numpy as np
import pytest

from disagg_jax.calibration.engine_fit import fit_factors, left_out_errors
from disagg_jax.sim.cost.step_terms import EngineFactors

NAMES = [field.name for field in dataclasses.fields(EngineFactors)]
KNOWN = EngineFactors(
    linear=0.8,
    experts=1.3,
    expanded=0.9,
    attention=1.1,
    kv=1.4,
    reduce=0.7,
    exchange=1.6,
    layer_s=2e-5,
    scaled_layer_s=1e-5,
    expert_layer_s=3e-5,
    kv_layer_s=4e-5,
    sequence_s=1.5e-5,
    step_s=1e-3,
)
# A term's size: milliseconds of kernels, layers, sequences, and a step.
SIZES = np.array([*(5e-3,) * 7, *(60.0,) * 4, 100.0, 1.0])


def drawn_terms(rows=400, seed=0):
    """Terms of steps that differ in everything, [rows, factors]."""
    draws = np.random.default_rng(seed).uniform(0.02, 1.0, (rows, len(NAMES)))
    return draws * SIZES


def latencies_s(terms, factors=KNOWN):
    return terms @ np.array(dataclasses.astuple(factors))


def as_array(factors):
    return np.array(dataclasses.astuple(factors))


def test_known_factors_come_back():
    terms = drawn_terms()
    found = fit_factors(terms, latencies_s(terms))
    assert latencies_s(terms, found) == pytest.approx(latencies_s(terms), rel=0.02)
    # The prior, 1 and no overhead, weighs as half a percent of the rows.
    away = np.abs(as_array(found) - as_array(KNOWN))
    assert (away[:7] < 0.03).all()
    assert (away[7:] < 0.1 * as_array(KNOWN)[7:]).all()
    again = fit_factors(terms, latencies_s(terms), KNOWN)
    assert as_array(again) == pytest.approx(as_array(KNOWN))


def test_rows_far_from_all_others_do_not_decide():
    terms = drawn_terms()
    true_s, measured_s = latencies_s(terms), latencies_s(terms)
    measured_s[::10] *= 0.25  # as if one in ten made four tokens a step
    found = fit_factors(terms, measured_s, KNOWN)
    error = np.abs(latencies_s(terms, found) / true_s - 1).mean()
    # Least squares of relative errors lets the few decide: they have the large ones.
    design = terms / measured_s[:, None]
    squares = np.linalg.lstsq(design, np.ones(len(design)), rcond=None)[0]
    assert error < 0.02
    assert np.abs(terms @ squares / true_s - 1).mean() > 0.3


def test_a_long_latency_weighs_as_a_short_one():
    # Of rows that agree in nothing, the factor is that of most rows, not of most time.
    terms = np.zeros((3, len(NAMES)))
    terms[:, NAMES.index("linear")] = 1e-3, 1e-3, 1.0
    found = fit_factors(terms, np.array([0.8e-3, 0.8e-3, 1.6]))
    assert found.linear == pytest.approx(0.8, rel=0.02)


def test_no_overhead_is_negative_and_no_kernel_very_good_or_bad():
    terms = drawn_terms()
    quick = as_array(fit_factors(terms, 0.1 * latencies_s(terms)))
    assert quick.tolist() == [0.5] * 7 + [0.0] * 6
    slow = as_array(fit_factors(terms, 3 * latencies_s(terms)))
    assert slow[:7].max() == 2.0
    assert (slow[7:] > as_array(KNOWN)[7:]).all()  # these have no bound above


def test_what_rows_cannot_tell_stays_as_in_the_prior():
    terms = drawn_terms()
    unseen = ["experts", "expanded", "exchange", "scaled_layer_s", "expert_layer_s"]
    terms[:, [NAMES.index(name) for name in unseen]] = 0.0
    measured_s = latencies_s(terms)
    default = fit_factors(terms, measured_s)
    near = fit_factors(terms, measured_s, KNOWN)
    for name in unseen:
        assert getattr(default, name) == pytest.approx(getattr(EngineFactors(), name))
        assert getattr(near, name) == pytest.approx(getattr(KNOWN, name))


def test_two_terms_that_always_come_together_share_what_differs_from_the_prior():
    terms = np.zeros((50, len(NAMES)))
    for name in ("linear", "kv"):
        terms[:, NAMES.index(name)] = np.linspace(1e-3, 5e-3, 50)
    found = fit_factors(terms, latencies_s(terms, EngineFactors(linear=1.4, kv=1.0)))
    assert found.linear == pytest.approx(found.kv)
    assert found.linear == pytest.approx(1.2, rel=0.01)


def test_errors_of_a_group_are_by_a_fit_without_it():
    terms = drawn_terms()
    measured_s = latencies_s(terms)
    groups = ["a"] * 200 + ["b"] * 200
    measured_s[200:] *= 2  # the second group is another engine
    errors = left_out_errors(terms, measured_s, groups, KNOWN)
    assert errors[200:] == pytest.approx(-0.5, abs=0.01)  # by the first's factors
    # By the second's, which bounds keep below twice the first's.
    by_second = fit_factors(terms[200:], measured_s[200:], KNOWN)
    expected = latencies_s(terms[:200], by_second) / measured_s[:200] - 1
    assert errors[:200] == pytest.approx(expected)
    assert errors[:200].mean() > 0.5


def test_with_one_group_there_is_nothing_to_fit():
    terms = drawn_terms(rows=5)
    errors = left_out_errors(terms, latencies_s(terms), ["a"] * 5)
    assert np.isnan(errors).all()


@pytest.mark.parametrize(
    "measured_s, said",
    [
        (np.array([]), "rows: expected at least one, got 0"),
        (np.array([1.0, 0.0]), "measured_s: expected latencies > 0, got 0.0"),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(measured_s, said):
    with pytest.raises(ValueError, match=said):
        fit_factors(drawn_terms(len(measured_s)), measured_s)
