"""The fleet: the instances, and every move of a request among them."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

from disagg_jax.control.block_pool import KVBlocks
from disagg_jax.control.instance_index import InstanceIndex
from disagg_jax.control.instance_state import InstanceState, StepInFlight
from disagg_jax.control.request_state import (
    DecodeBatch,
    Place,
    RequestState,
    in_order,
)
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Chunk
from disagg_jax.scheduling.routing import Router
from disagg_jax.work import OnRead, Slice, Step, StepLoad, Transfer


class Fleet:
    """The instances of a deployment, with each request in exactly one place.

    A request's `place` names its container; `instance` and `pull_target` name the
    instances that have this container. Only the moves below write these, together with
    the container and the KV blocks, so that they cannot disagree. An impossible move
    raises. The controller decides when and why a request moves, and stamps its
    timeline.

    A move also touches the instances that it changes. Only touched instances are asked
    for their next step, so no event costs a visit to all instances.

    Attributes:
      instances: in the deployment's order.
      touched: ids of instances that may have something to start.
      unrouted: requests that found no instance up.

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
        n = len(deployment.instances)
        expected = f"memory: expected one KVMemory for each of the {n} instances"
        require(len(memory) == n, expected, len(memory))
        moved = deployment.of(Role.PREFILL, Role.DECODE)
        sizes = [memory[i].block_tokens for i in moved]
        expected = "block_tokens: expected one size on all prefill and decode instances"
        require(len(set(sizes)) <= 1, expected, sizes)
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
        self.touched: set[int] = set()
        # By instance: the set in which its index notes that its rank may have changed.
        self._stale = [
            (self._decoders if i in decoders else self._entries).touched
            for i in range(len(self.instances))
        ]
        self._first_with: dict[KVMemory, int] = {}  # the first instance with a memory
        for instance in self.instances:
            self._first_with.setdefault(instance.memory, instance.id)
        self.unrouted: list[RequestState] = []
        self._prefill_router, self._decode_router = prefill_router, decode_router
        self._look = look

    def rejection_reason(self, request: Request) -> str:
        """Return why `request` could not be served even alone; '' if it could."""
        for memory, instance in self._first_with.items():
            reason = memory.rejection_reason(request.prompt_tokens, request.max_tokens)
            if reason:
                return f"instance {instance}: {reason}"
        return ""

    def at(self, instance: int | None) -> InstanceState:
        """Return the instance with this id, which must be one.

        Raises:
          RuntimeError: on None: the request has no instance where it must have one.
        """
        if instance is None:
            raise RuntimeError("a request has no instance where it must have one")
        return self.instances[instance]

    # -- instances ------------------------------------------------------------------

    def touch(self, instance: InstanceState) -> None:
        """Note that an instance may have another step to start, or another rank."""
        id = instance.id
        self.touched.add(id)
        self._stale[id].add(id)

    def set_up(self, instance: InstanceState, up: bool) -> None:
        """Mark an instance as up or lost."""
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
        """Queue a request without KV at `instance`, or where the router says."""
        if instance is None:
            if not self._entries.up:
                state.place = Place.UNROUTED
                self.unrouted.append(state)
                return
            instance = _pick(self._prefill_router, state, self._entries)
        state.place, state.instance = Place.WAITING, instance.id
        if front:
            instance.waiting.appendleft(state)
        else:
            instance.waiting.append(state)
        self.touch(instance)

    def route_stranded(self) -> None:
        """Route requests that found no instance up, in order of arrival."""
        unrouted, self.unrouted = self.unrouted, []
        for state in in_order(unrouted):
            self.enqueue(state)
        parked = [
            s
            for i in self.instances
            for s in i.parked.values()
            if s.pull_target is None
        ]
        for state in in_order(parked):
            self.assign_target(state)

    def remove(self, state: RequestState) -> None:
        """Take a request out of its container and free all its blocks."""
        if state.batch is not None:
            state.batch.leave(state)
        else:
            self._take_out(state)
        if state.instance is not None:
            instance = self.instances[state.instance]
            if instance.blocks.held(state.id):
                instance.blocks.release(state.id)
            self.touch(instance)
        state.clear()

    def let_go(self, state: RequestState) -> None:
        """Remove a request that is in no step, once KV that leaves has landed."""
        if not state.transfers_in_flight:
            self.remove(state)
            return
        if state.place is Place.PARTIAL:
            instance = self.at(state.instance)
            del instance.partly[state.id]
            self.touch(instance)
        state.place = Place.MOVING

    def _take_out(self, state: RequestState) -> None:
        """Take a request that does not decode out of its container."""
        if state.pull_target is not None and state.place is not Place.PARKED:
            self.drop_target(state)
        place = state.place
        if place is Place.UNROUTED:
            self.unrouted.remove(state)
        elif place is Place.WAITING:
            self.at(state.instance).waiting.remove(state)
        elif place is Place.PARTIAL:
            del self.at(state.instance).partly[state.id]
        elif place is Place.PARKED:
            del self.at(state.instance).parked[state.id]
            if state.pull_target is not None:
                target = self.at(state.pull_target)
                target.pull_queue.remove(state)
                self.touch(target)
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
        """Reserve blocks for a step and put its requests into it.

        Args:
          prompts: waiting and partly computed requests.
          chunks: the chunk to compute of each of `prompts`.
          decodes: the ready requests that decode.
          repeats: decode iterations that may be one span.
        """
        parts = _take_chunks(instance, prompts, chunks) if prompts else ()
        if prompts:  # a prompt that is computed again no longer queues
            self._stale[instance.id].add(instance.id)
        batch, decoding, iterations = instance.no_decodes, len(decodes), 1
        if decoding:
            batch = _take_ready(instance, decodes)
            if repeats > 1 and not prompts:
                iterations = min(
                    repeats, batch.iterations_until_change(instance.blocks.free)
                )
            batch.start()
        load = StepLoad(parts, decoding, batch.context + decoding)
        slices = OnRead(_slices, prompts, load, batch, instance.blocks)
        work = Step(work_id, instance.id, slices, load, iterations)
        until = batch.iteration + iterations
        instance.step = StepInFlight(work, prompts, batch, until=until)
        return instance.step

    def finish_chunks(self, flight: StepInFlight) -> None:
        """Count the chunks of a step as cached; their requests need a new place."""
        chunks = flight.work.load.chunks
        for state, (start, count) in zip(flight.prompts, chunks, strict=True):
            state.finish_chunk(start + count)

    def set_aside(self, state: RequestState) -> None:
        """Keep a prompt computed in part for its next chunk."""
        self.at(state.instance).partly[state.id] = state
        state.place = Place.PARTIAL

    # -- transfers ------------------------------------------------------------------

    def park(self, state: RequestState) -> None:
        """Keep the KV of a prefilled request until a decode instance pulls it."""
        self.at(state.instance).parked[state.id] = state
        state.place = Place.PARKED
        self.assign_target(state)

    def assign_target(self, state: RequestState) -> None:
        """Pick the decode instance that is to pull a parked request's KV."""
        if self._decoders.up:
            target = _pick(self._decode_router, state, self._decoders)
            state.pull_target = target.id
            target.pull_queue.append(state)
            self.touch(target)

    def drop_target(self, state: RequestState) -> None:
        """Clear the pull target; a request whose transfer broke off is parked again."""
        target = self.at(state.pull_target)
        if state.id in target.arriving:
            del target.arriving[state.id]
            target.blocks.release(state.id)
        else:
            target.pull_queue.remove(state)
        if state.place is Place.MOVING:
            state.place = Place.PARKED
            self.at(state.instance).parked[state.id] = state
        self.touch(target)
        state.pull_target = None
        state.blocks_sent = state.transfers_in_flight = 0

    def start_transfer(self, work_id: int, state: RequestState) -> Transfer:
        """Reserve blocks at the pull target and make the transfer to it.

        The source keeps its own blocks until the transfer is over.
        """
        src, dst = self.at(state.instance), self.at(state.pull_target)
        del src.parked[state.id]
        dst.pull_queue.remove(state)
        state.place = Place.MOVING
        end = state.cached_tokens
        self._reserve(dst, state, end)
        return self._transfer(work_id, state, end, src.memory.blocks_for(end))

    def stream_target(self, state: RequestState) -> InstanceState | None:
        """Return where a prompt's KV can go while it is computed; None if nowhere now.

        It may not overtake requests that wait for their KV to be pulled.
        """
        if not self._decoders.up:
            return None
        target = _pick(self._decode_router, state, self._decoders)
        if target.pull_queue:
            return None
        self._look(target)
        missing = target.blocks.missing(state.id, state.num_tokens + 1)
        return target if missing <= target.blocks.free else None

    def begin_stream(self, state: RequestState, target: InstanceState) -> None:
        """Reserve blocks at `target` for a prompt that is being computed."""
        state.pull_target = target.id
        self._reserve(target, state, state.num_tokens)

    def to_send(self, state: RequestState, end: int) -> int:
        """Count the unsent blocks that can leave when tokens up to `end` have KV.

        A block that is not full leaves later, except the last of the prompt.
        """
        memory = self.at(state.instance).memory
        last = end == state.num_tokens
        full = memory.blocks_for(end) if last else end // memory.block_tokens
        return full - state.blocks_sent

    def start_stream(
        self, work_id: int, state: RequestState, end: int, step: int
    ) -> Transfer:
        """Make the transfer of blocks that `step`, which computes to `end`, fills."""
        return self._transfer(work_id, state, end, self.to_send(state, end), step)

    def _reserve(self, dst: InstanceState, state: RequestState, context: int) -> None:
        """Reserve blocks at `dst` for `context` tokens of a request and one more."""
        dst.blocks.extend(state.id, context + 1)
        dst.arriving[state.id] = state
        self._stale[dst.id].add(dst.id)  # it has no more to start than before

    def _transfer(
        self, work_id: int, state: RequestState, end: int, blocks: int, step: int = 0
    ) -> Transfer:
        """Make a transfer of the next `blocks` blocks; tokens up to `end` have KV."""
        src, dst = self.at(state.instance), self.at(state.pull_target)
        first = state.blocks_sent
        state.blocks_sent += blocks
        state.transfers_in_flight += 1
        start = first * src.memory.block_tokens
        return Transfer(
            id=work_id,
            request=state.request,
            src=src.id,
            dst=dst.id,
            src_blocks=OnRead(_blocks, src, state, first, state.blocks_sent),
            dst_blocks=OnRead(_blocks, dst, state, first, state.blocks_sent),
            context=min(end - start, blocks * src.memory.block_tokens),
            start=start,
            step=step,
        )

    def stream_on(self, state: RequestState) -> None:
        """Let a computed prompt wait for the rest of its KV to land."""
        state.place = Place.MOVING

    def finish_transfer(self, state: RequestState) -> None:
        """Let a request whose KV has landed decode at its target; free the source."""
        src, dst = self.at(state.instance), self.at(state.pull_target)
        src.blocks.release(state.id)
        del dst.arriving[state.id]
        state.instance, state.pull_target = dst.id, None
        dst.ready.join(state)
        self.touch(src)
        self.touch(dst)


def _pick(
    router: Router, state: RequestState, instances: InstanceIndex
) -> InstanceState:
    """Return the instance that `router` picks; with one instance, do not ask it."""
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
    """Take prompts out of their containers; return (start, count) of each chunk."""
    parts: list[tuple[int, int]] = []
    for state, chunk in zip(prompts, chunks, strict=True):
        parts.append((state.cached_tokens, chunk.tokens))
        instance.blocks.extend(state.id, chunk.reserve)
        if instance.partly.pop(state.id, None) is None:
            instance.waiting.remove(state)
        state.place = Place.STEPPING
    return tuple(parts)


def _take_ready(
    instance: InstanceState, decodes: Sequence[RequestState]
) -> DecodeBatch:
    """Split the requests that decode in this step off the ready batch."""
    ready, other = instance.ready, instance.reuse_batch()
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
    """Make the slices of a step that begins now, each with only the blocks it needs."""
    parts = [
        (state, start, count)
        for state, (start, count) in zip(prompts, load.chunks, strict=True)
    ]
    parts += [(state, state.cached_tokens, 1) for state in batch.members]
    size = blocks.memory.block_tokens
    return [
        state.slice(start, count, blocks.table(state.id)[: -(-(start + count) // size)])
        for state, start, count in parts
    ]


def _blocks(
    instance: InstanceState, state: RequestState, first: int, end: int
) -> tuple[int, ...]:
    return instance.blocks.table(state.id)[first:end]
