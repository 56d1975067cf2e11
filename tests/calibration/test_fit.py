"""The fit: of relative errors, never negative, and the best there is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from disagg_jax.calibration.fit import (
    fit,
    fit_line,
    fit_programs,
    left_out_error,
)
from disagg_jax.deployment import KVMemory
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.cost import step_time_terms


def scipys(rows, seconds):
    """The same problem by an active set: the least sum of squared relative errors."""
    design = np.array(rows) / np.array(seconds)[:, None]
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(design / scale, np.ones(len(design)))
    return found / scale


def problem(seed):
    """12 measurements of 3 terms, of sizes that differ by 10^6; some best at 0."""
    rng = np.random.default_rng(seed)
    rows = rng.lognormal(size=(12, 3)) * [1.0, 1e3, 1e6]
    return rows, rng.lognormal(size=12)


@given(st.integers(0, 2**32))
def test_the_fit_is_the_best_of_those_that_are_not_negative(seed):
    rows, seconds = problem(seed)
    found, best = fit(rows, seconds), scipys(rows, seconds)
    assert min(found) >= 0
    # In units of what the term adds to a measurement.
    scale = np.linalg.norm(rows / seconds[:, None], axis=0)
    assert found * scale == pytest.approx(best * scale, rel=1e-6, abs=1e-6)


@given(st.integers(0, 2**32), st.sampled_from([1e-6, 1e3]))
def test_a_device_so_many_times_slower_has_coefficients_as_many_times_larger(seed, c):
    rows, seconds = problem(seed)
    assert fit(rows, seconds * c) == pytest.approx(np.multiply(fit(rows, seconds), c))


@pytest.mark.parametrize("policy", [PrefillFirst(), SarathiServe()], ids=str)
def test_the_fit_of_a_grid_predicts_as_the_best_does(policy):
    """Its terms depend on each other, so that coefficients are not unique."""
    memory = KVMemory(num_blocks=256, max_context=512)
    shapes = Buckets.for_limits(policy.limits, memory).step_shapes
    rng = np.random.default_rng(0)
    for kind in sorted({shape.kind for shape in shapes}):
        programs = [shape for shape in shapes if shape.kind == kind]
        rows = np.array([step_time_terms.values(program) for program in programs])
        seconds = rows @ rng.lognormal(size=rows.shape[1])
        seconds *= rng.lognormal(sigma=0.05, size=len(rows))
        found = fit_programs(dict(zip(programs, seconds, strict=True)))
        best = scipys(rows, seconds)
        assert rows @ found == pytest.approx(rows @ best, rel=1e-6)


def test_relative_errors_count():
    # (a - 1)^2 + (a/3 - 1)^2 is least at (1 + 1/3) / (1 + 1/9); the mean is 2.
    assert fit([[1.0], [1.0]], [1.0, 3.0]) == pytest.approx([1.2])


def test_a_line_and_terms_that_nothing_has():
    assert fit_line({1: 5.0, 2: 7.0, 10: 23.0}) == pytest.approx((3.0, 2.0))
    assert fit_line({1: 5.0, 2: 3.0, 3: 1.0})[1] == 0  # it does not fall
    assert fit([[1.0, 0.0], [1.0, 0.0]], [2.0, 2.0]) == pytest.approx([2.0, 0.0])
    # No program is beyond a knot, so its bend is unknown; it is 0.
    short = {StepShape("prefill", T, 1): 1.0 + T for T in (8, 16, 24)}
    assert fit_programs(short)[4:] == (0.0,) * 4


def test_a_program_that_the_form_does_not_fit_shows_when_it_is_left_out():
    sizes = [(B, P) for B in (1, 4, 16) for P in (16, 64, 96, 256)]
    programs = [StepShape("decode", B, B, 0, B, P) for B, P in sizes]
    exact = {p: step_time_terms.time_s(p, (1.0, 0.5, 0.1, 0.01)) for p in programs}
    assert left_out_error(exact) == pytest.approx(0.0, abs=1e-6)
    outlier = {**exact, programs[5]: 3 * exact[programs[5]]}
    # It alone is two thirds off, a twelfth of all; and the others are because of it.
    error = left_out_error(outlier)
    assert error is not None and error > 0.6 / 12
    assert left_out_error({p: exact[p] for p in programs[:9]}) is None
    assert left_out_error({p: exact[p] for p in programs[:10]}) is not None
