"""Systems in the order of each criterion, read off the points of one sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from disagg_jax.metrics.criteria import Criterion
from disagg_jax.metrics.goodput import Scores, best_rate, estimate


def rank(
    criterion: Criterion,
    scores: Mapping[str, Scores],
    tolerance: float,
    *,
    independent: bool = True,
) -> list[dict[str, Any]]:
    """Return a row for each system, the best first; see `_figure`.

    Args:
      scores: of each system; rates and throughputs are per device.
      tolerance: of the search, relative.
      independent: whether the seeds' runs are independent samples, as intervals need.
    """
    rows = [
        {"system": system, **_figure(criterion, tried, tolerance, independent)}
        for system, tried in scores.items()
    ]
    return sorted(rows, key=lambda row: -row["mean"])


def _figure(
    criterion: Criterion, tried: Scores, tolerance: float, independent: bool
) -> dict[str, Any]:
    """Return the highest passing rate or the best throughput, and how well it is known.

    A sweep tries the rates that one criterion needs. By another criterion, `known` may
    be

    * coarsely: the neighbouring rates are further apart than the tolerance;
    * at least: the system passed at every rate, or the throughput was best at the
      lowest or the highest rate;
    * below: the system failed at every rate.

    Otherwise it is "yes". `monotone` says whether no rate failed below one that passed.
    """
    if criterion.target is None:
        best = best_rate(tried, tolerance, independent=independent)
        known = "yes" if best.bracketed else "at least"
        return {**dataclasses.asdict(best.interval), "known": known, "bound": None}
    found = estimate(tried, criterion.target, independent=independent)
    known = _known(found.pass_rps, found.fail_rps, tolerance)
    # If no rate passed, or none failed, only the bound can be shown.
    bound = {"below": found.fail_rps, "at least": found.pass_rps}.get(known)
    return {
        **dataclasses.asdict(found.interval),
        "known": known,
        "bound": bound,
        "monotone": found.inversion is None,
    }


def _known(passing: float | None, failing: float | None, tolerance: float) -> str:
    if passing is None:
        return "below"
    if failing is None:
        return "at least"
    return "yes" if failing <= passing * (1 + tolerance) else "coarsely"
