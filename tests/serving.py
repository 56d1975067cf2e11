"""What the tests of the serving core share: builders, a checking engine, a driver."""

import dataclasses
import math

from disagg_jax.control.backend import Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.request_state import Place
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.request import Request, Status
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Done, Down, Step, Transfer

POLICIES = {
    Role.COLOCATED: PrefillFirst(),
    Role.PREFILL: PrefillOnly(),
    Role.DECODE: DecodeOnly(),
}
SECOND = LinearCost(step_base_s=1.0, transfer_base_s=1.0)  # every piece of work
_MAX_TURNS = 1000  # of a `Run`, so that one which never ends fails


def make_request(id=0, arrival_s=0.0, prompt=4, out=1, **fields) -> Request:
    """A request that has lengths only."""
    return Request(
        id=id, arrival_s=arrival_s, prompt_tokens=prompt, max_tokens=out, **fields
    )


def with_prompt(id=0, arrival_s=0.0, prompt=4, out=1, **fields) -> Request:
    """A request with token ids, 0 among them."""
    tokens = tuple((id + i) % 7 for i in range(prompt))
    request = make_request(id, arrival_s, prompt, out, **fields)
    return dataclasses.replace(request, prompt=tokens)


def make_controller(
    deployment="colocated:tp1", blocks=1000, block_tokens=4, policies=None, **routers
) -> Controller:
    """`blocks` KV blocks each, or a sequence with one number for each instance."""
    parsed = Deployment.parse(deployment)
    if isinstance(blocks, int):
        blocks = [blocks] * len(parsed.instances)
    memory = [
        KVMemory(num_blocks=n, block_tokens=block_tokens, max_context=10_000)
        for n in blocks
    ]
    return Controller(parsed, {**POLICIES, **(policies or {})}, memory, **routers)


def token(request: Request, n: int) -> int:
    """The n-th token the engines below generate; 0 is among them."""
    return (request.id + 3 * n) % 5


def expected_tokens(request: Request) -> list[int]:
    """All tokens of a request that is served to its end by the engines below."""
    tokens = []
    for n in range(request.max_tokens):
        tokens.append(token(request, n))
        if request.stops_at(tokens[-1]):
            break
    return tokens


class CheckingEngine:
    """An executor that keeps a KV cache of (request, position, token) and reads it.

    It fails on a step that would read KV that is not there or belongs to another, on
    wrong input tokens, and (`done`) on blocks overwritten while work used them.
    """

    def __init__(self, cost=SECOND, block_tokens=4):
        self._cost, self._size = cost, block_tokens
        self._cache = {}  # (instance, block, offset) -> (request, position, token)
        self._work = {}

    def run(self, work) -> Outcome:
        self._work[work.id] = work
        if isinstance(work, Transfer):
            return self._move(work)
        for part in work.slices:
            assert len(part.blocks) == math.ceil((part.start + part.count) / self._size)
            assert part.tokens == self._truth(part.request, part.start, part.count)
            self._check(work.instance, part.blocks, part.request, part.start)
            for position, value in enumerate(part.tokens, part.start):
                slot = self._slot(work.instance, part.blocks, position)
                self._cache[slot] = (part.request.id, position, value)
        tokens = [token(p.request, p.sample_index) for p in work.slices if p.samples]
        return Outcome(self._cost.stages_s(work.instance, work.load), tuple(tokens))

    def done(self, events) -> None:
        """Checks, when work is done, that the KV it read and wrote is still intact."""
        for event in events:
            if isinstance(event, Down):
                lost = [slot for slot in self._cache if slot[0] == event.instance]
                for slot in lost:
                    del self._cache[slot]
            if not isinstance(event, Done):
                continue
            work = self._work.pop(event.work)
            if isinstance(work, Transfer):
                self._check_moved(work, work.src, work.src_blocks)
                self._check_moved(work, work.dst, work.dst_blocks)
            else:
                for part in work.slices:
                    end = part.start + part.count
                    self._check(work.instance, part.blocks, part.request, end)

    def _move(self, work: Transfer) -> Outcome:
        assert len(work.src_blocks) == len(work.dst_blocks)
        self._check_moved(work, work.src, work.src_blocks)
        for position in range(work.context):
            source = self._slot(work.src, work.src_blocks, position)
            target = self._slot(work.dst, work.dst_blocks, position)
            self._cache[target] = self._cache[source]
        hop = self._cost.hop(work)
        return Outcome(hop.parts_s, bytes=work.context)

    def _check(self, instance, blocks, request: Request, context: int) -> None:
        self._check_part(instance, blocks, request, 0, context)

    def _check_moved(self, work: Transfer, instance, blocks) -> None:
        self._check_part(instance, blocks, work.request, work.start, work.context)

    def _check_part(self, instance, blocks, request, start: int, count: int) -> None:
        """The KV of `count` tokens from `start` on is in `blocks`, from their front."""
        for i, value in enumerate(self._truth(request, start, count)):
            slot = self._slot(instance, blocks, i)
            assert self._cache.get(slot) == (request.id, start + i, value)

    def _slot(self, instance, blocks, position):
        return instance, blocks[position // self._size], position % self._size

    def _truth(self, request: Request, start: int, count: int) -> tuple[int, ...]:
        size, end = request.prompt_tokens, start + count
        generated = tuple(token(request, n) for n in range(max(0, end - size)))
        return (request.prompt + generated)[start:end]


class Run:
    """Drives a controller turn by turn, to put it into a state and then disturb it."""

    def __init__(self, controller: Controller, cost=SECOND, block_tokens=4):
        self.controller, self.works = controller, []
        self._engine = CheckingEngine(cost, block_tokens)
        self._backend = VirtualBackend(self._engine)

    def turn(self, *events):
        """Tells the controller `events` now, or else what is done next."""
        events = events or self._backend.wait(math.inf)
        for event in events:
            if isinstance(event, Down):
                self._backend.drop(event.instance)
        works = self.controller.step(self._backend.now_s(), events)
        self._engine.done(events)
        self.works += works
        for work in works:
            self._backend.submit(work)
        return works

    def until(self, id: int, place: Place) -> None:
        """Goes on until request `id` is in `place`."""
        for _ in range(_MAX_TURNS):
            if self.place(id) is place:
                return
            self.turn()
        raise AssertionError(f"request {id} was never {place}, but {self.place(id)}")

    def finish(self) -> None:
        """Goes on until nothing is in flight."""
        for _ in range(_MAX_TURNS):
            if not self.controller.in_flight:
                return
            self.turn()
        left = self.controller.in_flight
        raise AssertionError(f"{left} pieces of work after {_MAX_TURNS} turns")

    def place(self, id: int) -> Place:
        return self.controller._requests[id].place

    def timeline(self, id: int):
        return next(t for t in self.controller.timelines if t.request.id == id)

    @property
    def steps(self) -> list[Step]:
        return [work for work in self.works if isinstance(work, Step)]

    @property
    def transfers(self) -> list[Transfer]:
        return [work for work in self.works if isinstance(work, Transfer)]


def assert_all_free(controller: Controller) -> None:
    for instance in controller.instances:
        assert instance.blocks.free == instance.blocks.memory.num_blocks
        assert not instance.blocks.held_by
        assert instance.step is None
        assert instance.load == 0 and not instance.parked


def assert_served(timeline) -> None:
    """Finished, with exactly the tokens it should have."""
    assert timeline.status is Status.FINISHED
    assert timeline.tokens == expected_tokens(timeline.request)
    assert len(timeline.token_s) == len(timeline.tokens)
