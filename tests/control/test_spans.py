"""Spans of decode iterations change how fast a simulation runs, and nothing else."""

import dataclasses

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import KVMemory, Role
from disagg_jax.runlog.event_log import EventLog, replay
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Progress, Step, TruncateSpan
from tests.control.test_controller_properties import Case, cases, deploy, streamed_cases
from tests.serving import assert_all_free, make_request


class Watch:
    """Counts what happened, and checks that spans are told completely and in order."""

    def __init__(self):
        self.spans = self.cuts = self.turns = 0
        self.left = {}  # work id -> iterations still to be told

    def __call__(self, now_s, events, works):
        self.turns += 1
        for told in events:
            if isinstance(told, Progress):
                assert told.ends_s and told.ends_s[-1] <= now_s
                self.left[told.work] -= len(told.ends_s)
                assert self.left[told.work] > 0
        for work in works:
            if isinstance(work, Step) and work.iterations > 1:
                self.spans += 1
                self.left[work.id] = work.iterations
            self.cuts += isinstance(work, TruncateSpan)


def lengths_only(case: Case) -> list:
    return [dataclasses.replace(r, prompt=None) for r in case.requests]


def run(case: Case, spans: bool):
    requests = lengths_only(case)
    controller = case.controller(spans)
    backend, watch = VirtualBackend(CostExecutor(case.cost)), Watch()
    timelines = serve(controller, backend, requests, case.interventions, watch)
    assert_all_free(controller)
    busy_s = {key: seconds for key, seconds in backend.busy_s.items() if seconds}
    return ([dataclasses.asdict(t) for t in timelines], busy_s), watch


@st.composite
def lasting_cases(draw, of=cases) -> Case:
    """Every step takes time, so that no two iterations end at one instant."""
    case = draw(of())
    costs = st.sampled_from([0.5, 1.0, 1.25, 3.0])
    cost = dataclasses.replace(
        case.cost,
        step_base_s=draw(costs),
        context_token_s=draw(st.sampled_from([0.0, 0.25])),
    )
    requests = [
        dataclasses.replace(r, max_tokens=r.max_tokens, eos_token=None)
        for r in case.requests
    ]
    return dataclasses.replace(case, cost=cost, requests=requests)


@given(lasting_cases())
def test_a_run_with_spans_is_the_run_without(case: Case):
    with_spans, watch = run(case, spans=True)
    without, _ = run(case, spans=False)
    assert with_spans == without
    event(f"spans: {watch.spans > 0}")
    event(f"cuts: {watch.cuts > 0}")


@given(lasting_cases(streamed_cases))
def test_the_same_where_kv_leaves_chunk_by_chunk(case: Case):
    assert run(case, spans=True)[0] == run(case, spans=False)[0]


@given(lasting_cases() | lasting_cases(streamed_cases))
def test_a_log_of_spans_replays(case: Case):
    """The log has all progress that was asked for, before all else of its turn."""
    log = EventLog()
    backend = VirtualBackend(CostExecutor(case.cost))
    requests = lengths_only(case)
    serve(case.controller(True), backend, requests, case.interventions, log)
    assert list(replay(log.lines, case.controller(True))) == []


def test_kv_may_arrive_where_an_iteration_has_just_begun():
    # At 1 an iteration of request 0 on instance 1 ends; its next one begins before the
    # prompt of request 2 sends its KV there, so that this waits for the end at 1.5.
    cost = LinearCost(step_base_s=0.5)
    case = Case(
        deployment=deploy(prefill=1, decode=2, colocated=0),
        policies={
            Role.PREFILL: PrefillOnly(token_budget=1, max_seqs=1),
            Role.DECODE: DecodeOnly(max_seqs=2, watermark=0.0),
        },
        memory=[KVMemory(num_blocks=4, block_tokens=2, max_context=14)] * 3,
        cost=cost,
        requests=[make_request(i, prompt=1, out=n) for i, n in enumerate((7, 2, 2))],
        interventions=[],
        streams=True,
    )
    (timelines, _), _ = run(case, spans=True)
    assert timelines[0]["token_s"] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def test_room_for_kv_on_its_way_in_is_what_a_span_has_left_by_then():
    # Request 0 decodes on 6 blocks of 2 tokens, all its iterations at once. By 5 it has
    # 3 of them, so that the 4 of request 1 have no room, which they had at first.
    case = Case(
        deployment=deploy(prefill=1, decode=1, colocated=0),
        policies={
            Role.PREFILL: PrefillOnly(token_budget=1, max_seqs=1),
            Role.DECODE: DecodeOnly(max_seqs=2, watermark=0.0),
        },
        memory=[KVMemory(num_blocks=n, block_tokens=2, max_context=14) for n in (4, 6)],
        cost=LinearCost(step_base_s=0.5, context_token_s=0.25),
        requests=[
            make_request(0, prompt=1, out=5),
            make_request(1, 5.0, prompt=6, out=2),
        ],
        interventions=[],
        streams=True,
    )
    assert run(case, spans=True)[0] == run(case, spans=False)[0]


@pytest.mark.parametrize("out", [6, 7, 13])
@pytest.mark.parametrize("streams", [False, True])
def test_a_span_ends_before_it_needs_blocks_that_kv_on_its_way_in_has_taken(
    streams, out
):
    # Decode has 5 blocks of 4 tokens. From 11 on request 0 decodes alone in 2 of them,
    # all its iterations at once. Before 13 the KV of request 1 reserves the other 3 and
    # is there at 22.5; after 15 request 0 needs a third, be it for its last iteration,
    # and is preempted.
    case = Case(
        deployment=deploy(prefill=1, decode=1, colocated=0),
        policies={Role.PREFILL: PrefillOnly(), Role.DECODE: DecodeOnly()},
        memory=[
            KVMemory(num_blocks=n, block_tokens=4, max_context=100) for n in (9, 5)
        ],
        cost=LinearCost(step_base_s=1.0, transfer_base_s=10.0),
        requests=[
            make_request(0, prompt=4, out=out),
            make_request(1, 11.5, prompt=11, out=2),
        ],
        interventions=[],
        streams=streams,
    )
    with_spans, watch = run(case, spans=True)
    without, _ = run(case, spans=False)
    assert with_spans == without
    timelines, _ = with_spans
    assert [len(timeline["dropped_s"]) for timeline in timelines] == [1, 0]
    assert watch.cuts == 1
