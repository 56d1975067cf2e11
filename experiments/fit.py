"""Fitting sums of terms, with coefficients >= 0, to measured times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from disagg_jax.sim import terms
from disagg_jax.sim.programs import Program

# Compiled once for each shape: as it is, it is compiled anew in each call.
_nnls = jax.jit(optax.nnls, static_argnums=2)
_STEPS = 20_000  # of the projected gradient: 8 digits of what an active set finds


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 with the least mean squared relative error.

    Args:
      rows: the value of each term, for each measurement.
      seconds: of each, > 0.
    """
    design = np.array(rows) / np.array(seconds)[:, None]  # each is to add up to 1
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0  # a term that is 0 in all
    with jax.enable_x64(True):
        found = _nnls(jnp.asarray(design / scale), jnp.ones(len(design)), _STEPS)
        return (np.asarray(found) / scale).tolist()


def fit_programs(seconds: Mapping[Program, float]) -> tuple[float, ...]:
    """The coefficients of `terms.TERMS`, for programs of one kind."""
    rows = [terms.values(program) for program in seconds]
    return tuple(fit(rows, list(seconds.values())))


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """`(base, slope)` of base + slope x."""
    base, slope = fit([(1.0, x) for x in seconds], list(seconds.values()))
    return base, slope


def left_out_error(seconds: Mapping[Program, float], parts: int = 5) -> float | None:
    """Mean relative error of the fit for programs of one kind that it was not given.

    Every `parts`-th is left out in turn. None where there are fewer than two parts.
    """
    items = list(seconds.items())
    if len(items) < 2 * parts:
        return None
    errors: list[float] = []
    for i in range(parts):
        rest = [item for n, item in enumerate(items) if n % parts != i]
        found = fit_programs(dict(rest))
        errors += [
            abs(terms.time_s(program, found) / time_s - 1)
            for program, time_s in items[i::parts]
        ]
    return statistics.fmean(errors)
