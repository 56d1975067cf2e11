"""Fit an engine's factors to measured latencies, and say how well they carry over.

A latency is the scalar product of the factors and of what the simulator counted for it
(`step_terms`), so that factors follow from least squares. Rows are weighted so that the
mean of |simulated / measured - 1| is least (iteratively reweighted): some published
rows are far from all others of their kind, and must not decide.

Each factor is drawn towards its value in a prior, by default the device's own
efficiencies and no overhead: where rows cannot tell two terms apart, neither takes the
other's part. No overhead is negative, and no kernel twice as good or half as good as
those that the device's efficiencies were read from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import optimize

from disagg_jax.errors import require
from disagg_jax.sim.cost.step_terms import EngineFactors

_ROUNDS = 50  # of reweighting
_LEAST_ERROR = 0.02  # errors below this weigh alike
# The prior weighs as much as this share of the rows, if each were off by one and each
# factor by its unit. Of 0.003, 0.01, 0.02 and 0.05 the first two had the least errors
# on rows that a fit had not seen.
_PRIOR_SHARE = 0.005
_LEAST, _MOST = 0.5, 2.0  # of a factor on terms
# A factor of 1, and overheads as they come: of a layer, of a sequence, of a step.
_UNITS = EngineFactors(
    layer_s=5e-5,
    scaled_layer_s=5e-5,
    expert_layer_s=5e-5,
    kv_layer_s=5e-5,
    sequence_s=2e-5,
    step_s=2e-3,
)

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def fit_factors(
    terms: Array, measured_s: Array, prior: EngineFactors | None = None
) -> EngineFactors:
    """Return the factors with the least mean relative error.

    Args:
      terms: [rows, factors] what each factor multiplies, in the order of the fields of
        `EngineFactors`.
      measured_s: [rows] the latencies, > 0.
      prior: what the factors are drawn towards, such as those of another version.

    Raises:
      ValueError: if there is no row, or a latency that is not positive.
    """
    require(len(measured_s) > 0, "rows: expected at least one", len(measured_s))
    least = float(measured_s.min())
    require(least > 0, "measured_s: expected latencies > 0", least)
    found = _solve(terms / measured_s[:, None], prior or EngineFactors())
    names = [field.name for field in dataclasses.fields(EngineFactors)]
    return EngineFactors(**dict(zip(names, found.tolist(), strict=True)))


def left_out_errors(
    terms: Array,
    measured_s: Array,
    groups: Sequence[Hashable],
    prior: EngineFactors | None = None,
) -> Array:
    """Return simulated / measured - 1 of each row, by a fit without the row's group.

    With one group nothing is left to fit, so its rows are nan.

    Args:
      groups: of each row, such as its model.
      terms, measured_s, prior: as of `fit_factors`.
    """
    design = terms / measured_s[:, None]
    errors = np.full(len(design), np.nan)
    for group in dict.fromkeys(groups):
        left_out = np.array([group == other for other in groups])
        if not left_out.all():
            found = _solve(design[~left_out], prior or EngineFactors())
            errors[left_out] = design[left_out] @ found - 1
    return errors


def _solve(design: Array, prior: EngineFactors) -> Array:
    """Return factors >= 0 with which the rows of `design` come closest to 1."""
    units = np.array(dataclasses.astuple(_UNITS))
    towards = np.array(dataclasses.astuple(prior)) / units
    pull = np.sqrt(_PRIOR_SHARE * len(design))
    overheads = np.array([f.name.endswith("_s") for f in dataclasses.fields(prior)])
    bounds = np.where(overheads, 0.0, _LEAST), np.where(overheads, np.inf, _MOST)
    scaled, weights = design * units, np.ones(len(design))
    found = towards
    for _ in range(_ROUNDS):
        rows = np.concatenate([scaled * weights[:, None], pull * np.eye(len(units))])
        targets = np.concatenate([weights, pull * towards])
        found = optimize.lsq_linear(rows, targets, bounds, method="bvls").x
        errors = np.abs(scaled @ found - 1)
        weights = 1 / np.sqrt(np.maximum(errors, _LEAST_ERROR))
    return found * units
