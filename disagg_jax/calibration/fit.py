"""Fit the terms of a program's time to measured times.

All coefficients are >= 0, and the mean squared relative error is least. Two other forms
were fitted to the same programs of m32 in five calibrations of one day and held against
programs that the fit did not have (`experiments/reports/calibrations.txt`): DistServe's
form was as good as `step_time_terms` (decodes 8.1 to 12.6 % off by either; mixed steps
4.4 to 5.2 %, ours 4.8 to 5.3 %); a roofline was worse for decodes (10.5 to 18.2 %;
mixed steps 4.9 to 5.4 %).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from disagg_jax.programs import KINDS, StepShape
from disagg_jax.sim.cost import step_time_terms
from disagg_jax.sim.cost.measured import LayoutTimes, TransferTimes

# Compiled once for each shape: without jit it would be compiled anew in each call.
_nnls = jax.jit(optax.nnls, static_argnums=2)
_STEPS = 20_000  # of the projected gradient: 8 digits of what an active set finds


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the coefficients >= 0 with the least mean squared relative error.

    Args:
      rows: the value of each term, for each measurement.
      seconds: the time of each measurement, > 0.
    """
    design = np.array(rows) / np.array(seconds)[:, None]  # each row should sum to 1
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0  # a term that is 0 in all measurements
    with jax.enable_x64(True):
        found = _nnls(jnp.asarray(design / scale), jnp.ones(len(design)), _STEPS)
        return (np.asarray(found) / scale).tolist()


def fit_programs(seconds: Mapping[StepShape, float]) -> tuple[float, ...]:
    """Return the coefficients of `step_time_terms.TERMS`, for programs of one kind."""
    rows = [step_time_terms.values(program) for program in seconds]
    return tuple(fit(rows, list(seconds.values())))


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Return `(base, slope)` of base + slope x."""
    base, slope = fit([(1.0, x) for x in seconds], list(seconds.values()))
    return base, slope


def fit_layout(pp: int, measured: Mapping[StepShape, tuple[float, ...]]) -> LayoutTimes:
    """Return the times of a layout, with a fit for each kind and stage."""
    fits = {
        kind: tuple(fit_programs(of_stage(measured, kind, i)) for i in range(pp))
        for kind in KINDS
        if of_stage(measured, kind, 0)
    }
    return LayoutTimes(pp, measured, fits)


def fit_transfers(measured: Mapping[int, float]) -> TransferTimes:
    """Return the times of transfers between two layouts, by their blocks."""
    return TransferTimes(measured, *fit_line(measured))


def of_stage(
    measured: Mapping[StepShape, tuple[float, ...]], kind: str, stage: int
) -> dict[StepShape, float]:
    """Return the seconds of the programs of one kind on one stage."""
    return {p: parts[stage] for p, parts in measured.items() if p.kind == kind}


def left_out_error(seconds: Mapping[StepShape, float], parts: int = 5) -> float | None:
    """Return the mean relative error for programs of one kind that a fit did not have.

    Every `parts`-th program is left out in turn. Return None for fewer than two parts.
    """
    items = list(seconds.items())
    if len(items) < 2 * parts:
        return None
    errors: list[float] = []
    for i in range(parts):
        rest = [item for n, item in enumerate(items) if n % parts != i]
        found = fit_programs(dict(rest))
        for program, time_s in items[i::parts]:
            errors.append(abs(step_time_terms.time_s(program, found) / time_s - 1))
    return statistics.fmean(errors)
