"""Fit an engine's factors to measured latencies, and say how well they carry over.

A latency is the scalar product of the factors and of what the simulator counted for it
(`step_terms`), so that factors follow from least squares. Rows are weighted so that the
mean of |simulated / measured - 1| is least (iteratively reweighted): some published
rows are far from all others of their kind, and must not decide.

No factor is negative. Those that multiply terms are drawn towards 1, the device's
own efficiencies: where rows cannot tell two terms apart, neither takes the other's
part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import optimize

from disagg_jax.errors import require
from disagg_jax.sim.cost.step_terms import EngineFactors, StepTerms

_ROUNDS = 50  # of reweighting
_LEAST_ERROR = 0.02  # errors below this weigh alike
_PRIOR = 0.02  # weight of |factor - 1|^2 beside the rows' mean squared error
_FACTORS = sum(name.endswith("_s") for name in StepTerms._fields)

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def fit_factors(terms: Array, measured_s: Array) -> EngineFactors:
    """Return the factors with the least mean relative error.

    Args:
      terms: [rows, 13] what each factor multiplies, in the order of `EngineFactors`.
      measured_s: [rows] the latencies, > 0.

    Raises:
      ValueError: if there is no row, or a latency that is not positive.
    """
    require(len(measured_s) > 0, "rows: expected at least one", len(measured_s))
    least = float(measured_s.min())
    require(least > 0, "measured_s: expected latencies > 0", least)
    return _named(_solve(terms / measured_s[:, None]))


def left_out_errors(
    terms: Array, measured_s: Array, groups: Sequence[Hashable]
) -> Array:
    """Return simulated / measured - 1 of each row, by a fit without the row's group.

    With one group nothing is left to fit, so its rows are nan.
    """
    design = terms / measured_s[:, None]
    errors = np.full(len(design), np.nan)
    for group in dict.fromkeys(groups):
        left_out = np.array([group == other for other in groups])
        if not left_out.all():
            errors[left_out] = design[left_out] @ _solve(design[~left_out]) - 1
    return errors


def _solve(design: Array) -> Array:
    """Return factors >= 0 with which the rows of `design` come closest to 1."""
    width = design.shape[1]
    # Columns in seconds and counts differ by orders of magnitude.
    scale = np.where(design.any(axis=0), np.abs(design).mean(axis=0), 1.0)
    scale[:_FACTORS] = 1.0
    prior = np.sqrt(_PRIOR * len(design)) * np.eye(width)[:_FACTORS]
    target = prior.sum(axis=1)
    weights = np.ones(len(design))
    for _ in range(_ROUNDS):
        rows = np.concatenate([design / scale * weights[:, None], prior])
        found = optimize.nnls(rows, np.concatenate([weights, target]))[0] / scale
        errors = np.abs(design @ found - 1)
        weights = 1 / np.sqrt(np.maximum(errors, _LEAST_ERROR))
    return found


def _named(found: Array) -> EngineFactors:
    names = [field.name for field in dataclasses.fields(EngineFactors)]
    return EngineFactors(**dict(zip(names, found.tolist(), strict=True)))
