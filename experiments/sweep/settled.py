"""Whether the timings of programs settle who is ahead: the search by halves of them.

Everything that follows from the seconds of programs is done anew with each half: the
targets, the step sizes and the goodputs. The requests are the same, so what differs
comes from the timings alone.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.metrics import estimate
from disagg_jax.search.rates import SearchPlan, search
from disagg_jax.sim.workers import Mapper
from experiments.configs.config import Config
from experiments.runs.saved_run import Point
from experiments.sweep.point import PointTask, score_point
from experiments.sweep.request_source import RequestSource
from experiments.sweep.targets import Target

SEEDS = 2  # of each search: all systems get the same requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfSearch:
    """A goodput to find near the one that all timings gave."""

    task: PointTask  # at the rate to begin with
    criterion: str
    plan: SearchPlan


def half_goodput(asked: HalfSearch) -> float:
    """Return the goodput, in requests/s of the whole deployment."""
    first = asked.task.point
    scores: dict[float, list[float]] = {}

    def evaluate(rate_rps: float) -> list[float]:
        scores[rate_rps] = [
            score_point(
                dataclasses.replace(
                    asked.task, point=Point(first.system, rate_rps, first.seed + i)
                ),
                asked.criterion,
            )
            for i in range(SEEDS)
        ]
        return scores[rate_rps]

    search(evaluate, first.rate_rps, asked.plan)
    return statistics.mean(estimate(scores, asked.plan.target).per_seed_rps)


def goodputs(
    config: Config,
    target: Target,
    source: RequestSource,
    begin_rps: Mapping[str, float],
    mapper: Mapper,
) -> Iterator[tuple[str, float]]:
    """Yield each system and its goodput per device by one half of the timings.

    Args:
      begin_rps: the goodput by all timings, of the whole deployment.
    """
    passes = target.criteria[config.criterion].target
    assert passes is not None  # of a throughput nothing is asked
    tolerance = config.search.tolerance
    plan = dataclasses.replace(config.search, target=passes, growth=1 + tolerance)
    asked = [
        HalfSearch(
            task=PointTask(
                served=timed,
                source=source,
                point=Point(name, begin_rps[name], config.seed),
                slo=target.slo,
                criteria={config.criterion: target.criteria[config.criterion]},
                virtual=True,
            ),
            criterion=config.criterion,
            plan=plan,
        )
        for name, timed in target.timed.items()
    ]
    found = mapper(half_goodput, asked)
    for (name, timed), rps in zip(target.timed.items(), found, strict=True):
        yield name, rps / timed.deployment.devices


def verdict(halves: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return who is ahead by each half of the timings, and whether both agree."""
    winners = [max(half, key=lambda name: half[name]) for half in halves]
    return {
        "settled": len(set(winners)) == 1,
        "winners": winners,
        "rps_per_device": [dict(half) for half in halves],
    }
