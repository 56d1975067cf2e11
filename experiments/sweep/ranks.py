"""The systems in the order of each criterion, read off the points of one sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.metrics.criteria import Criterion
from disagg_jax.search.rates import best_rate, estimate

Scores = Mapping[float, Sequence[float]]  # rate per device -> score of each seed


def rank(
    criterion: Criterion,
    scores: Mapping[str, Scores],
    tolerance: float,
    *,
    independent: bool = True,
) -> list[dict[str, Any]]:
    """A row for each system, the best first; see `_figure`.

    Args:
      scores: of each system; throughputs are per device too.
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
    """The highest passing rate or the best throughput, and how well it is known.

    A sweep tries the rates that one criterion needs. By another, `known` may be

    * coarsely: the rates between which it lies are further apart than the tolerance;
    * at least: it passed at every rate, or the throughput was best at the lowest or
      the highest rate;
    * below: it failed at every rate.

    Otherwise it is "yes". `monotone` says whether no rate failed below one that passed.
    """
    if criterion.target is None:
        best = best_rate(tried, tolerance, independent=independent)
        known = "yes" if best.bracketed else "at least"
        return {**dataclasses.asdict(best.interval), "known": known, "bound": None}
    found = estimate(tried, criterion.target, independent=independent)
    known = _known(found.pass_rps, found.fail_rps, tolerance)
    # Where nothing passed, or nothing failed, the bound is all there is to show.
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
