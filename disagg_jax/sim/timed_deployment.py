"""A deployment that exists as a table of the seconds of an engine's programs.

It decides as the engine does, down to the blocks that each request has, and rounds to
the same programs: without tokens that end requests, its timelines are the engine's. It
needs no engine, so it can be sent to another process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from disagg_jax.control.backend import Executor, Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import Observer, serve
from disagg_jax.control.run import Run
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.programs.buckets import Buckets
from disagg_jax.programs.shapes import StepShape
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.routing import Router, least_loaded, shortest_queue
from disagg_jax.sim.simulated_deployment import no_garbage_collection
from disagg_jax.work import Task, Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramTimes:
    """An `Executor` that looks up what a program takes, and runs nothing.

    Attributes:
      buckets: the shapes that each instance has programs for.
      steps: of each instance, by the shape of the step.
      transfers: by source, destination, blocks with padding, and whether the KV leaves
        while its prompt is computed.
    """

    buckets: Sequence[Buckets]
    steps: Sequence[Mapping[StepShape, Outcome]]
    transfers: Mapping[tuple[int, int, int, bool], Outcome]

    def run(self, work: Task) -> Outcome:
        if isinstance(work, Transfer):
            blocks = len(work.src_blocks)
            # Reading settles which blocks: an engine reads both lists as it starts.
            assert blocks == len(work.dst_blocks)
            size = self.buckets[work.src].transfer_size(blocks)
            return self.transfers[work.src, work.dst, size, work.step > 0]
        slices = list(work.slices)  # read once: they are made on reading
        return self.steps[work.instance][self.buckets[work.instance].step_shape(slices)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedDeployment:
    """Serves requests in the time that `times` says, one step at a time."""

    deployment: Deployment
    policies: Mapping[Role, Policy]
    memory: tuple[KVMemory, ...]  # of each instance
    times: Executor
    streams: bool = False  # whether KV leaves while the rest of its prompt is computed
    prefill_router: Router = shortest_queue
    decode_router: Router = least_loaded

    def run(self, requests: Iterable[Request], observer: Observer | None = None) -> Run:
        """Serve `requests` to the end, as `ServedDeployment` does; see `serve`."""
        lengths = [dataclasses.replace(request, prompt=None) for request in requests]
        controller = Controller(
            self.deployment,
            self.policies,
            self.memory,
            streams=self.streams,
            prefill_router=self.prefill_router,
            decode_router=self.decode_router,
        )
        backend = VirtualBackend(self.times)
        with no_garbage_collection():
            timelines = serve(controller, backend, lengths, observer=observer)
        return Run(
            timelines=timelines, end_s=backend.now_s(), busy_s=dict(backend.busy_s)
        )
