"""An engine and the policies it serves with: what the engine's experiments run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from disagg_jax.control.backend import Backend, Executor
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import Followers, Intervention, Observer, serve
from disagg_jax.control.run import Run
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import DurationRule, EngineExecutor, TimingExecutor
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.routing import Router, least_loaded, shortest_queue
from sharding.mesh import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedDeployment:
    """Serves requests on an engine, by the clock of this machine or the virtual clock.

    Attributes:
      engine: compiled, unless `executed` is False.
      prefill_router: picks the instance that computes a prompt; `decode_router` the one
        that pulls its KV.
      streams: whether KV leaves while the rest of its prompt is computed.
      timing: durations of work on the virtual clock; None is the wall clock.
      warm_up: whether a step that finds the caches cold runs once before it is timed;
        see `EngineExecutor`.
      executed: whether programs run. Without them a run on the virtual clock has equal
        timelines, but no tokens, if no token ends a request.
      around: wraps the executor of the virtual clock, to observe it.
    """

    engine: Engine
    policies: Mapping[Role, Policy]
    prefill_router: Router = shortest_queue
    decode_router: Router = least_loaded
    streams: bool = False
    timing: DurationRule | None = None
    warm_up: bool = False
    executed: bool = True
    around: Callable[[Executor], Executor] = lambda executor: executor

    @property
    def deployment(self) -> Deployment:
        return self.engine.deployment

    @property
    def memory(self) -> tuple[KVMemory, ...]:
        """The KV pool of each instance."""
        return self.engine.memory

    def controller(self) -> Controller:
        """Return a new controller of this deployment."""
        return Controller(
            self.deployment,
            self.policies,
            self.memory,
            prefill_router=self.prefill_router,
            decode_router=self.decode_router,
            streams=self.streams,
        )

    def backend(self) -> Backend:
        """Return a new backend, whose clock begins now."""
        if self.timing is None:
            return WallBackend(self.engine)
        if not self.executed:
            return VirtualBackend(TimingExecutor(self.engine, self.timing))
        executor = EngineExecutor(self.engine, self.timing, self.warm_up)
        return VirtualBackend(self.around(executor))

    def run(
        self,
        requests: Iterable[Request],
        interventions: Iterable[Intervention] = (),
        observer: Observer | None = None,
        followers: Followers | None = None,
        *,
        backend: Backend | None = None,
    ) -> Run:
        """Serve `requests` to the end, as `SimulatedDeployment` does; see `serve`.

        Args:
          backend: a new one of `self.backend()`, for an observer that reads its clock.

        Raises:
          ValueError: on a request that the engine cannot serve, before any work.
        """
        requests = list(requests)
        if self.executed:
            self.engine.check(requests)
        else:
            requests = [dataclasses.replace(r, prompt=None) for r in requests]
        controller = self.controller()
        with self.engine.serving() if self.executed else contextlib.nullcontext():
            backend = backend or self.backend()  # its clock begins when all is ready
            timelines = serve(
                controller, backend, requests, interventions, observer, followers
            )
        busy_s = backend.busy_s if isinstance(backend, VirtualBackend) else {}
        return Run(
            timelines=timelines,
            end_s=backend.now_s(),
            busy_s=dict(busy_s),
            totals=dict(self.engine.totals) if self.executed else None,
        )


def devices_needed(deployment: Deployment, *, shared: bool) -> int:
    """Return the devices that an engine takes; see `Engine.share_devices`.

    Raises:
      ValueError: on an instance that an engine does not run.
    """
    deployment.require_tp_pp_only("engine")
    if shared:
        return sum(spec.devices for spec in set(deployment.instances))
    return deployment.devices


def devices_for(deployment: Deployment, *, shared: bool) -> Sequence[Device]:
    """Return the devices of this machine; a shared one may stand for several.

    On the virtual clock programs run one at a time, so the time of an instance on a
    device of its own can be measured on a device that other instances have too. KV that
    moves from a device to itself is not copied: name a link for its time.
    """
    devices, needed = jax.devices(), devices_needed(deployment, shared=shared)
    alone = all(spec.parallelism.tp == 1 for spec in deployment.instances)
    if shared and alone and len(devices) < needed:
        return (devices * needed)[:needed]
    return devices
