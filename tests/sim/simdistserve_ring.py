"""DistServe's simulator with pipeline stages, restated from its rules as an oracle.

Only the queues are here (LLMServe/DistServe @ 82831f16); step times are the cost
model's. An instance is a ring of workers, one for each stage. A worker that is free
takes a prompt batch that waits for it, or else whatever decodes wait for it: requests
have no micro-batch that they stay in.
"""

import collections
import dataclasses
import heapq
import itertools

from disagg_jax.work import StepLoad

TOKEN_CAP = 50_000  # of a decode batch, contexts with the new tokens


@dataclasses.dataclass(eq=False)
class Asked:
    """A request on its way. Times in s; it generates `outputs` + 1 tokens."""

    arrival_s: float
    prompt: int
    outputs: int
    steps: int = 0  # decode steps over
    first_s: float = 0.0
    end_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_s) / self.outputs


@dataclasses.dataclass(eq=False)
class Ring:
    """An instance: for each stage what waits for it, and whether it works."""

    cost: object  # InstanceCost
    stages: int
    budget: int = 0  # prompt tokens of a batch
    prompts: list = dataclasses.field(init=False)
    decodes: list = dataclasses.field(init=False)
    busy: list = dataclasses.field(init=False)

    def __post_init__(self):
        self.prompts = [collections.deque() for _ in range(self.stages)]
        self.decodes = [collections.deque() for _ in range(self.stages)]
        self.busy = [False] * self.stages

    def take(self, stage: int):
        """(load, is a prompt batch, requests) of the next step of a stage, or None."""
        if self.prompts[stage]:
            if stage:
                batch = self.prompts[stage].popleft()
            else:
                batch = _head(self.prompts[0], self.budget, lambda r: r.prompt)
            chunks = tuple((0, request.prompt) for request in batch)
            return StepLoad(chunks, 0, 0), True, batch
        batch = _head(self.decodes[stage], TOKEN_CAP, _attended)
        if not batch:
            return None
        return StepLoad((), len(batch), sum(map(_attended, batch))), False, batch


def _attended(request: Asked) -> int:
    return request.prompt + request.steps + 1


def _head(queue, cap: int, size) -> list[Asked]:
    batch, total = [], 0
    while queue and total + size(queue[0]) <= cap:
        total += size(queue[0])
        batch.append(queue.popleft())
    return batch


def simulate(requests: list[Asked], prefill: Ring, decode: Ring) -> None:
    """Writes `first_s` and `end_s` of every request; the two may be one ring."""
    count = itertools.count()
    heap = [(r.arrival_s, next(count), None, r) for r in requests]
    heapq.heapify(heap)
    rings = [prefill] if prefill is decode else [prefill, decode]
    while heap:
        now_s = heap[0][0]
        while heap and heap[0][0] == now_s:  # all of an instant before anybody picks
            _, _, work, what = heapq.heappop(heap)
            if work is None:
                prefill.prompts[0].append(what)
            else:
                _finish(now_s, work, what, decode)
        for ring in rings:
            for stage in range(ring.stages):
                if ring.busy[stage] or (taken := ring.take(stage)) is None:
                    continue
                load, is_prompt, batch = taken
                ring.busy[stage] = True
                end_s = now_s + ring.cost.stages_s(load)[stage]
                work = (ring, stage, is_prompt)
                heapq.heappush(heap, (end_s, next(count), work, batch))


def _finish(now_s: float, work, batch: list[Asked], decode: Ring) -> None:
    ring, stage, is_prompt = work
    ring.busy[stage] = False
    if stage + 1 < ring.stages:
        if is_prompt:
            ring.prompts[stage + 1].append(batch)
        else:
            ring.decodes[stage + 1].extend(batch)
        return
    for request in batch:
        if is_prompt:
            request.first_s = now_s
        else:
            request.steps += 1
            request.end_s = now_s
        if request.steps < request.outputs:
            decode.decodes[0].append(request)
