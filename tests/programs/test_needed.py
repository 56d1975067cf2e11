"""The shapes that known requests need: enough for any step of them, and few."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.control.backend import Outcome
from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.programs import Buckets, StepShape, needed_buckets
from disagg_jax.request import Request, Status
from disagg_jax.scheduling import SYSTEMS, get_system
from disagg_jax.work import Step, Task

MEMORY = KVMemory(num_blocks=1000, max_context=1024)
SMALL = KVMemory(num_blocks=9, block_tokens=4, max_context=36)


def ask(*lengths: tuple[int, int]) -> list[Request]:
    """Requests of (prompt, output) tokens that arrive at once."""
    return [
        Request(id=i, arrival_s=0, prompt_tokens=prompt, max_tokens=output)
        for i, (prompt, output) in enumerate(lengths)
    ]


def needed(system: str, role: Role, memory: KVMemory, requests) -> Buckets:
    return needed_buckets(get_system(system)[role].limits, memory, requests)


class Rounding:
    """An executor that only looks up the shape of each step and transfer."""

    def __init__(self, buckets: list[Buckets]):
        self.buckets = buckets
        self.steps = 0

    def run(self, work: Task) -> Outcome:
        if isinstance(work, Step):
            self.steps += 1
            self.buckets[work.instance].step_shape(tuple(work.slices))
            return Outcome((0.25,), tokens=(1,) * sum(s.samples for s in work.slices))
        self.buckets[work.src].transfer_size(len(work.src_blocks))
        return Outcome((0.125,))


def serve_all(system: str, memory: KVMemory, requests: list[Request]) -> int:
    """Serves with the shapes that are needed; returns how many were preempted."""
    policies = get_system(system)
    apart = Role.PREFILL in policies
    text = "prefill:tp1,decode:tp1" if apart else "2xcolocated:tp1"
    deployment = Deployment.parse(text)
    roles = [spec.role for spec in deployment.instances]
    executor = Rounding([needed(system, role, memory, requests) for role in roles])
    controller = Controller(deployment, policies, [memory] * len(roles))
    timelines = serve(controller, VirtualBackend(executor), requests)
    assert {timeline.status for timeline in timelines} == {Status.FINISHED}
    assert executor.steps
    return sum(timeline.preemptions > 0 for timeline in timelines)


@pytest.mark.parametrize("system", SYSTEMS)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 16)), min_size=1))
def test_every_step_has_a_shape_in_a_pool_too_small_for_all(system, lengths):
    serve_all(system, SMALL, ask(*lengths))


@pytest.mark.parametrize("system", SYSTEMS)
@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 20)), min_size=1))
def test_every_step_has_a_shape_in_a_pool_for_all(system, lengths):
    memory = dataclasses.replace(MEMORY, num_blocks=4000)
    assert not serve_all(system, memory, ask(*lengths))


def test_some_of_these_were_preempted():
    """Otherwise the small pool would show nothing."""
    assert serve_all("vllm_v0", SMALL, ask(*[(8, 16)] * 6))
    assert serve_all("disaggregated", SMALL, ask(*[(8, 16)] * 6))


def test_there_is_one_of_a_kind():
    requests = ask((100, 40), (30, 40), (9, 40), (200, 40), (7, 12))
    prefill = needed("disaggregated", Role.PREFILL, MEMORY, requests)
    # 346 tokens are rounded up to 384, the longest prompt to 256: 16 blocks.
    assert prefill.step_shapes == (StepShape.prefill(384, 6),)
    assert prefill.transfer_blocks == (16,)
    decode = needed("disaggregated", Role.DECODE, MEMORY, requests)
    # 9 + 5 + 3 + 15 + 2 blocks at the end are rounded up to 48.
    assert decode.step_shapes == (StepShape.decode(6, 48),)


def test_few_short_prompts_share_their_shapes():
    for role in (Role.PREFILL, Role.DECODE):
        one, other = (
            needed("disaggregated", role, MEMORY, ask(*lengths))
            for lengths in ([(4, 20)], [(9, 30), (7, 64), (40, 8)])
        )
        assert one == other


def test_a_prompt_over_the_budget_has_a_shape_of_its_own():
    found = needed("disaggregated", Role.PREFILL, MEMORY, ask((900, 9), (90, 9)))
    assert [shape.tokens for shape in found.prefill] == [96, 1024]


def test_more_requests_than_rows_may_not_decode_at_once():
    """256 of 300 requests have 3 blocks each."""
    memory = dataclasses.replace(MEMORY, num_blocks=4000)
    found = needed("disaggregated", Role.DECODE, memory, ask(*[(30, 9)] * 300))
    assert found.decode_rows == (256,)
    assert found.pool_blocks == (768,)


def test_generated_tokens_count_where_the_pool_is_too_small():
    """Then 219 tokens may be computed again, 256 rounded up; and 438 together, 512."""
    requests = ask((20, 200), (20, 200))
    for blocks, sizes, transfers in ((20, [64, 512], (4, 16)), (28, [64], (4,))):
        memory = KVMemory(num_blocks=blocks, max_context=300)
        found = needed("disaggregated", Role.PREFILL, memory, requests)
        assert [shape.tokens for shape in found.prefill] == sizes
        assert found.transfer_blocks == transfers
