"""A deployment that exists only as durations: what the simulator runs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Generator, Iterable, Mapping

from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import Followers, Intervention, Observer, serve
from disagg_jax.control.run import Run
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.routing import Router, least_loaded, shortest_queue
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.cost.interface import DeploymentCost


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedDeployment:
    """Serves requests on instances whose work takes the time that a cost model says.

    Attributes:
      memory: of each instance, in the deployment's order.
      prefill_router: picks the instance that computes a prompt; `decode_router` the one
        that pulls its KV.
      streams: whether KV leaves while the rest of its prompt is computed.
      spans: whether several decode iterations are taken at once. Results are equal;
        only the speed changes.
      counts_blocks: whether steps tell the KV blocks that their decodes attend to, for
        a cost model that rounds to an engine's programs (`StepLoad.decode_blocks`).
        This needs `spans=False`.

    Raises:
      ValueError: on `counts_blocks` with `spans`.
    """

    deployment: Deployment
    policies: Mapping[Role, Policy]
    memory: tuple[KVMemory, ...]
    cost: DeploymentCost
    prefill_router: Router = shortest_queue
    decode_router: Router = least_loaded
    streams: bool = False
    spans: bool = True
    counts_blocks: bool = False

    def __post_init__(self) -> None:
        ok = not (self.counts_blocks and self.spans)
        require(ok, "counts_blocks: expected spans=False", self.spans)

    def controller(self) -> Controller:
        """Return a new controller of this deployment."""
        return Controller(
            self.deployment,
            self.policies,
            self.memory,
            prefill_router=self.prefill_router,
            decode_router=self.decode_router,
            streams=self.streams,
            spans=self.spans,
            counts_blocks=self.counts_blocks,
        )

    def run(
        self,
        requests: Iterable[Request],
        interventions: Iterable[Intervention] = (),
        observer: Observer | None = None,
        followers: Followers | None = None,
        *,
        controller: Controller | None = None,
    ) -> Run:
        """Serve `requests` to the end, as `ServedDeployment` does; see `serve`.

        Prompts count by their lengths: there are no tokens.

        Args:
          controller: a new one of `self.controller()`, for an observer that reads it.
        """
        controller = controller or self.controller()
        backend = VirtualBackend(CostExecutor(self.cost))
        lengths = map(_length_only, requests)
        with no_garbage_collection():
            timelines = serve(
                controller, backend, lengths, interventions, observer, followers
            )
        return Run(
            timelines=timelines, end_s=backend.now_s(), busy_s=dict(backend.busy_s)
        )


def _length_only(request: Request) -> Request:
    if request.prompt is None:
        return request
    return dataclasses.replace(request, prompt=None)


@contextlib.contextmanager
def no_garbage_collection() -> Generator[None]:
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
