"""A deployment that exists only as durations: what the simulator runs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Generator, Iterable, Mapping

from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import Followers, Intervention, Observer, serve
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling.interface import Policy
from disagg_jax.sim.clock import VirtualBackend
from disagg_jax.sim.cost.linear import CostExecutor, DeploymentCost


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """What came of one run."""

    timelines: list[Timeline]  # in order of arrival
    end_s: float
    # Seconds of work: (instance,) is its first stage, (instance, k) a later one; links
    # as `Network` names them, or (-3, src, dst).
    busy_s: Mapping[tuple[int, ...], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedDeployment:
    """Instances, policies, memory and durations; it runs any requests.

    Attributes:
      memory: of each instance, in the deployment's order.
      streams: whether KV leaves while the rest of its prompt is computed.
      spans: whether several decode iterations are taken at once. It changes nothing
        but the speed.
      places: whether it is settled where in the pool everybody's blocks are, as on an
        engine, and the cost model is told in `StepLoad.front`. Slow, and not for spans.

    Raises:
      ValueError: on `places` with `spans`.
    """

    deployment: Deployment
    policies: Mapping[Role, Policy]
    memory: tuple[KVMemory, ...]
    cost: DeploymentCost
    streams: bool = False
    spans: bool = True
    places: bool = False

    def __post_init__(self) -> None:
        ok = not (self.places and self.spans)
        require(ok, "places: expected spans=False", self.spans)

    def controller(self) -> Controller:
        """A new controller of this deployment."""
        return Controller(
            self.deployment,
            self.policies,
            self.memory,
            streams=self.streams,
            spans=self.spans,
        )

    def run(
        self,
        requests: Iterable[Request],
        interventions: Iterable[Intervention] = (),
        observer: Observer | None = None,
        controller: Controller | None = None,
        followers: Followers | None = None,
    ) -> SimulatedRun:
        """Serves `requests` to the end.

        Args:
          controller: a new one of `self.controller()`, for an observer that reads it.
          followers: requests that arrive because of what happened, see `serve`.
        """
        controller = controller or self.controller()
        backend = VirtualBackend(CostExecutor(self.cost, self.places))
        with _no_garbage_collection():
            timelines = serve(
                controller, backend, requests, interventions, observer, followers
            )
        return SimulatedRun(
            timelines=timelines, end_s=backend.now_s(), busy_s=dict(backend.busy_s)
        )


@contextlib.contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Keep the collector of reference cycles out of a run.

    A run makes next to none, and a collection visits every object there is: with 2,048
    instances that was a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
