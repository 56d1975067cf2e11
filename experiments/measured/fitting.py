"""From measured rows of an engine to its profile, with cross-validated errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from disagg_jax.calibration.engine_fit import Array, fit_factors, left_out_errors
from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.engines import EngineProfile, FitError
from disagg_jax.sim.hardware import get_hardware
from disagg_jax.sim.workers import Mapper
from experiments.cli.progress import ProgressLines
from experiments.measured.described import model_of
from experiments.measured.rows import MeasuredRow
from experiments.measured.served import RowTask, SimulatedRow, simulate_rows

_ROUNDS = 2  # of simulating by a profile and fitting it to what was counted

# What is left out together, for an error on rows that a fit has not seen.
FOLDS: Mapping[str, Callable[[MeasuredRow], object]] = {
    "parallelism": lambda row: row.loop.parallelism if row.loop else "",
    "clients": lambda row: row.loop.clients if row.loop else 0,
    "lengths": lambda row: (row.prompt_tokens, row.output_tokens),
    "model": lambda row: row.model,
}
_PUBLISHED = "clients"  # the fold of the errors in a profile


def fit_profile(
    rows: Sequence[MeasuredRow],
    start: EngineProfile,
    workers: Mapper,
    progress: ProgressLines,
) -> EngineProfile:
    """Return `start` with the factors that fit the rows' TPOT, and their errors.

    The factors are drawn towards those of `start`. What a step has in it hardly depends
    on how long it takes, as clients wait: so the terms of a run by one profile serve to
    fit the next, and two rounds are enough.

    Raises:
      ValueError: if no row can be simulated.
    """
    profile = dataclasses.replace(start, first_token_steps=0.0)
    for _ in range(_ROUNDS):
        found = usable(_simulated(rows, profile, workers, progress))
        terms, measured_s = _terms(found)
        factors = fit_factors(terms, measured_s, start.factors)
        profile = dataclasses.replace(profile, factors=factors)
    found = usable(_simulated(rows, profile, workers, progress))
    return dataclasses.replace(
        profile,
        first_token_steps=_late_steps(found),
        errors=tuple(_errors(found, start.factors)),
        provenance={
            "rows": len(found),
            "left_out": left_out(found, start.factors),
            "versions": sorted({one.row.version for one in found}),
        },
    )


def usable(found: Sequence[SimulatedRow]) -> list[SimulatedRow]:
    """Return the rows that were simulated and had one token a step."""
    return [
        one
        for one in found
        if one.simulated and not one.is_too_fast and not one.row.may_speculate
    ]


def _simulated(
    rows: Sequence[MeasuredRow],
    profile: EngineProfile,
    workers: Mapper,
    progress: ProgressLines,
) -> list[SimulatedRow]:
    tasks = [RowTask(row=row, profile=profile) for row in rows]
    return simulate_rows(tasks, workers, progress)


def _terms(found: Sequence[SimulatedRow]) -> tuple[Array, Array]:
    terms = np.array([one.tpot_terms for one in found])
    return terms, np.array([one.row.tpot_s for one in found])


def left_out(
    found: Sequence[SimulatedRow], prior: EngineFactors
) -> dict[str, dict[str, float]]:
    """Return the TPOT errors of rows whose fold was left out, by the kind of fold.

    Kinds of which there is one fold only are left out.
    """
    terms, measured_s = _terms(found)
    results: dict[str, dict[str, float]] = {}
    for name, fold in FOLDS.items():
        groups = [fold(one.row) for one in found]
        if len(set(groups)) > 1:
            errors = np.abs(left_out_errors(terms, measured_s, groups, prior))
            results[name] = {
                "mean": float(errors.mean()),
                "median": float(np.median(errors)),
                "p90": float(np.percentile(errors, 90)),
            }
    return results


def _late_steps(found: Sequence[SimulatedRow]) -> float:
    """Return the steps >= 0 to add to the TTFTs, for the least mean relative error.

    It is the median of what each row lacks, weighted by what a step weighs in it.
    """
    both = [one.latencies for one in found]
    lacking = [(real.ttft_s - ours.ttft_s) / ours.tpot_s for real, ours in both]
    weights = np.array([ours.tpot_s / real.ttft_s for real, ours in both])
    order = np.argsort(lacking)
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    return max(0.0, float(lacking[order[middle]]))


def _errors(found: Sequence[SimulatedRow], prior: EngineFactors) -> list[FitError]:
    """Return the errors over all rows, then for each model, device and precision.

    Return none if all rows have as many clients: no fit is without them.
    """
    terms, measured_s = _terms(found)
    groups = [FOLDS[_PUBLISHED](one.row) for one in found]
    if len(set(groups)) == 1:
        return []
    tpot = left_out_errors(terms, measured_s, groups, prior)
    steps: dict[object, float] = {}
    for group in set(groups):
        others = [one for one, of in zip(found, groups, strict=True) if of != group]
        steps[group] = _late_steps(others)
    ttft, latency = np.transpose(
        [
            _latency_errors(one, float(error), steps[group])
            for one, error, group in zip(found, tpot, groups, strict=True)
        ]
    )
    cells: dict[tuple[str, str, str], list[int]] = {("", "", ""): [*range(len(found))]}
    for i, one in enumerate(found):
        row, precision = one.row, model_of(one.row).precision
        key = (row.model, get_hardware(row.hardware).name, precision)
        cells.setdefault(key, []).append(i)
    return [
        FitError(
            model=model,
            hardware=hardware,
            precision=precision,
            rows=len(at),
            tpot=float(np.abs(tpot[at]).mean()),
            ttft=float(np.abs(ttft[at]).mean()),
            latency=float(np.abs(latency[at]).mean()),
        )
        for (model, hardware, precision), at in cells.items()
    ]


def _latency_errors(
    one: SimulatedRow, tpot_error: float, late_steps: float
) -> tuple[float, float]:
    """Return the relative errors of TTFT and request latency at that of the TPOT."""
    measured, simulated = one.latencies
    steps = one.row.output_tokens - 1
    tpot_s = measured.tpot_s * (1 + tpot_error)
    ttft_s = simulated.ttft_s + late_steps * tpot_s
    latency_s = measured.ttft_s + steps * measured.tpot_s
    return ttft_s / measured.ttft_s - 1, (ttft_s + steps * tpot_s) / latency_s - 1
