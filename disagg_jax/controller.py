"""The controller: events in, work out. No clock, no I/O, no JAX.

Every change of a request's state is made here, so that the same events always lead to
the same decisions, whatever executes them.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.scheduling.routing import Router, least_loaded, shortest_queue
from disagg_jax.scheduling.view import Policy, PullPolicy
from disagg_jax.state import InFlight, InstanceState, Place, RequestState
from disagg_jax.work import (
    Arrived,
    Cancelled,
    Done,
    Down,
    Event,
    Slice,
    Step,
    Transfer,
    Up,
    Work,
)


class Controller:
    """Schedules requests on a deployment by the policies of one system.

    `timelines` holds what happened to each request, in arrival order.

    Args:
      deployment: the instances.
      policies: a policy for every role in the deployment; the decode role's must be a
        `PullPolicy`.
      memory: KV memory of each instance, in the deployment's order.
      prefill_router: picks where an arrival goes: a prefill or colocated instance.
      decode_router: picks the decode instance that pulls a prefilled request.

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
    ):
        if len(memory) != len(deployment.instances):
            raise ValueError(
                f"memory: expected one KVMemory for each of the "
                f"{len(deployment.instances)} instances, got {len(memory)}"
            )
        for spec in deployment.instances:
            if spec.role not in policies:
                raise ValueError(
                    f"deployment '{deployment}' has {spec.role} instances, but the "
                    f"system has policies for {', '.join(sorted(policies))} only"
                )
        moved = deployment.of(Role.PREFILL, Role.DECODE)
        if len({memory[i].block_tokens for i in moved}) > 1:
            raise ValueError(
                "block_tokens: expected one size on all prefill and decode instances, "
                f"got {[memory[i].block_tokens for i in moved]}"
            )
        self._instances = [
            InstanceState(i, spec, memory[i])
            for i, spec in enumerate(deployment.instances)
        ]
        self._policies = policies
        self._prefill_router, self._decode_router = prefill_router, decode_router
        self._requests: dict[int, RequestState] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._unrouted: list[RequestState] = []
        self._next_work = 0
        self._active = 0  # requests that arrived and have not ended
        self.timelines: list[Timeline] = []

    @property
    def in_flight(self) -> int:
        """Pieces of work that were submitted and are not done."""
        return len(self._in_flight)

    @property
    def instances(self) -> Sequence[InstanceState]:
        """The state of every instance, for reading."""
        return self._instances

    def step(self, now_s: float, events: Sequence[Event]) -> list[Work]:
        """Applies all `events` in their order, then plans all work that can start.

        Raises:
          RuntimeError: on an impossible state: an unknown or repeated Done, a block
            freed twice, requests that wait for ever.
        """
        for event in events:
            self._apply(now_s, event)
        works: list[Work] = []
        # One plan can make room for another (a preemption frees blocks that a pull
        # waits for), so go round in a fixed order until nothing changes.
        while self._start_transfers(now_s, works) or self._start_steps(now_s, works):
            pass
        self._check_alive()
        return works

    # -- events ---------------------------------------------------------------------

    def _apply(self, now_s: float, event: Event) -> None:
        match event:
            case Arrived(request):
                self._arrive(now_s, request)
            case Done():
                self._done(event)
            case Cancelled(request_id):
                self._cancel(now_s, request_id)
            case Down(instance):
                self._down(self._instances[instance])
            case Up(instance):
                self._up(self._instances[instance])

    def _arrive(self, now_s: float, request: Request) -> None:
        if request.id in self._requests:
            raise RuntimeError(f"request {request.id} arrived twice")
        timeline = Timeline(request=request)
        order, known = len(self.timelines), request.prompt_tokens
        state = RequestState(request, order, timeline, known)
        self._requests[request.id] = state
        self.timelines.append(timeline)
        timeline.error = self._why_never(request)
        if timeline.error:
            timeline.status, timeline.end_s = Status.REFUSED, now_s
            state.place = Place.ENDED
            return
        self._active += 1
        self._enqueue(state)

    def _why_never(self, request: Request) -> str:
        """Why `request` could not be served even alone; '' if it could."""
        for instance in self._instances:
            limit = instance.memory.why_never(request.prompt_tokens, request.max_tokens)
            if limit:
                return f"instance {instance.id}: {limit}"
        return ""

    def _done(self, event: Done) -> None:
        flight = self._in_flight.pop(event.work, None)
        if flight is None:
            raise RuntimeError(f"work {event.work} is done but was not in flight")
        if isinstance(flight.work, Transfer):
            self._transfer_done(flight.work, flight.states[0], event)
        else:
            self._step_done(flight.work, flight.states, event)

    def _step_done(
        self, step: Step, states: tuple[RequestState, ...], event: Done
    ) -> None:
        samples = sum(part.samples for part in step.slices)
        if len(event.tokens) not in (0, samples):
            raise RuntimeError(
                f"step {step.id}: expected {samples} tokens, got {len(event.tokens)}"
            )
        instance = self._instances[step.instance]
        instance.step, instance.stepping = None, []
        instance.running += states
        tokens = iter(event.tokens)
        for state, part in zip(states, step.slices, strict=True):
            state.place = Place.RUNNING
            state.context += part.count
            token = next(tokens, None) if part.samples else None
            if not state.active:  # cancelled meanwhile
                self._remove(state)
            elif part.samples:
                self._generate(instance, state, token, event.end_s)

    def _generate(
        self,
        instance: InstanceState,
        state: RequestState,
        token: int | None,
        end_s: float,
    ) -> None:
        request, timeline = state.request, state.timeline
        state.known += 1
        timeline.token_s.append(end_s)
        stops = False
        if token is not None:
            timeline.tokens.append(token)
            stops = request.stops_at(token)
        elif request.prompt is not None:
            raise RuntimeError(f"request {request.id}: a step returned no token")
        if stops or state.generated == request.max_tokens:
            self._end(state, Status.FINISHED, end_s)
        elif instance.spec.role is Role.PREFILL:
            instance.running.remove(state)
            instance.parked.append(state)
            state.place = Place.PARKED
            self._assign(state)

    def _transfer_done(
        self, transfer: Transfer, state: RequestState, event: Done
    ) -> None:
        timeline = state.timeline
        timeline.transfer_bytes += event.bytes
        if not state.active:  # cancelled meanwhile
            self._remove(state)
            return
        dst = self._instances[transfer.dst]
        self._instances[transfer.src].blocks.release(state.id)
        del dst.arriving[state.id]
        if timeline.decode_start_s is None:
            timeline.transfer_end_s = event.end_s
        state.place, state.holder, state.target = Place.RUNNING, dst, None
        dst.running.append(state)

    def _cancel(self, now_s: float, request_id: int) -> None:
        state = self._requests.get(request_id)
        if state is None:
            raise RuntimeError(f"cancelled request {request_id} never arrived")
        if not state.active:
            return
        self._end(state, Status.CANCELLED, now_s)

    def _down(self, lost: InstanceState) -> None:
        """Its KV and its work are gone; every request it touched goes on elsewhere."""
        lost.up, lost.step = False, None
        touched = {*lost.waiting, *lost.running, *lost.parked, *lost.pulls}
        for work_id, flight in list(self._in_flight.items()):
            if lost.id in flight.work.instances:
                del self._in_flight[work_id]
                touched.update(flight.states)
        in_order = sorted(touched, key=_order)
        # Where only the receiving side is lost, the KV can go elsewhere.
        for state in in_order:
            if state.active and state.holder is not lost:
                self._unassign(state)
                self._assign(state)
        # Latest first: each goes to the front of a queue, where the earliest ends up.
        for state in reversed(in_order):
            if not state.active or state.holder is lost:
                self._lose(state)
        if lost.blocks.held_by:
            raise RuntimeError(f"lost instance {lost.id} still has KV of requests")

    def _lose(self, state: RequestState) -> None:
        """Its KV is gone, or nobody wants it any more."""
        had_kv = state.place is not Place.WAITING
        self._remove(state)
        if state.active:
            state.timeline.preemptions += had_kv
            self._enqueue(state, front=True)

    def _up(self, instance: InstanceState) -> None:
        instance.up = True
        unrouted, self._unrouted = self._unrouted, []
        for state in sorted(unrouted, key=_order):
            self._enqueue(state)
        parked = [s for i in self._instances for s in i.parked if s.target is None]
        for state in sorted(parked, key=_order):
            self._assign(state)

    # -- moves ----------------------------------------------------------------------

    def _enqueue(
        self,
        state: RequestState,
        instance: InstanceState | None = None,
        *,
        front: bool = False,
    ) -> None:
        """Puts a request that has no KV into a queue: `instance`'s, or as routed."""
        if instance is None:
            up = self._instances_up(Role.PREFILL, Role.COLOCATED)
            if not up:
                state.place = Place.UNROUTED
                self._unrouted.append(state)
                return
            instance = self._pick(self._prefill_router, up)
        state.place, state.holder = Place.WAITING, instance
        if front:
            instance.waiting.appendleft(state)
        else:
            instance.waiting.append(state)

    def _assign(self, state: RequestState) -> None:
        """Picks the decode instance that is to pull a parked request's KV."""
        up = self._instances_up(Role.DECODE)
        if up:
            state.target = self._pick(self._decode_router, up)
            state.target.pulls.append(state)

    def _unassign(self, state: RequestState) -> None:
        """Back to parked without a target, from parked or from a broken transfer."""
        target = _some(state.target)
        if state.place is Place.MOVING:
            del target.arriving[state.id]
            target.blocks.release(state.id)
            if state.timeline.transfer_end_s is None:
                state.timeline.transfer_start_s = None
            state.place = Place.PARKED
            _some(state.holder).parked.append(state)
        else:
            target.pulls.remove(state)
        state.target = None

    def _remove(self, state: RequestState) -> None:
        """Takes a request out of where it is and frees all its blocks."""
        if state.place is Place.MOVING:
            self._unassign(state)
        holder = state.holder
        match state.place:
            case Place.UNROUTED:
                self._unrouted.remove(state)
            case Place.WAITING:
                _some(holder).waiting.remove(state)
            case Place.RUNNING:
                _some(holder).running.remove(state)
            case Place.STEPPING:
                _some(holder).stepping.remove(state)
            case Place.PARKED:
                _some(holder).parked.remove(state)
                if state.target is not None:
                    state.target.pulls.remove(state)
            case _:
                raise RuntimeError(f"request {state.id} cannot leave {state.place}")
        if holder is not None and holder.blocks.held(state.id):
            holder.blocks.release(state.id)
        state.context, state.place = 0, Place.ENDED
        state.holder = state.target = None

    def _end(self, state: RequestState, status: Status, now_s: float) -> None:
        """The request is over. What is in flight for it keeps its blocks until done."""
        state.timeline.status, state.timeline.end_s = status, now_s
        self._active -= 1
        if state.place not in (Place.STEPPING, Place.MOVING):
            self._remove(state)

    def _instances_up(self, *roles: Role) -> list[InstanceState]:
        return [i for i in self._instances if i.up and i.spec.role in roles]

    def _pick(self, router: Router, up: list[InstanceState]) -> InstanceState:
        return self._instances[router(up).id]

    # -- plans ----------------------------------------------------------------------

    def _start_transfers(self, now_s: float, works: list[Work]) -> bool:
        started = len(works)
        for dst in self._instances_up(Role.DECODE):
            policy = typing.cast(PullPolicy, self._policies[Role.DECODE])
            while dst.pulls and policy.pulls(dst, dst.pulls[0]):
                works.append(self._start_transfer(now_s, dst, dst.pulls.popleft()))
        return len(works) > started

    def _start_transfer(
        self, now_s: float, dst: InstanceState, state: RequestState
    ) -> Transfer:
        src = _some(state.holder)
        src.parked.remove(state)
        dst.blocks.extend(state.id, state.known)
        blocks = src.memory.blocks_for(state.context)
        transfer = Transfer(
            id=self._new_work_id(),
            request=state.request,
            src=src.id,
            dst=dst.id,
            src_blocks=src.blocks.table(state.id)[:blocks],
            dst_blocks=dst.blocks.table(state.id)[:blocks],
            context=state.context,
        )
        state.place = Place.MOVING
        dst.arriving[state.id] = state
        if state.timeline.decode_start_s is None:
            state.timeline.transfer_start_s = now_s
        self._in_flight[transfer.id] = InFlight(transfer, (state,))
        return transfer

    def _start_steps(self, now_s: float, works: list[Work]) -> bool:
        progress = False
        for instance in self._instances:
            if instance.step is None and (instance.waiting or instance.running):
                progress |= self._start_step(now_s, instance, works)
        return progress

    def _start_step(
        self, now_s: float, instance: InstanceState, works: list[Work]
    ) -> bool:
        plan = self._policies[instance.spec.role].plan(instance)
        for victim in plan.preempt:
            self._preempt(instance, self._requests[victim.id])
        if not plan.slices:
            return bool(plan.preempt)
        states = tuple(self._requests[request.id] for request, _ in plan.slices)
        slices: list[Slice] = []
        for state, (_, count) in zip(states, plan.slices, strict=True):
            instance.blocks.extend(state.id, state.context + count)
            slices.append(state.slice(count, instance.blocks.table(state.id)))
            _stamp_start(state, now_s)
            (
                instance.waiting if state.place is Place.WAITING else instance.running
            ).remove(state)
            state.place = Place.STEPPING
        instance.stepping = list(states)
        instance.step = Step(self._new_work_id(), instance.id, tuple(slices))
        self._in_flight[instance.step.id] = InFlight(instance.step, states)
        works.append(instance.step)
        return True

    def _preempt(self, instance: InstanceState, victim: RequestState) -> None:
        """Drops its KV; prompt and generated tokens are computed again, before others.

        A decode instance cannot prefill, so its victims go back to a prefill instance.
        """
        self._remove(victim)
        victim.timeline.preemptions += 1
        stays = instance.spec.role is not Role.DECODE
        self._enqueue(victim, instance if stays else None, front=True)

    def _new_work_id(self) -> int:
        self._next_work += 1
        return self._next_work

    def _check_alive(self) -> None:
        if self._active and not self._in_flight and all(i.up for i in self._instances):
            places = {s.id: s.place.name for s in self._requests.values() if s.active}
            raise RuntimeError(
                f"{self._active} requests wait, but nothing can be planned: {places}"
            )


def _order(state: RequestState) -> int:
    return state.order


def _stamp_start(state: RequestState, now_s: float) -> None:
    timeline = state.timeline
    if timeline.prefill_start_s is None:
        timeline.prefill_start_s = now_s
    elif state.generated and timeline.decode_start_s is None:
        timeline.decode_start_s = now_s


def _some(value: InstanceState | None) -> InstanceState:
    """`value`, which the state machine guarantees to be there."""
    if value is None:
        raise RuntimeError("a request has no instance where it must have one")
    return value
