"""Serves requests on simulated deployments, and says what became of them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.control.loop import Observer
from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment, RequestLimit
from disagg_jax.errors import require
from disagg_jax.metrics import SLO
from disagg_jax.metrics.summary import summarise
from disagg_jax.request import Request, Status
from disagg_jax.runlog import StageShares, StepKinds
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.sim import SimulatedDeployment, Simulation
from disagg_jax.work import Event, Work
from experiments.runs.folder import plain

NO_TARGETS = SLO(ttft_s=math.inf, tpot_s=math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A deployment, and the requests that come to it."""

    simulated: SimulatedDeployment
    system: str  # whose policies serve
    checked: str = ""  # how far its durations were from measurements, in words
    rate_rps: float | None  # of the whole deployment; None: the times of a trace
    requests: Sequence[Request]  # in order of arrival

    @property
    def deployment(self) -> Deployment:
        """Return the instances that serve."""
        return self.simulated.deployment

    @property
    def offered_rps(self) -> float | None:
        """Return the rate that was asked for, or that of the trace's own times.

        It is None where all requests arrive at one time.
        """
        if self.rate_rps is not None:
            return self.rate_rps
        span_s = self.requests[-1].arrival_s - self.requests[0].arrival_s
        return (len(self.requests) - 1) / span_s if span_s else None

    @property
    def name(self) -> str:
        """Return the name of its folder among several."""
        instances = str(self.deployment).replace(":", "-").replace(",", "_")
        rate = "own-times" if self.rate_rps is None else f"{self.rate_rps!r}rps"
        return f"{instances}_{rate}"

    def serve(self, log: Observer | None = None) -> Served:
        """Simulate it.

        Args:
          log: another observer of the run, such as an event log.
        """
        kinds = StepKinds()

        def both(now_s: float, events: Sequence[Event], works: Sequence[Work]) -> None:
            kinds(now_s, events, works)
            if log is not None:
                log(now_s, events, works)

        run = self.simulated.run(self.requests, observer=both)
        return Served(case=self, run=run, stages=kinds.shares(self.deployment, run))


def list_cases(
    simulation: Simulation,
    deployments: Sequence[Deployment],
    requests: Mapping[float | None, Sequence[Request]],
) -> list[Case]:
    """Return a case for each deployment and rate.

    Args:
      requests: by rate, in requests/s of the whole deployment; see `Case`.

    Raises:
      ValueError: on one deployment twice, or one that cannot be simulated.
    """
    different = len(set(deployments)) == len(deployments)
    got = "; ".join(map(str, deployments))
    require(different, "--deployment: expected different ones", got)
    built = [simulation.build(deployment) for deployment in deployments]
    return [
        Case(
            simulated=simulated,
            system=_system_on(simulated.deployment, simulation),
            checked=simulation.checked,
            rate_rps=rate,
            requests=asked,
        )
        for simulated in built
        for rate, asked in requests.items()
    ]


def _system_on(deployment: Deployment, simulation: Simulation) -> str:
    """Name the listed system whose policies serve, or else the policies."""
    policies, engine = simulation.policies, simulation.engine
    serving = {role: p for role, p in policies.items() if deployment.of(role)}
    known = {name: engine.limit(s) if engine else s for name, s in SYSTEMS.items()}
    listed = [name for name, system in known.items() if system == serving]
    return listed[0] if listed else "+".join(type(p).__name__ for p in serving.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A case that was simulated."""

    case: Case
    run: Run
    stages: Sequence[Sequence[StageShares]]  # of each instance

    @property
    def refused(self) -> dict[str, int]:
        """Count the refused requests by the limit that they exceed."""
        memories = dict.fromkeys(self.case.simulated.memory)  # as the fleet asks them
        found = collections.Counter[RequestLimit]()
        for timeline in self.run.timelines:
            if timeline.status is Status.REFUSED:
                asked = timeline.request
                sizes = asked.prompt_tokens, asked.max_tokens
                limits = (memory.exceeded(*sizes) for memory in memories)
                found[next(limit for limit in limits if limit)] += 1
        return {limit.value: found[limit] for limit in RequestLimit}

    def summary(self, slo: SLO) -> dict[str, Any]:
        """Return the run as JSON, under vLLM's keys where it has them."""
        deployment = self.case.deployment
        return {
            "deployment": str(deployment),
            "system": self.case.system,
            "checked": self.case.checked,
            "request_rate": self.case.offered_rps,
            "slo": plain(slo),
            **summarise(self.run.timelines, slo, deployment.devices),
            "refused": self.refused,
            "busy_instances": [
                {"instance": str(spec), "stages": [*map(dataclasses.asdict, stages)]}
                for spec, stages in zip(deployment.instances, self.stages, strict=True)
            ],
            "busy_links": self.run.busy_links(),
        }
