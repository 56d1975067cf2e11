"""Where requests are: the instances, and every move of a request among them."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.control.decode_batch import DecodeBatch
from disagg_jax.control.instance_index import InstanceIndex
from disagg_jax.control.state import (
    InstanceState,
    Place,
    RequestState,
    StepInFlight,
    in_order,
)
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Chunk
from disagg_jax.scheduling.routing import Router
from disagg_jax.work import OnRead, Slice, Step, StepLoad, Transfer


class Cluster:
    """The instances of a deployment, with each request in exactly one place.

    A request's `place` names the container it is in, `holder` and `target` say of which
    instances. Only the moves below write these, together with the container and the KV
    blocks, so that they cannot disagree; an impossible move raises. When and why a
    request moves, and the stamps on its timeline, are the controller's.

    Every move also touches the instances that it changes, so that only these are asked
    for their next step, and nothing costs a visit to all instances.

    Args:
      deployment: the instances.
      memory: KV memory of each instance, in the deployment's order.
      prefill_router: picks where a request without KV goes.
      decode_router: picks the decode instance that pulls a prefilled request.
      look: called with an instance before it is read, to bring it up to date.

    Raises:
      ValueError: if `memory` does not match the deployment, or prefill and decode have
        blocks of different sizes.
    """

    def __init__(
        self,
        deployment: Deployment,
        memory: Sequence[KVMemory],
        prefill_router: Router,
        decode_router: Router,
        look: Callable[[InstanceState], None],
    ):
        if len(memory) != len(deployment.instances):
            raise ValueError(
                f"memory: expected one KVMemory for each of the "
                f"{len(deployment.instances)} instances, got {len(memory)}"
            )
        moved = deployment.of(Role.PREFILL, Role.DECODE)
        if len({memory[i].block_tokens for i in moved}) > 1:
            raise ValueError(
                "block_tokens: expected one size on all prefill and decode instances, "
                f"got {[memory[i].block_tokens for i in moved]}"
            )
        self.instances = [
            InstanceState(i, spec, memory[i])
            for i, spec in enumerate(deployment.instances)
        ]
        entries = deployment.of(Role.PREFILL, Role.COLOCATED)
        decoders = set(deployment.of(Role.DECODE))
        self._entries = InstanceIndex([self.instances[i] for i in entries], look)
        self._decoders = InstanceIndex(
            [instance for instance in self.instances if instance.id in decoders], look
        )
        self.touched: set[int] = set()  # instances that may have something to start
        # By instance: where its index takes note that its rank may be another.
        self._stale = [
            (self._decoders if i in decoders else self._entries).touched
            for i in range(len(self.instances))
        ]
        self._first_with: dict[KVMemory, int] = {}  # instance, by its memory
        for instance in self.instances:
            self._first_with.setdefault(instance.memory, instance.id)
        self.unrouted: list[RequestState] = []
        self._prefill_router, self._decode_router = prefill_router, decode_router
        self._look = look

    def why_never(self, request: Request) -> str:
        """Why `request` could not be served even alone; '' if it could."""
        for memory, instance in self._first_with.items():
            limit = memory.why_never(request.prompt_tokens, request.max_tokens)
            if limit:
                return f"instance {instance}: {limit}"
        return ""

    # -- instances ------------------------------------------------------------------

    def touch(self, instance: InstanceState) -> None:
        """Take note that an instance may have another step to start or another rank."""
        id = instance.id
        self.touched.add(id)
        self._stale[id].add(id)

    def set_up(self, instance: InstanceState, up: bool) -> None:
        """Take note that an instance is lost, or back."""
        instance.up = up
        self._entries.find_up()
        self._decoders.find_up()
        self.touch(instance)

    # -- queues ---------------------------------------------------------------------

    def enqueue(
        self,
        state: RequestState,
        instance: InstanceState | None = None,
        *,
        front: bool = False,
    ) -> None:
        """Puts a request that has no KV into a queue: `instance`'s, or as routed."""
        if instance is None:
            if not self._entries.up:
                state.settled_place = Place.UNROUTED
                self.unrouted.append(state)
                return
            instance = _pick(self._prefill_router, state, self._entries)
        state.settled_place, state.holder = Place.WAITING, instance
        if front:
            instance.waiting.appendleft(state)
        else:
            instance.waiting.append(state)
        self.touch(instance)

    def route_stranded(self) -> None:
        """Routes again, in order of arrival, what found no instance up."""
        unrouted, self.unrouted = self.unrouted, []
        for state in in_order(unrouted):
            self.enqueue(state)
        parked = [
            s for i in self.instances for s in i.parked.values() if s.target is None
        ]
        for state in in_order(parked):
            self.assign_target(state)

    def remove(self, state: RequestState) -> None:
        """Takes a request out of where it is and frees all its blocks."""
        if state.batch is not None:
            state.batch.leave(state)
        else:
            self._take_out(state)
        holder = state.holder
        if holder is not None:
            if holder.blocks.held(state.id):
                holder.blocks.release(state.id)
            self.touch(holder)
        state.settled_context, state.settled_place = 0, Place.ENDED
        state.holder = state.target = None
        state.sent = state.landing = 0

    def let_go(self, state: RequestState) -> None:
        """Removes a request that is in no step, once KV that leaves has landed."""
        if not state.landing:
            self.remove(state)
            return
        if state.place is Place.PARTIAL:
            holder = _some(state.holder)
            del holder.partly[state.id]
            self.touch(holder)
        state.settled_place = Place.MOVING

    def _take_out(self, state: RequestState) -> None:
        """Takes a request that does not decode out of its container."""
        if state.target is not None and state.place is not Place.PARKED:
            self.drop_target(state)
        holder, place = state.holder, state.place
        if place is Place.UNROUTED:
            self.unrouted.remove(state)
        elif place is Place.WAITING:
            _some(holder).waiting.remove(state)
        elif place is Place.PARTIAL:
            del _some(holder).partly[state.id]
        elif place is Place.PARKED:
            del _some(holder).parked[state.id]
            if state.target is not None:
                state.target.pulls.remove(state)
                self.touch(state.target)
        elif place not in (Place.STEPPING, Place.RUNNING):  # a prompt in a step
            raise RuntimeError(f"request {state.id} cannot leave {place}")

    # -- steps ----------------------------------------------------------------------

    def start_step(
        self,
        work_id: int,
        instance: InstanceState,
        prompts: Sequence[RequestState],
        chunks: Sequence[Chunk],
        decodes: Sequence[RequestState],
        repeats: int,
    ) -> StepInFlight:
        """Reserves blocks for a step and puts requests into it.

        Args:
          prompts: waiting and partly computed requests.
          chunks: what to compute of each of `prompts`.
          decodes: the ready requests that decode.
          repeats: how many decode iterations may be one span.
        """
        parts = _take_chunks(instance, prompts, chunks) if prompts else ()
        if prompts:  # one that is computed again no longer queues
            self._stale[instance.id].add(instance.id)
        batch, decoding, iterations = instance.nobody, len(decodes), 1
        if decoding:
            batch = _take_ready(instance, decodes)
            if repeats > 1 and not prompts:
                iterations = min(repeats, batch.lasting(instance.blocks.free))
            batch.start()
        load = StepLoad(parts, decoding, batch.context + decoding)
        slices = OnRead(_slices, prompts, load, batch, instance.blocks)
        work = Step(work_id, instance.id, slices, load, iterations)
        until = batch.iteration + iterations
        instance.step = StepInFlight(work, prompts, batch, until=until)
        return instance.step

    def finish_chunks(self, flight: StepInFlight) -> None:
        """The chunks of a step are cached; their requests are to be placed anew."""
        chunks = flight.work.load.chunks
        for state, (start, count) in zip(flight.prompts, chunks, strict=True):
            state.settled_place = Place.RUNNING
            state.settled_context = start + count

    def set_aside(self, state: RequestState) -> None:
        """A request computed in part is ready for its next chunk."""
        _some(state.holder).partly[state.id] = state
        state.settled_place = Place.PARTIAL

    def keep(self, state: RequestState) -> None:
        """A request that was just prefilled decodes where it is."""
        _some(state.holder).ready.join(state)

    # -- transfers ------------------------------------------------------------------

    def park(self, state: RequestState) -> None:
        """Prefilled: the KV stays here until a decode instance pulls it."""
        _some(state.holder).parked[state.id] = state
        state.settled_place = Place.PARKED
        self.assign_target(state)

    def assign_target(self, state: RequestState) -> None:
        """Picks the decode instance that is to pull a parked request's KV."""
        if self._decoders.up:
            state.target = _pick(self._decode_router, state, self._decoders)
            state.target.pulls.append(state)
            self.touch(state.target)

    def drop_target(self, state: RequestState) -> None:
        """No target any more; where a transfer broke off, back to parked."""
        target = _some(state.target)
        if state.id in target.arriving:
            del target.arriving[state.id]
            target.blocks.release(state.id)
        else:
            target.pulls.remove(state)
        if state.place is Place.MOVING:
            state.settled_place = Place.PARKED
            _some(state.holder).parked[state.id] = state
        self.touch(target)
        state.target = None
        state.sent = state.landing = 0

    def start_transfer(self, work_id: int, state: RequestState) -> Transfer:
        """Reserves blocks at the target; the source keeps its own until it is over."""
        src, dst = _some(state.holder), _some(state.target)
        del src.parked[state.id]
        dst.pulls.remove(state)
        state.settled_place = Place.MOVING
        self._reserve(dst, state, state.context)
        blocks = src.memory.blocks_for(state.context)
        return self._transfer(work_id, state, state.context, blocks)

    def stream_target(self, state: RequestState) -> InstanceState | None:
        """Where the KV of a prompt can go while it is computed; None if nowhere now.

        Not past those who wait for their KV to be pulled.
        """
        if not self._decoders.up:
            return None
        target = _pick(self._decode_router, state, self._decoders)
        if target.pulls:
            return None
        self._look(target)
        missing = target.blocks.missing(state.id, state.known + 1)
        return target if missing <= target.blocks.free else None

    def begin_stream(self, state: RequestState, target: InstanceState) -> None:
        """Reserves blocks at `target` for a prompt that is being computed."""
        state.target = target
        self._reserve(target, state, state.known)

    def to_send(self, state: RequestState, end: int) -> int:
        """Blocks that can leave when tokens up to `end` have KV, and have not left.

        One that is not full yet is full later, but for the last.
        """
        memory = _some(state.holder).memory
        last = end == state.known
        full = memory.blocks_for(end) if last else end // memory.block_tokens
        return full - state.sent

    def start_stream(
        self, work_id: int, state: RequestState, end: int, step: int
    ) -> Transfer:
        """Sends the blocks that are there when `step` has computed tokens to `end`."""
        return self._transfer(work_id, state, end, self.to_send(state, end), step)

    def _reserve(self, dst: InstanceState, state: RequestState, context: int) -> None:
        """Gives a request that is to arrive room for a token more than its context."""
        dst.blocks.extend(state.id, context + 1)
        dst.arriving[state.id] = state
        self._stale[dst.id].add(dst.id)  # it has no more to start than before

    def _transfer(
        self, work_id: int, state: RequestState, end: int, blocks: int, step: int = 0
    ) -> Transfer:
        """A transfer of the next `blocks` blocks; tokens up to `end` have KV."""
        src, dst = _some(state.holder), _some(state.target)
        first = state.sent
        state.sent += blocks
        state.landing += 1
        start = first * src.memory.block_tokens
        return Transfer(
            id=work_id,
            request=state.request,
            src=src.id,
            dst=dst.id,
            src_blocks=OnRead(_blocks, src, state, first, state.sent),
            dst_blocks=OnRead(_blocks, dst, state, first, state.sent),
            context=min(end - start, blocks * src.memory.block_tokens),
            start=start,
            step=step,
        )

    def stream_on(self, state: RequestState) -> None:
        """A prompt is computed; what is left of its KV is on the way."""
        state.settled_place = Place.MOVING

    def finish_transfer(self, state: RequestState) -> None:
        """The KV has landed: the target holds the request, the source is free of it."""
        src, dst = _some(state.holder), _some(state.target)
        src.blocks.release(state.id)
        del dst.arriving[state.id]
        state.holder, state.target = dst, None
        dst.ready.join(state)
        self.touch(src)
        self.touch(dst)


def _pick(
    router: Router, state: RequestState, instances: InstanceIndex
) -> InstanceState:
    """The instance that `router` picks; it is asked only where there is a choice."""
    if len(instances.up) == 1:
        return instances.up[0]
    picked = typing.cast(InstanceState, router(state, instances))
    if picked not in instances:
        raise RuntimeError(
            f"router {router}: expected one of the instances that are up for request "
            f"{state.id}, got {picked}"
        )
    return picked


def _take_chunks(
    instance: InstanceState, prompts: Sequence[RequestState], chunks: Sequence[Chunk]
) -> tuple[tuple[int, int], ...]:
    """Takes prompts out of where they wait: (start, count) of each one's chunk."""
    parts: list[tuple[int, int]] = []
    for state, chunk in zip(prompts, chunks, strict=True):
        parts.append((state.settled_context, chunk.tokens))
        instance.blocks.extend(state.id, chunk.reserve)
        if state.settled_place is Place.PARTIAL:
            del instance.partly[state.id]
        else:
            instance.waiting.remove(state)
        state.settled_place = Place.STEPPING
    return tuple(parts)


def _take_ready(
    instance: InstanceState, decodes: Sequence[RequestState]
) -> DecodeBatch:
    """Takes those that decode out of the ready ones."""
    ready, other = instance.ready, instance.spare_batch()
    if len(decodes) == len(ready.members):  # all
        instance.ready = other
        return ready
    batch = ready.split(decodes, other)
    instance.ready = other if batch is ready else ready
    return batch


def _slices(
    prompts: Sequence[RequestState],
    load: StepLoad,
    batch: DecodeBatch,
    blocks: KVBlocks,
) -> list[Slice]:
    """The slices of a step that begins now, each with the blocks it needs only."""
    parts = [
        (state, start, count)
        for state, (start, count) in zip(prompts, load.chunks, strict=True)
    ]
    parts += [(state, state.context, 1) for state in batch.members]
    size = blocks.memory.block_tokens
    return [
        state.slice(start, count, blocks.table(state.id)[: -(-(start + count) // size)])
        for state, start, count in parts
    ]


def _blocks(
    instance: InstanceState, state: RequestState, first: int, end: int
) -> tuple[int, ...]:
    return instance.blocks.table(state.id)[first:end]


def _some(value: InstanceState | None) -> InstanceState:
    """`value`, which the state machine guarantees to be there."""
    if value is None:
        raise RuntimeError("a request has no instance where it must have one")
    return value
