"""The summary of a sweep: what `summary.json` says of one target."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_jax import metrics
from disagg_jax.metrics import (
    BestRate,
    GoodputEstimate,
    Inversion,
    best_rate,
    estimate,
    margin,
)
from disagg_jax.metrics.criteria import Criterion
from disagg_jax.metrics.ranking import rank
from disagg_jax.scheduling import find_system

Runs = Mapping[float, Sequence[dict[str, Any]]]  # rate -> the metrics of each seed

# values of each seed -> mean, low and high
Across = Callable[[Sequence[float]], dict[str, float | None]]

RATE_DIGITS = 4  # to which rates are rounded
RATIO_BASE = "vllm_v0"  # ratios are over it where it takes part, else over the first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges systems by one criterion, with intervals of one confidence."""

    name: str  # of the criterion that was searched for
    criterion: Criterion
    tolerance: float  # of the search
    independent: bool  # whether the seeds' runs are independent samples
    confidence: float

    @property
    def apart(self) -> float:
        """Return how far apart the ends of a resolved goodput may be, as a factor.

        The search tries rates a tolerance apart, so it is two of them. Both rates are
        rounded, each by half of its last digit at most.
        """
        return (1 + self.tolerance) ** 2 * (1 + 10 ** (1 - RATE_DIGITS))

    def goodput(self, runs: Runs) -> GoodputEstimate:
        """Estimate the goodput from runs at several rates."""
        assert self.criterion.target is not None
        return estimate(
            scores_of(self.name, runs),
            self.criterion.target,
            independent=self.independent,
            confidence=self.confidence,
            apart=self.apart,
        )

    def best(self, runs: Runs) -> BestRate:
        """Return the rate at which a throughput is highest."""
        scores = scores_of(self.name, runs)
        return best_rate(scores, self.tolerance, independent=self.independent)

    def judged_rps(self, runs: Runs) -> float | None:
        """Return the highest passing rate, or the best for a throughput."""
        if self.criterion.target is None:
            return self.best(runs).rate_rps
        return self.goodput(runs).pass_rps

    def across(self, values: Sequence[float]) -> dict[str, float | None]:
        """Return the mean across seeds, and an interval if they are independent."""
        found = metrics.rate_interval(
            values, independent=self.independent, confidence=self.confidence
        )
        return dataclasses.asdict(found)


def system_summary(
    judge: Judge, deployment: str, devices: int, runs: Runs
) -> dict[str, Any]:
    """Return what was found of a system.

    Args:
      runs: by rate; those with the most seeds decide, others are of a first search.
    """
    decisive = with_most_seeds(runs)
    if judge.criterion.target is None:
        found = {"throughput": _throughput(judge, decisive, devices)}
    else:
        found = {"goodput": _goodput(judge, decisive, devices)}
    return {
        "deployment": deployment,
        "devices": devices,
        **found,
        "points": [
            _point_row(rate, points, judge.across) for rate, points in runs.items()
        ],
    }


def with_most_seeds(runs: Runs) -> Runs:
    """Return the rates that were run with the most seeds."""
    most = max(map(len, runs.values()))
    return {rate: points for rate, points in runs.items() if len(points) == most}


def ranked(
    judge: Judge,
    criterion: tuple[str, Criterion],
    runs: Mapping[str, Runs],
    devices: Mapping[str, int],
) -> dict[str, Any]:
    """Return a criterion's definition, and the order of the systems by it.

    By the criterion that was searched for, the runs with the most seeds decide. By
    others all rates count, with the seeds that each of them has.
    """
    name, good = criterion
    scores: dict[str, dict[float, list[float]]] = {}
    for system, found in runs.items():
        each = devices[system] if good.target is None else 1
        fewest = min(map(len, found.values()))
        if name == judge.name:
            kept = with_most_seeds(found)
        else:
            kept = {rate: points[:fewest] for rate, points in found.items()}
        scores[system] = {
            rate / devices[system]: [score / each for score in values]
            for rate, values in scores_of(name, kept).items()
        }
    order = rank(good, scores, judge.tolerance, independent=judge.independent)
    return {
        "definition": str(good),
        "target": good.target,
        "unit": f"{good.unit} per device",
        "rank": order,
    }


def pairs(judge: Judge, systems: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each pair of systems, the better first, and whether they are told apart.

    They are if the interval of their ratio, paired by seed, excludes 1.
    """
    order = sorted(systems, key=lambda name: -statistics.mean(per_seed(systems[name])))
    found: list[dict[str, Any]] = []
    for ahead, behind in itertools.combinations(order, 2):
        between = margin(
            per_seed(systems[ahead]),
            per_seed(systems[behind]),
            independent=judge.independent,
            confidence=judge.confidence,
        )
        ratio = dataclasses.asdict(between.ratio) if between.ratio else None
        found.append(
            {
                "ahead": ahead,
                "behind": behind,
                "ratio": ratio,
                "told_apart": between.clear,
            }
        )
    return found


def scores_of(criterion: str, runs: Runs) -> dict[float, list[float]]:
    """Return the scores of each seed by one criterion, by rate."""
    return {
        rate: [run["criteria"][criterion] for run in points]
        for rate, points in runs.items()
    }


def _goodput(judge: Judge, runs: Runs, devices: int) -> dict[str, Any]:
    found = judge.goodput(runs)

    def per_device(value: float | None) -> float | None:
        return None if value is None else value / devices

    at_pass = runs[found.pass_rps] if found.pass_rps else None
    return {
        "goodput_rps_per_device": {
            key: per_device(value)
            for key, value in dataclasses.asdict(found.interval).items()
        },
        "per_seed_rps_per_device": [rate / devices for rate in found.per_seed_rps],
        "pass_rps_per_device": per_device(found.pass_rps),
        "fail_rps_per_device": per_device(found.fail_rps),
        "bracketed": found.bracketed,
        "resolved": found.resolved,
        "inversion": _inversion(found.inversion, devices),
        "steady": _steady(at_pass) if at_pass else None,
        "at_pass_rate": _mean_metrics(at_pass) if at_pass else None,
    }


def _inversion(found: Inversion | None, devices: int) -> dict[str, Any] | None:
    """Return where attainment is not monotone; see `GoodputEstimate`."""
    if found is None:
        return None
    return {
        "fail_rps_per_device": found.fail_rps / devices,
        "fail_score": found.fail_score,
        "pass_rps_per_device": found.pass_rps / devices,
        "pass_score": found.pass_score,
        "text": found.text(devices),
    }


def _throughput(judge: Judge, runs: Runs, devices: int) -> dict[str, Any]:
    found = judge.best(runs)
    return {
        "max_throughput_per_device": {
            key: None if value is None else value / devices
            for key, value in dataclasses.asdict(found.interval).items()
        },
        "per_seed_per_device": [value / devices for value in found.per_seed],
        "best_rps_per_device": found.rate_rps / devices,
        "bracketed": found.bracketed,
        "steady": _steady(runs[found.rate_rps]),
        "at_best_rate": _mean_metrics(runs[found.rate_rps]),
    }


def _point_row(
    rate: float, runs: Sequence[dict[str, Any]], across: Across
) -> dict[str, Any]:
    return {
        "rate_rps": rate,
        "rate_rps_per_device": rate / runs[0]["devices"],
        **{
            key: across([run[key] for run in runs])
            for key in ("attainment", "attainment_ttft", "attainment_tpot")
        },
        "criteria": {
            name: across([run["criteria"][name] for run in runs])
            for name in runs[0]["criteria"]
        },
        "num_seeds": len(runs),
        "steady": _steady(runs),
        "metrics": _mean_metrics(runs),
    }


def _steady(runs: Sequence[dict[str, Any]]) -> bool:
    """Return whether 9 of 10 runs are steady: one may be unlucky near capacity."""
    return sum(run["steady"] for run in runs) >= 0.9 * len(runs)


def _mean_metrics(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return each metric's mean over the seeds; None if a run lacks it."""
    means: dict[str, float | None] = {}
    for key, value in runs[0].items():
        if isinstance(value, bool | dict):
            continue
        values = [run[key] for run in runs]
        if key.startswith("padding"):  # known where programs ran
            values = [value for value in values if value is not None] or [None]
        means[key] = None if None in values else statistics.mean(values)
    return means


def ratios(systems: Mapping[str, Any], across: Across) -> dict[str, Any]:
    """Return each system's goodput or throughput over the base's, paired by seed."""
    over = find_system(RATIO_BASE, systems)
    if over not in systems:
        over = next(iter(systems))
    base = per_seed(systems[over])
    found: dict[str, Any] = {}
    for name, system in systems.items():
        if name == over or not all(base):
            continue
        paired = [
            rate / other for rate, other in zip(per_seed(system), base, strict=True)
        ]
        found[f"{name}/{over}"] = {**across(paired), "per_seed": paired}
    return found


def per_seed(system: Mapping[str, Any]) -> list[float]:
    """Return the goodput or throughput per device of each seed."""
    if "throughput" in system:
        return system["throughput"]["per_seed_per_device"]
    return system["goodput"]["per_seed_rps_per_device"]
