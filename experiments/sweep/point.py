"""One run of a sweep: the requests of a point are served, and their metrics kept."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from disagg_jax import metrics
from disagg_jax.control.loop import Observer
from disagg_jax.control.run import Run, StepTotals
from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import Criterion
from disagg_jax.metrics.summary import summarise
from disagg_jax.request import Request
from experiments.runs.saved_run import Point
from experiments.sweep.request_source import RequestSource


class Serving(Protocol):
    """Serves requests: an engine, or the durations of its programs alone."""

    @property
    def deployment(self) -> Deployment: ...

    def run(
        self, requests: Iterable[Request], *, observer: Observer | None = None
    ) -> Run: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointTask:
    """A point to run; it can be sent to another process if `served` can."""

    served: Serving
    source: RequestSource
    point: Point
    slo: SLO
    criteria: Mapping[str, Criterion]
    virtual: bool  # whether its clock tells the busy time of devices


def run_point(task: PointTask) -> dict[str, Any]:
    """Return the metrics of a point."""
    requests = task.source(task.point.rate_rps, task.point.seed)
    return point_metrics(task, task.served.run(requests, observer=None))


def score_point(task: PointTask, criterion: str) -> float:
    """Return the score of a point by one criterion."""
    requests = task.source(task.point.rate_rps, task.point.seed)
    return task.criteria[criterion].score(task.served.run(requests).timelines)


def point_metrics(task: PointTask, run: Run) -> dict[str, Any]:
    """Return the metrics of a run, with its score by every criterion."""
    deployment = task.served.deployment
    shares = run.busy_shares(deployment) if task.virtual else None
    return {
        **summarise(run.timelines, task.slo, deployment.devices),
        "steady": metrics.is_steady(run.timelines),
        "executed": run.totals is not None,
        **padding(run.totals or {}),
        **_busy(deployment, shares),
        "criteria": {
            name: criterion.score(run.timelines)
            for name, criterion in task.criteria.items()
        },
    }


def padding(totals: Mapping[str, StepTotals]) -> dict[str, float | None]:
    """Return the share of tokens that were padding, by kind of step."""
    shares: dict[str, float | None] = {}
    for kind in ("prefill", "mixed", "decode"):
        done = totals.get(kind)
        shares[f"padding_{kind}"] = 1 - done.tokens / done.width if done else None
    return shares


def _busy(
    deployment: Deployment, shares: Sequence[Sequence[float]] | None
) -> dict[str, float | None]:
    """Return the busy share of each role's devices, and of its idlest stage."""
    found: dict[str, float | None] = {}
    for role in Role:
        stages = [s for i in deployment.of(role) for s in shares[i]] if shares else []
        found[f"busy_{role}"] = statistics.mean(stages) if stages else None
        found[f"busy_{role}_least"] = min(stages, default=None)
    return found
