"""Policies as tables: (queue, running, free blocks) -> the next step."""

import pytest

from disagg_jax.control.instance_index import InstanceIndex
from disagg_jax.control.request_state import Place
from disagg_jax.deployment import Role
from disagg_jax.scheduling import SYSTEMS, find_system, get_system
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.routing import least_loaded, shortest_queue
from disagg_jax.scheduling.simdistserve import RoundRobinDecode
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.work import Arrived
from tests.instances import ROWS, case, make_instance, planned, state
from tests.serving import Run, make_controller, with_prompt

PREFILL_FIRST = [
    case("nothing to do", {}),
    case("prompts share a step", {0: 4, 1: 4}, waiting={0: 4, 1: 4}, free=2),
    case(
        "in queue order, not in order of arrival",
        {1: 4, 0: 4},
        waiting={1: 4, 0: 4},
    ),
    case(
        "the first misfit stops admission, though the next would fit",
        {0: 4},
        waiting={0: 4, 1: 9, 2: 4},
        free=3,
    ),
    case(
        "cap reached exactly",
        {0: 4, 1: 4},
        waiting={0: 4, 1: 4, 2: 1},
        limits={"max_batched_tokens": 8},
    ),
    case(
        "the first beyond the cap stops admission",
        {0: 4},
        waiting={0: 4, 1: 5, 2: 1},
        limits={"max_batched_tokens": 8},
    ),
    case(
        "a prompt longer than the cap runs alone",
        {0: 9},
        waiting={0: 9, 1: 1},
        limits={"max_batched_tokens": 8},
    ),
    case(
        "a prompt longer than the cap waits for its turn to be first",
        {0: 1},
        waiting={0: 1, 1: 9},
        limits={"max_batched_tokens": 8},
    ),
    case(
        "max_seqs counts the running ones",
        {2: 1},
        waiting={2: 1, 3: 1},
        running={0: 2, 1: 2},
        limits={"max_seqs": 3},
    ),
    case(
        "decode when max_seqs run",
        {0: 1},
        waiting={1: 1},
        running={0: 2},
        limits={"max_seqs": 1},
    ),
    case("prefill before decode", {1: 4}, waiting={1: 4}, running={0: 2}),
    case(
        "decode when the head of the queue does not fit",
        {0: 1},
        waiting={1: 9, 2: 1},
        running={0: 2},
        free=2,
    ),
    case(
        "the watermark is rounded down to whole blocks",
        {1: 4},  # 3 of 4 blocks are free, 2 then; 0.65 x 4 = 2.6 are kept free
        waiting={1: 4},
        running={0: 4},
        free=3,
        limits={"watermark": 0.65},
    ),
    case(  # 1 + 9 blocks, 5 of them in reserve: 4 can be given away, no fifth
        "admission leaves the watermark free",
        {1: 16},
        waiting={1: 16, 2: 1},
        running={0: 2},
        free=9,
        limits={"watermark": 0.5},
    ),
    case(
        "decodes may use the watermark",
        {0: 1},
        running={0: 5},
        free=1,
        limits={"watermark": 0.9},
    ),
    case(
        "an empty instance admits below the watermark, but one only",
        {0: 36},
        waiting={0: 36, 1: 1},
        free=10,
        limits={"watermark": 0.5},
    ),
    case(
        "not even an empty instance admits more than fits", {}, waiting={0: 5}, free=1
    ),
]


@pytest.mark.parametrize(ROWS, PREFILL_FIRST)
def test_prefill_first(places, limits, expected, preempt):
    instance = make_instance(**places)
    assert planned(PrefillFirst(**limits), instance) == (expected, preempt)


# A request of 5 known tokens has one full block of 4 and needs another to go on; one of
# 2 has room in its block.
DECODES = [
    case("all running, earliest first", {0: 1, 1: 1, 2: 1}, running={2: 2, 0: 2, 1: 2}),
    case("a full block needs another", {0: 1, 1: 1}, running={0: 5, 1: 5}, free=2),
    case("no block needed, none free", {0: 1, 1: 1}, running={0: 2, 1: 4}, free=0),
    case(
        "the latest arrival makes room, wherever it stands",
        {0: 1, 1: 1},
        [2],
        running={2: 2, 0: 5, 1: 2},
        free=0,
    ),
    case(
        "several victims, latest first",
        {0: 1, 1: 1},
        [3, 2],
        running={0: 5, 1: 5, 2: 2, 3: 2},
        free=0,
    ),
    case(
        "one victim with blocks for two",
        {0: 1, 1: 1},
        [2],
        running={0: 5, 1: 5, 2: 8},
        free=0,
    ),
    case("the latest makes room itself", {0: 1}, [1], running={0: 5, 1: 5}, free=1),
    case(
        "an earlier one is never the victim of a later one",
        {0: 1},
        [1],
        running={0: 2, 1: 5},
        free=0,
    ),
    case("even the only one makes room", {}, [0], running={0: 5}, free=0),
    case(
        "KV on its way in cannot make room",
        {},
        [0],
        running={0: 5},
        arriving={1: 9},
        free=0,
    ),
]


@pytest.mark.parametrize("policy", [PrefillFirst, DecodeOnly])
@pytest.mark.parametrize(ROWS, DECODES)
def test_decode(policy, places, limits, expected, preempt):
    instance = make_instance(**places)
    assert planned(policy(**limits), instance) == (expected, preempt)


@pytest.mark.parametrize("policy", [PrefillFirst(), DecodeOnly()])
@pytest.mark.parametrize(
    ("running", "free", "lasts"),
    [({0: 5, 1: 5}, 2, True), ({0: 2, 1: 5}, 1, True), ({0: 5, 1: 5}, 1, False)],
)
def test_a_plan_that_preempts_nobody_lasts(policy, running, free, lasts):
    plan = policy.plan(make_instance(running=running, free=free, out=9))
    assert (plan.repeats > 1) == lasts
    assert bool(plan.preempt) != lasts


PREFILL_ONLY = [
    case("nothing to do", {}),
    case(
        "L_m reached exactly",
        {0: 4, 1: 4},
        waiting={0: 4, 1: 4, 2: 1},
        limits={"token_budget": 8},
    ),
    case(
        "the first beyond L_m stops the batch, though the next would fit",
        {0: 4},
        waiting={0: 4, 1: 5, 2: 1},
        limits={"token_budget": 8},
    ),
    case(
        "a prompt longer than L_m runs alone",
        {0: 9},
        waiting={0: 9, 1: 1},
        limits={"token_budget": 8},
    ),
    case(
        "a prompt longer than L_m waits for its turn to be first",
        {0: 1},
        waiting={0: 1, 1: 9},
        limits={"token_budget": 8},
    ),
    case("memory stops the batch", {0: 4}, waiting={0: 4, 1: 5, 2: 1}, free=2),
    case("no memory, no step", {}, waiting={0: 5}, free=1),
    case(
        "at most max_seqs",
        {0: 1, 1: 1},
        waiting={0: 1, 1: 1, 2: 1},
        limits={"max_seqs": 2},
    ),
]


@pytest.mark.parametrize(ROWS, PREFILL_ONLY)
def test_prefill_only(places, limits, expected, preempt):
    instance = make_instance(**places)
    assert planned(PrefillOnly(**limits), instance) == (expected, preempt)


PREFILL_CHUNKED = [
    case("the last free block", {0: 4}, waiting={0: 4, 1: 1}, free=1),
    case(
        "no more prompts than may be, begun ones among them",
        {0: 2, 1: 2},
        partial={0: (4, 2), 1: (4, 2), 2: (4, 2)},
        waiting={3: 4},
        limits={"max_seqs": 2},
    ),
    case("nothing to do", {}),
    case("a prompt in full", {0: 8}, waiting={0: 8}),
    case(
        "as much as the budget",
        {0: 10},
        limits={"token_budget": 10},
        waiting={0: 50, 1: 3},
    ),
    case(
        "what was begun goes on first, and the next fills the step",
        {0: 2, 1: 8},
        limits={"token_budget": 10},
        partial={0: (12, 10)},
        waiting={1: 20},
    ),
    case(
        "several that were begun, in order of arrival",
        {0: 6, 1: 4},
        limits={"token_budget": 10},
        partial={1: (20, 4), 0: (12, 6)},
    ),
    case(
        "blocks for all of a prompt, or it is not begun",
        {},
        limits={"token_budget": 4},
        waiting={0: 12},
        free=2,
    ),
    case(
        "nobody overtakes",
        {0: 4},
        waiting={0: 4, 1: 12, 2: 4},
        free=3,
    ),
    case(
        "so many prompts",
        {0: 2, 1: 3},
        limits={"max_seqs": 2},
        partial={0: (4, 2)},
        waiting={1: 3, 2: 3},
    ),
]


@pytest.mark.parametrize(ROWS, PREFILL_CHUNKED)
def test_prefill_chunked(places, limits, expected, preempt):
    instance = make_instance(**places)
    assert planned(PrefillChunked(**limits), instance) == (expected, preempt)
    for chunk in PrefillChunked(**limits).plan(instance).chunks:
        assert chunk.reserve == chunk.request.num_tokens


# A request of 5 known tokens is pulled into 2 blocks: its KV, and room for one token.
@pytest.mark.parametrize(
    ("places", "limits", "pulls"),
    [
        pytest.param({"free": 2}, {}, True, id="fits exactly"),
        pytest.param({"free": 1}, {}, False, id="room for the KV, none for a token"),
        pytest.param(
            {"free": 2},
            {"watermark": 1.0},
            True,
            id="an empty instance keeps no reserve",
        ),
        pytest.param(
            {"running": {0: 2}, "free": 9},
            {"watermark": 0.7},
            True,
            id="at the watermark",
        ),
        pytest.param(
            {"running": {0: 2}, "free": 9}, {"watermark": 0.8}, False, id="below it"
        ),
        pytest.param(
            {"arriving": {0: 2}, "free": 9},
            {"watermark": 0.8},
            False,
            id="an instance with KV on its way in is not empty",
        ),
        pytest.param({"running": {0: 2}}, {"max_seqs": 2}, True, id="max_seqs reached"),
        pytest.param(
            {"running": {0: 2}}, {"max_seqs": 1}, False, id="max_seqs exceeded"
        ),
        pytest.param(
            {"running": {0: 2}, "arriving": {1: 2}},
            {"max_seqs": 2},
            False,
            id="max_seqs counts KV on its way in",
        ),
    ],
)
def test_decode_only_pulls(places, limits, pulls):
    assert (
        DecodeOnly(**limits).admits_pull(make_instance(**places), state(9, 5)) is pulls
    )


@pytest.mark.parametrize(
    ("router", "instances", "picked"),
    [
        (shortest_queue, [{}, {}], 0),
        (shortest_queue, [{"waiting": {0: 1}}, {}, {}], 1),
        # Queue before load: one waits at the first, three run at the second.
        (shortest_queue, [{"waiting": {0: 1}}, {"running": {1: 2, 2: 2, 3: 2}}], 1),
        (shortest_queue, [{"running": {1: 2, 2: 2}}, {"running": {1: 2}}], 1),
        (least_loaded, [{}, {}], 0),
        (least_loaded, [{"running": {0: 2}}, {"running": {1: 2}}], 0),
        (least_loaded, [{"running": {0: 2}}, {"arriving": {1: 2}}, {}], 2),
        (least_loaded, [{"running": {0: 2, 1: 2}}, {"waiting": {2: 2}}], 1),
    ],
)
def test_router_picks_the_least_and_of_equals_the_first(router, instances, picked):
    views = [make_instance(id=i, **places) for i, places in enumerate(instances)]
    index = InstanceIndex(views, look=lambda instance: None)
    assert router(state(9, 5), index) is views[picked]


def test_a_first_prefill_in_progress_counts_as_queued_and_a_decode_does_not():
    run = Run(make_controller("2xcolocated:tp1"))
    first, second = run.controller.instances
    run.turn(Arrived(with_prompt(0, out=3)))
    assert (first.queued, second.queued) == (1, 0)
    index = InstanceIndex([first, second], look=lambda instance: None)
    assert shortest_queue(state(9, 5), index) is second
    run.turn()
    assert run.place(0) is Place.STEPPING
    assert (first.queued, second.queued) == (0, 0)


@pytest.mark.parametrize(
    ("cap", "decodes", "repeats"),
    [
        # Two requests of 4 cached tokens attend to 10 tokens, then to 12, 14, 16.
        (10, {0: 1, 1: 1}, 1),
        (11, {0: 1, 1: 1}, 1),
        (12, {0: 1, 1: 1}, 2),
        (15, {0: 1, 1: 1}, 3),
        (16, {0: 1, 1: 1}, 4),
        (9, {0: 1}, 1),  # the head of the queue, and others come next
        (5, {0: 1}, 1),
    ],
)
def test_distserves_decodes_attend_to_a_cap_of_tokens(cap, decodes, repeats):
    policy = RoundRobinDecode(token_cap=cap)
    instance = make_instance(running={0: 5, 1: 5}, out=9)
    assert planned(policy, instance) == (decodes, [])
    assert policy.plan(instance).repeats == repeats


def test_which_disaggregated_system_computes_prompts_in_parts():
    splits = {
        name: roles[Role.PREFILL].limits.splits
        for name, roles in SYSTEMS.items()
        if Role.PREFILL in roles
    }
    assert splits == {"disaggregated": False, "disaggregated_chunked": True}


def test_unknown_system_is_named():
    with pytest.raises(
        ValueError, match="system: expected one of .*'vllm_v0'.*got 'fastest'"
    ):
        get_system("fastest")
    assert all(get_system(name) is SYSTEMS[name] for name in SYSTEMS)


def test_a_system_is_found_by_its_name_of_today_or_before():
    assert get_system("vllm") is get_system("vllm_v0") is SYSTEMS["vllm_v0"]
    assert find_system("vllm", ["orca", "vllm_v0"]) == "vllm_v0"
    assert find_system("vllm_v0", ["orca", "vllm"]) == "vllm"
    assert find_system("vllm", ["vllm_v0", "vllm"]) == "vllm"
    assert find_system("vllm", ["orca"]) == "vllm"
