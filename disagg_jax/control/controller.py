"""The controller: events in, work out. No clock, no I/O, no JAX.

Here are the events it hears, the plans it makes, and every stamp on a timeline. The
moves of a request among the instances are in `fleet`. Equal events always lead to equal
decisions, whatever executes them.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.control.fleet import Fleet
from disagg_jax.control.instance_state import (
    InFlight,
    InstanceState,
    StepInFlight,
    TransferInFlight,
)
from disagg_jax.control.plan_check import check_plan
from disagg_jax.control.request_state import (
    DecodeBatch,
    Place,
    RequestState,
    in_order,
)
from disagg_jax.control.spans import SpanProgress, Spans, no_progress
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.request import Status, Timeline
from disagg_jax.scheduling.interface import Policy, PullPolicy
from disagg_jax.scheduling.routing import Router, least_loaded, shortest_queue
from disagg_jax.work import (
    Arrived,
    Cancelled,
    Done,
    Down,
    Event,
    Progress,
    StageFree,
    Step,
    Straggle,
    Up,
    Work,
)


class Controller:
    """Schedules requests on a deployment by the policies of one system.

    Attributes:
      instances: the state of every instance, for reading.
      timelines: what happened to each request, in arrival order.
      ended: the timelines of those requests that ended in the last turn.

    Args:
      deployment: the instances.
      policies: a policy for every role in the deployment; the decode role's must be a
        `PullPolicy`.
      memory: KV memory of each instance, in the deployment's order.
      prefill_router: picks the prefill or colocated instance of an arrival.
      decode_router: picks the decode instance that pulls a prefilled request.
      streams: send KV while the rest of its prompt is computed, chunk by chunk and
        layer group by layer group, if the decode side has room then.
      spans: plan all decode iterations at once until something can change the plan. The
        results are the same and come faster, but need a backend that simulates.
      counts_blocks: let each step tell the KV blocks that its decodes attend to; see
        `StepLoad`. Not for spans, in which they change.

    Raises:
      ValueError: if a role has no policy, or `memory` does not match the deployment,
        or prefill and decode have blocks of different sizes.
    """

    def __init__(
        self,
        deployment: Deployment,
        policies: Mapping[Role, Policy],
        memory: Sequence[KVMemory],
        *,
        prefill_router: Router = shortest_queue,
        decode_router: Router = least_loaded,
        streams: bool = False,
        spans: bool = False,
        counts_blocks: bool = False,
    ):
        self._in_flight: dict[int, InFlight] = {}
        self._spans = Spans(self._in_flight, self._end_span)
        self._fleet = Fleet(
            deployment, memory, prefill_router, decode_router, self._spans.catch_up
        )
        self.instances: Sequence[InstanceState] = self._fleet.instances
        for spec in deployment.instances:
            if spec.role not in policies:
                raise ValueError(
                    f"deployment '{deployment}' has {spec.role} instances, but the "
                    f"system has policies for {', '.join(sorted(policies))} only"
                )
        self._decodes_apart = bool(deployment.of(Role.DECODE))
        if self._decodes_apart:
            self._admits_pull = typing.cast(
                PullPolicy, policies[Role.DECODE]
            ).admits_pull
        self._policies = [policies[i.spec.role] for i in self.instances]
        self._limits = [policy.limits for policy in self._policies]
        self._plans_spans, self._streams = spans, streams
        self._counts_blocks = counts_blocks
        self._requests: dict[int, RequestState] = {}
        self._to_stream: list[StepInFlight] = []  # new steps with prompts
        self._last_work_id = 0
        self._active = 0  # requests that arrived and have not ended
        self.timelines: list[Timeline] = []
        self.ended: list[Timeline] = []
        # A table is faster than a match, which is felt with several events a turn.
        self._on: dict[type[Event], Callable[[float, Any], None]] = {
            Arrived: self._arrived,
            Done: self._done,
            Progress: self._progress,
            StageFree: self._stage_free,
            Cancelled: self._cancelled,
            Down: self._down,
            Straggle: self._straggle,
            Up: self._up,
        }

    @property
    def in_flight(self) -> int:
        """Number of pieces of work that were submitted and are not done."""
        return len(self._in_flight)

    def step(
        self,
        now_s: float,
        events: Sequence[Event],
        progress: SpanProgress = no_progress,
    ) -> list[Work]:
        """Apply `events` in their order, then plan all work that can start.

        Args:
          progress: tells how far a span is when the controller looks at its instance.
            Without it, `events` must begin with the progress of every span.

        Raises:
          RuntimeError: on an impossible state: an unknown or repeated Done, a block
            freed twice, requests that wait for ever.
        """
        spans = self._spans
        spans.now_s, spans.progress_of, spans.gone_on = now_s, progress, False
        if self.ended:
            self.ended = []
        for event in events:
            self._on[type(event)](now_s, event)
        works: list[Work] = []
        if spans.disturbed:
            spans.cut(works)
        # Only preemption makes room: it frees blocks that a pull waits for, and fills a
        # queue. So go round in a fixed order until no instance makes room.
        made_room = True
        while made_room:
            if self._decodes_apart:
                self._start_transfers(now_s, works)
            made_room = self._start_steps(now_s, works)
        if self._counts_blocks:
            for work in works:
                if isinstance(work, Step):
                    flight = typing.cast(StepInFlight, self._in_flight[work.id])
                    work.load.decode_blocks = flight.batch.attended
        if self._active and not self._in_flight:
            self._check_alive()
        return works

    def _next_work_id(self) -> int:
        self._last_work_id += 1
        return self._last_work_id

    # -- events ---------------------------------------------------------------------

    def _arrived(self, now_s: float, event: Arrived) -> None:
        request = event.request
        if request.id in self._requests:
            raise RuntimeError(f"request {request.id} arrived twice")
        timeline = Timeline(request=request)
        state = RequestState(request, len(self.timelines), timeline)
        self._requests[request.id] = state
        self.timelines.append(timeline)
        timeline.error = self._fleet.rejection_reason(request)
        if timeline.error:
            timeline.status, timeline.end_s = Status.REFUSED, now_s
            self.ended.append(timeline)
            return
        self._active += 1
        self._enqueue(state)

    def _done(self, now_s: float, event: Done) -> None:
        flight = self._in_flight.pop(event.work, None)
        if flight is None:
            raise RuntimeError(f"work {event.work} is done but was not in flight")
        if isinstance(flight, TransferInFlight):
            self._transfer_done(flight, event)
        else:
            self._step_done(flight, event)

    def _step_done(self, flight: StepInFlight, event: Done) -> None:
        """End a step: cache its chunks, stamp its tokens, free its stage."""
        batch, end_s = flight.batch, event.end_s
        if flight.prompts:
            self._fleet.finish_chunks(flight)
        if event.tokens:
            _check_tokens(flight, event)
        tokens = iter(event.tokens)
        if flight.prompts:
            self._place_prompts(flight, tokens, end_s)
        if batch.members:
            batch.advance(event.ends_s or (end_s,))
            batch.stepping = False  # so that requests that end leave it at once
            if event.tokens:
                self._receive_decoded(batch, tokens, end_s)
            for state in batch.finished:
                if state.active:
                    self._end(state, Status.FINISHED, end_s)
        self._step_over(flight)

    def _place_prompts(
        self, flight: StepInFlight, tokens: Iterator[int], end_s: float
    ) -> None:
        """Move each prompt of a finished step to its next place."""
        instance = self.instances[flight.work.instance]
        for state in flight.prompts:
            complete = state.complete
            token = next(tokens, None) if complete else None
            if complete and state.pull_target is not None:
                self._stream_on(state, token, end_s)
            elif not state.active:  # cancelled meanwhile
                self._fleet.let_go(state)
            elif not complete:
                self._fleet.set_aside(state)
            elif self._first_token(state, token, end_s):
                if instance.spec.role is Role.PREFILL:
                    self._fleet.park(state)
                else:
                    instance.ready.join(state)  # it decodes where it is

    def _stream_on(self, state: RequestState, token: int | None, end_s: float) -> None:
        """Let a computed prompt wait for its KV, which is on the way.

        A request that was cancelled is dropped when its KV has landed.
        """
        self._fleet.stream_on(state)
        if state.active:
            if state.timeline.decode_start_s is None:
                state.timeline.transfer_start_s = end_s
            self._first_token(state, token, end_s)

    def _first_token(
        self, state: RequestState, token: int | None, end_s: float
    ) -> bool:
        """Record the token that a step produced. Return True if the request goes on."""
        state.add_token()
        state.timeline.token_s.append(end_s)
        if token is not None:
            self._receive(state, token, end_s)
        elif state.request.prompt is not None:
            raise RuntimeError(f"request {state.id}: a step returned no token")
        if not state.active:
            return False
        if state.generated < state.request.max_tokens:
            return True
        self._end(state, Status.FINISHED, end_s)
        return False

    def _receive_decoded(
        self, batch: DecodeBatch, tokens: Iterator[int], end_s: float
    ) -> None:
        for state in list(batch.members):
            token = next(tokens)
            if state.active:
                self._receive(state, token, end_s)

    def _step_over(self, flight: StepInFlight) -> None:
        """Free the stage of a step and return its decodes to the ready queue."""
        for state in flight.cancelled:
            self._fleet.remove(state)
        instance = self.instances[flight.work.instance]
        if instance.step is flight:
            instance.step = None
        else:
            del instance.downstream[flight.work.id]
        instance.rejoin_ready(flight.batch)
        self._fleet.touch(instance)

    def _end_span(self, flight: StepInFlight) -> None:
        """End a span before its planned end; no Done of it follows."""
        del self._in_flight[flight.work.id]
        self._step_over(flight)

    def _receive(self, state: RequestState, token: int, end_s: float) -> None:
        state.timeline.tokens.append(token)
        if state.request.stops_at(token):
            self._end(state, Status.FINISHED, end_s)

    def _stage_free(self, now_s: float, event: StageFree) -> None:
        work = event.work
        flight = self._in_flight.get(work)
        if not isinstance(flight, StepInFlight):
            raise RuntimeError(f"work {work} leaves a stage but is no step in flight")
        instance = self.instances[flight.work.instance]
        if instance.step is not flight:
            raise RuntimeError(f"step {work} leaves the first stage twice")
        instance.step, instance.downstream[work] = None, flight
        self._fleet.touch(instance)

    def _progress(self, now_s: float, event: Progress) -> None:
        flight = self._in_flight.get(event.work)
        if not isinstance(flight, StepInFlight):
            raise RuntimeError(
                f"work {event.work} makes progress but is no span in flight"
            )
        self._spans.progress(flight, now_s, event.ends_s)

    def _transfer_done(self, flight: TransferInFlight, event: Done) -> None:
        state, timeline = flight.state, flight.state.timeline
        if flight.work.step in self._in_flight:
            raise RuntimeError(f"request {state.id}: KV landed before it was computed")
        timeline.transfer_bytes += event.bytes
        state.transfers_in_flight -= 1
        if state.transfers_in_flight or state.place is not Place.MOVING:
            return  # more KV is on the way, or to be computed
        if not state.active:  # cancelled meanwhile
            _stamp_broken_transfer(timeline)
            self._fleet.remove(state)
            return
        if timeline.decode_start_s is None:
            timeline.transfer_end_s = event.end_s
        self._fleet.finish_transfer(state)
        self._spans.disturb(self._fleet.at(state.instance))

    def _cancelled(self, now_s: float, event: Cancelled) -> None:
        state = self._requests.get(event.request)
        if state is None:
            raise RuntimeError(f"cancelled request {event.request} never arrived")
        if state.active:
            if state.instance is not None:
                self._spans.disturb(self.instances[state.instance])
            self._end(state, Status.CANCELLED, now_s)

    def _straggle(self, now_s: float, event: Straggle) -> None:
        self._spans.disturb(self.instances[event.instance])

    def _up(self, now_s: float, event: Up) -> None:
        self._fleet.set_up(self.instances[event.instance], True)
        self._fleet.route_stranded()

    def _down(self, now_s: float, event: Down) -> None:
        """Drop the KV and the work of an instance; its requests go on elsewhere."""
        lost = self.instances[event.instance]
        self._spans.catch_up(lost)
        lost.step = None
        lost.downstream.clear()
        self._fleet.set_up(lost, False)
        touched = {*lost.waiting, *lost.running, *lost.partial}
        touched |= {*lost.parked.values(), *lost.pull_queue, *lost.arriving.values()}
        for work_id, flight in list(self._in_flight.items()):
            if lost.id in flight.work.instances:
                del self._in_flight[work_id]
                touched.update(flight.states)
                if isinstance(flight, TransferInFlight):
                    _stamp_broken_transfer(flight.state.timeline)
        earliest_first = in_order(touched)
        # If only the receiving side is lost, the KV can go elsewhere; a prompt that is
        # still being computed is parked when it is done.
        for state in earliest_first:
            stepping = state.place is Place.STEPPING
            if state.instance != lost.id and (state.active or stepping):
                self._fleet.drop_target(state)
                if state.place is Place.PARKED:
                    self._fleet.assign_target(state)
        # Latest first: each goes to the front of a queue, where the earliest ends.
        for state in reversed(earliest_first):
            wanted = state.active or state.place is Place.STEPPING
            if state.instance == lost.id or not wanted:
                self._lose(now_s, state)
        if lost.blocks.held_by:
            raise RuntimeError(f"lost instance {lost.id} still has KV of requests")

    def _lose(self, now_s: float, state: RequestState) -> None:
        """Remove a request without its KV; queue it again unless it was cancelled."""
        had_kv = state.place is not Place.WAITING
        self._fleet.remove(state)
        if state.active:
            if had_kv:
                state.timeline.dropped_s.append(now_s)
            self._enqueue(state, front=True)

    def _end(self, state: RequestState, status: Status, now_s: float) -> None:
        """End a request; work in flight for it keeps its blocks until done."""
        if state.place not in (Place.STEPPING, Place.MOVING):
            self._fleet.let_go(state)
        elif state.batch is not None and state.instance is not None:
            state.batch.settle(state)
            flights = self.instances[state.instance].steps
            flight = next(f for f in flights if f.batch is state.batch)
            flight.cancelled += (state,)
        state.timeline.status, state.timeline.end_s = status, now_s
        self.ended.append(state.timeline)
        self._active -= 1

    # -- plans ----------------------------------------------------------------------

    def _start_transfers(self, now_s: float, works: list[Work]) -> None:
        touched = self._fleet.touched
        for id in sorted(touched) if len(touched) > 1 else tuple(touched):
            dst = self.instances[id]
            if not dst.pull_queue:
                continue
            self._spans.catch_up(dst)
            while (
                dst.up and dst.pull_queue and self._admits_pull(dst, dst.pull_queue[0])
            ):
                state = dst.pull_queue[0]
                transfer = self._fleet.start_transfer(self._next_work_id(), state)
                self._in_flight[transfer.id] = TransferInFlight(transfer, state)
                works.append(transfer)
                if state.timeline.decode_start_s is None:
                    state.timeline.transfer_start_s = now_s
                self._spans.check(dst)
        if self._spans.disturbed:
            self._spans.cut(works)

    def _start_steps(self, now_s: float, works: list[Work]) -> bool:
        """Start all steps that can start. Return True if a plan preempted requests."""
        if self._spans.at_boundary:
            self._spans.go_on(self.instances, works)
        self._spans.gone_on = True
        made_room, touched = False, self._fleet.touched
        ids = list(touched)
        if len(ids) > 1:
            ids.sort(reverse=True)
        touched.clear()
        while ids:
            id = ids.pop()
            instance = self.instances[id]
            if not (instance.takes_a_step and instance.has_ready):
                continue
            if self._start_step(now_s, instance, works):
                made_room = True
                # Instances behind it that this touched join this round, in order.
                later = {other for other in touched if other > id}
                touched -= later
                ids = sorted(later.union(ids), reverse=True)
        if self._to_stream:  # after all steps: a span would take its blocks before too
            self._start_streams(works)
        return made_room

    def _start_step(
        self, now_s: float, instance: InstanceState, works: list[Work]
    ) -> bool:
        policy, limits = self._policies[instance.id], self._limits[instance.id]
        plan = policy.plan(instance)
        try:
            prompts = check_plan(plan, instance, limits, self._requests)
            for victim in plan.preempt:
                self._preempt(now_s, instance, self._requests[victim.id], plan.to_back)
            if not plan.chunks and not plan.decodes:
                return bool(plan.preempt)
            # The policy's views of running requests are the states themselves.
            decodes = typing.cast(Sequence[RequestState], plan.decodes)
            flight = self._fleet.start_step(
                self._next_work_id(),
                instance,
                prompts,
                plan.chunks,
                decodes,
                plan.repeats
                if self._plans_spans and instance.spec.parallelism.pp == 1
                else 1,
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"the plan of {type(policy).__name__} for {instance}: {error}"
            ) from error
        self._in_flight[flight.work.id] = flight
        works.append(flight.work)
        for state in flight.prompts:
            _stamp_start(state, now_s)
        for state in flight.batch.take_first_steps():
            _stamp_start(state, now_s)
        if self._streams and instance.spec.role is Role.PREFILL:
            self._to_stream.append(flight)
        return bool(plan.preempt)

    def _start_streams(self, works: list[Work]) -> None:
        """Send the KV of prompts in new steps as it is computed.

        Skip requests with one token left: they finish with prefill.
        """
        for flight in self._to_stream:
            chunks = flight.work.load.chunks
            for state, (start, count) in zip(flight.prompts, chunks, strict=True):
                if state.num_tokens < state.max_cached_tokens:
                    self._start_stream(state, start + count, flight.work.id, works)
        self._to_stream.clear()
        if self._spans.disturbed:
            self._spans.cut(works)

    def _start_stream(
        self, state: RequestState, end: int, step: int, works: list[Work]
    ) -> None:
        """Send the KV that `step` adds by computing a prompt's tokens up to `end`."""
        if not self._fleet.to_send(state, end):
            return
        if state.pull_target is None:
            target = self._fleet.stream_target(state)
            if target is None or not self._admits_pull(target, state):
                return  # the next chunk tries again; at last the request is parked
            self._fleet.begin_stream(state, target)
            self._spans.check(target)
        transfer = self._fleet.start_stream(self._next_work_id(), state, end, step)
        self._in_flight[transfer.id] = TransferInFlight(transfer, state)
        works.append(transfer)

    def _preempt(
        self,
        now_s: float,
        instance: InstanceState,
        victim: RequestState,
        to_back: bool,
    ) -> None:
        """Drop a request's KV and queue it to compute all its tokens again.

        A decode instance cannot prefill, so its victims go back to a prefill instance.
        """
        if victim.transfers_in_flight:
            raise RuntimeError(
                f"request {victim.id}: its KV is leaving and cannot be dropped; a "
                "prefill policy must reserve all of a prompt before its first chunk"
            )
        self._fleet.remove(victim)
        victim.timeline.dropped_s.append(now_s)
        stays = instance.spec.role is not Role.DECODE
        self._enqueue(victim, instance if stays else None, front=not to_back)

    def _enqueue(
        self,
        state: RequestState,
        instance: InstanceState | None = None,
        *,
        front: bool = False,
    ) -> None:
        self._fleet.enqueue(state, instance, front=front)
        if state.instance is not None:
            queued_at = self.instances[state.instance]
            if queued_at.waiting[0] is state:
                self._spans.disturb(queued_at)

    def _check_alive(self) -> None:
        if all(instance.up for instance in self.instances):
            places = {s.id: s.place.name for s in self._requests.values() if s.active}
            raise RuntimeError(
                f"{self._active} requests wait, but nothing can be planned: {places}"
            )


def _check_tokens(flight: StepInFlight, event: Done) -> None:
    samples = sum(s.complete for s in flight.prompts) + len(flight.batch)
    if len(event.tokens) != samples:
        raise RuntimeError(
            f"step {event.work}: expected {samples} tokens, got {len(event.tokens)}"
        )


def _stamp_start(state: RequestState, now_s: float) -> None:
    timeline = state.timeline
    if timeline.prefill_start_s is None:
        timeline.prefill_start_s = now_s
    elif state.generated and timeline.decode_start_s is None:
        timeline.decode_start_s = now_s


def _stamp_broken_transfer(timeline: Timeline) -> None:
    """Clear the stamp of a transfer that did not arrive; keep an earlier transfer's."""
    if timeline.transfer_end_s is None:
        timeline.transfer_start_s = None
