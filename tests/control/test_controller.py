"""The controller, scenario by scenario, with stamps worked out by hand.

Costs are binary fractions, so that every stamp is exact.
"""

import dataclasses
import itertools
import math

import pytest

from disagg_jax.control.controller import Controller
from disagg_jax.control.loop import serve
from disagg_jax.control.request_state import Place
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.metrics import stages_s
from disagg_jax.request import Status
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Plan
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Arrived, Cancelled, Done, Down, Step, Up
from tests.serving import (
    POLICIES,
    SECOND,
    CheckingEngine,
    Run,
    assert_all_free,
    assert_served,
    make_controller,
    make_request,
    with_prompt,
)

PAIR = "prefill:tp1,decode:tp1"
SYSTEMS = ["colocated:tp1", PAIR]

# A step takes 1 s and 1/4 s for each prompt token; a transfer 1 s.
COST = LinearCost(step_base_s=1.0, prefill_token_s=0.25, transfer_base_s=1.0)


def simulate(controller, requests, cost=COST, interventions=()):
    backend = VirtualBackend(CostExecutor(cost))
    timelines = serve(controller, backend, requests, interventions)
    assert_all_free(controller)
    return timelines


# ---- stamps --------------------------------------------------------------------------


def test_colocated_request_alone():
    cost = dataclasses.replace(COST, decode_token_s=0.5)
    request = make_request(arrival_s=1.0, prompt=4, out=3)
    (timeline,) = simulate(make_controller(), [request], cost)
    # Prefill of 4 tokens: 1 + 4/4 = 2 s, 1 -> 3. Each decode: 1 + 1/2 s.
    assert timeline.prefill_start_s == 1.0
    assert timeline.token_s == [3.0, 4.5, 6.0]
    assert timeline.decode_start_s == 3.0
    assert timeline.end_s == 6.0
    assert timeline.transfer_start_s is timeline.transfer_end_s is None
    assert timeline.status is Status.FINISHED


def test_a_prefill_stalls_the_decodes_beside_it():
    requests = [
        make_request(0, prompt=4, out=4),
        make_request(1, arrival_s=2.5, prompt=8, out=1),
    ]
    first, second = simulate(make_controller(), requests)
    # 0-2 prefill of 0; 2-3 decode; 3-6 prefill of 1 (1 + 8/4 s); 6-7, 7-8 decodes.
    assert first.token_s == [2.0, 3.0, 7.0, 8.0]
    assert second.prefill_start_s == 3.0
    assert second.token_s == [6.0]


def test_disaggregated_request_has_five_stages():
    policies = {Role.PREFILL: PrefillOnly(max_seqs=1)}
    requests = [make_request(0, prompt=4, out=5), make_request(1, prompt=6, out=3)]
    _, timeline = simulate(make_controller(PAIR, policies=policies), requests)
    # Prefill: 0-2 request 0, 2-4.5 request 1 (1 + 6/4 s). Transfers: 2-3, 4.5-5.5.
    # Decode of 0: 3-4, 4-5, 5-6; both: 6-7, 7-8.
    assert timeline.prefill_start_s == 2.0
    assert timeline.transfer_start_s == 4.5
    assert timeline.transfer_end_s == 5.5
    assert timeline.decode_start_s == 6.0
    assert timeline.token_s == [4.5, 7.0, 8.0]
    stages = dataclasses.asdict(stages_s(timeline))
    assert list(stages.values()) == [2.0, 2.5, 1.0, 0.5, 2.0]


def test_first_token_comes_from_prefill_at_its_end():
    request = make_request(arrival_s=0.5, prompt=4, out=2)
    (timeline,) = simulate(make_controller(PAIR), [request])
    assert timeline.token_s[0] == 2.5  # 0.5 + 1 + 4/4
    assert timeline.transfer_start_s == 2.5
    assert timeline.token_s[1] == 4.5  # after 1 s of transfer and 1 s of decode


@pytest.mark.parametrize("deployment", SYSTEMS)
def test_one_token_needs_prefill_only(deployment):
    controller = make_controller(deployment)
    run = Run(controller)
    run.turn(Arrived(with_prompt(out=1)))
    run.finish()
    assert_served(run.timeline(0))
    assert run.timeline(0).decode_start_s is None
    assert (len(run.steps), run.transfers) == (1, [])
    assert_all_free(controller)


def test_a_mix_serves_on_every_instance():
    deployment = "2xprefill:tp1,3xdecode:tp1,2xcolocated:tp1"
    requests = [with_prompt(i, i / 4, prompt=1 + i % 5, out=4) for i in range(40)]
    controller = make_controller(deployment)
    engine = CheckingEngine(COST)
    works = []
    timelines = serve(
        controller,
        VirtualBackend(engine),
        requests,
        observer=lambda now_s, events, new: (engine.done(events), works.extend(new)),
    )
    for timeline in timelines:
        assert_served(timeline)
    busy = {work.instance for work in works if isinstance(work, Step)}
    assert busy == set(range(7))
    assert_all_free(controller)


# ---- prefill and decode at their own pace --------------------------------------------


def first_tokens(decode_token_s, **fields):
    cost = dataclasses.replace(COST, decode_token_s=decode_token_s)
    requests = [make_request(i, i / 2, prompt=4, out=20) for i in range(30)]
    return [
        t.token_s[0] for t in simulate(make_controller(PAIR, **fields), requests, cost)
    ]


def test_slow_decode_does_not_pace_prefill():
    assert first_tokens(1.0) == first_tokens(100.0)


def test_slow_decode_paces_prefill_once_its_memory_is_full():
    # Decode holds few, so most KV waits in the 10 blocks (requests) of prefill.
    fast, slow = (first_tokens(s, blocks=[10, 7]) for s in (1.0, 100.0))
    assert fast[:10] == slow[:10]
    assert slow[-1] > 10 * fast[-1]


def test_a_pull_waits_for_decode_memory_while_prefill_holds_the_blocks():
    # One block each: request 1 (4 prompt tokens, 1 block at prefill, 2 at decode) fits
    # into the decode side's 2 blocks only when request 0 has left it.
    controller = make_controller(PAIR, blocks=[4, 2])
    run = Run(controller, COST)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=3)) for i in range(2)))
    run.until(0, Place.STEPPING)
    run.until(0, Place.MOVING)
    prefill, decode = controller.instances
    assert run.place(1) is Place.PARKED
    assert (prefill.blocks.held(0), prefill.blocks.held(1)) == (1, 1)
    assert decode.blocks.held(0) == 2  # reserved: its KV, and room for the next token
    run.until(0, Place.STEPPING)  # on the decode side: its blocks at prefill are free
    assert (prefill.blocks.held(0), prefill.blocks.held(1)) == (0, 1)
    assert (decode.blocks.held(0), decode.blocks.held(1)) == (2, 0)
    run.finish()
    # Both prefilled 0-3 (1 + 8/4 s); transfer 3-4, decode 4-6; then the second.
    assert run.timeline(0).token_s == [3.0, 5.0, 6.0]
    assert run.timeline(1).transfer_start_s == 6.0
    assert run.timeline(1).token_s == [3.0, 8.0, 9.0]
    assert_all_free(controller)


def test_a_completion_makes_room_for_a_pull_and_a_prefill_of_the_same_instant():
    # One block on either side holds one request. When the first leaves decode, the
    # second is pulled at that instant; when that has landed, the third starts.
    controller = make_controller(PAIR, blocks=[1, 1])
    requests = [make_request(i, prompt=3, out=2) for i in range(3)]
    a, b, c = simulate(controller, requests, SECOND)
    # a: prefill 0-1, transfer 1-2, decode 2-3.  b: prefill 2-3, transfer 3-4, ...
    assert a.token_s == [1.0, 3.0]
    assert (b.prefill_start_s, b.transfer_start_s) == (2.0, 3.0)
    assert (c.prefill_start_s, c.transfer_start_s) == (4.0, 5.0)


# ---- where generation ends -----------------------------------------------------------

# Request 1 generates 1, 4, 2, 0, 3, 1, ... (tests.serving.token).
ENDS = [
    ({}, [1, 4, 2, 0, 3, 1]),
    ({"eos_token": 0}, [1, 4, 2, 0]),
    ({"eos_token": 1}, [1]),  # by the token of the prefill
    ({"eos_token": 0, "ignore_eos": True}, [1, 4, 2, 0, 3, 1]),
    ({"stop_tokens": frozenset({2, 0})}, [1, 4, 2]),
    ({"stop_tokens": frozenset({0}), "ignore_eos": True}, [1, 4, 2, 0]),
]


@pytest.mark.parametrize("deployment", SYSTEMS)
@pytest.mark.parametrize(("fields", "tokens"), ENDS)
def test_generation_ends_with_the_first_stop(deployment, fields, tokens):
    controller = make_controller(deployment)
    run = Run(controller)
    run.turn(Arrived(with_prompt(1, out=6, **fields)))
    run.finish()
    assert run.timeline(1).tokens == tokens
    assert run.timeline(1).status is Status.FINISHED
    assert len(run.steps) == len(tokens)  # nothing is computed beyond the end
    assert_all_free(controller)


def test_a_request_cancelled_as_its_kv_lands_never_starts_to_decode():
    run = Run(make_controller(PAIR, blocks=100))
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=4)) for i in range(2)))
    run.until(0, Place.MOVING)
    (done,) = run._backend.wait(math.inf)
    run.turn(done, Cancelled(0))
    assert run.timeline(0).transfer_end_s is not None
    run.finish()
    assert run.timeline(0).decode_start_s is None
    assert run.timeline(1).decode_start_s is not None


# ---- memory --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deployment", "blocks", "place"),
    [("colocated:tp1", 2, 0), (PAIR, [2, 9], 0), (PAIR, [9, 2], 1)],
)
def test_what_never_fits_is_refused_at_arrival(deployment, blocks, place):
    controller = make_controller(deployment, blocks)
    requests = [
        make_request(0, prompt=6, out=3),  # KV of 8 tokens: exactly 2 blocks
        make_request(1, arrival_s=0.5, prompt=6, out=4),
    ]
    fits, refused = simulate(controller, requests)
    assert fits.status is Status.FINISHED
    assert refused.status is Status.REFUSED
    assert (refused.end_s, refused.token_s) == (0.5, [])
    assert refused.error == (
        f"instance {place}: has 2 KV blocks, got 6 prompt + 4 output tokens = 3 blocks"
    )


def test_preemption_computes_all_known_tokens_again():
    # 3 blocks of 4 tokens. Each prompt fills one. To go on, 0 takes the third block; 1,
    # the latest, finds none and makes room.
    controller = make_controller(blocks=3)
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=4)) for i in range(2)))
    run.finish()
    slices = [[(p.request.id, p.start, p.count) for p in s.slices] for s in run.steps]
    assert slices == [
        [(0, 0, 4), (1, 0, 4)],
        [(0, 4, 1)],  # 1 is preempted: it knows 5 tokens, 2 blocks, and 1 is free
        [(0, 5, 1)],
        [(0, 6, 1)],  # the last: 4 tokens generated
        [(1, 0, 5)],  # recompute of prompt and one token: the second comes out
        [(1, 5, 1)],
        [(1, 6, 1)],
    ]
    for i, dropped_s in enumerate([[], [1.0]]):
        assert_served(run.timeline(i))
        assert run.timeline(i).dropped_s == dropped_s
    assert_all_free(controller)


def test_victims_go_before_those_that_wait_and_keep_their_order():
    # 3 blocks: prompts 0, 1 and 2 fill them, 3 waits. 0 goes on in the block of 2; 1
    # finds none and makes room itself.
    controller = make_controller(blocks=3)
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=4)) for i in range(4)))
    run.turn()
    assert [s.id for s in controller.instances[0].stepping] == [0]
    assert [s.id for s in controller.instances[0].waiting] == [1, 2, 3]


def test_victims_of_decode_are_prefilled_and_moved_again():
    # Decode has 3 blocks of 4 tokens. KV of 3 tokens and room for one more is a block
    # each; for the fifth token 0 takes the third block, and 1 makes room.
    controller = make_controller(PAIR, blocks=[8, 3])
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=3, out=6)) for i in range(2)))
    run.finish()
    recomputed = [p for s in run.steps for p in s.slices if p.start == 0]
    assert [(p.request.id, p.count) for p in recomputed] == [(0, 3), (1, 3), (1, 5)]
    assert [t.request.id for t in run.transfers] == [0, 1, 1]
    for i, dropped_s in enumerate([[], [4.0]]):
        assert_served(run.timeline(i))
        assert run.timeline(i).dropped_s == dropped_s
    assert_all_free(controller)


@pytest.mark.parametrize("deployment", SYSTEMS)
@pytest.mark.parametrize("watermark", [0.0, 0.01, 0.5, 1.0])
def test_a_pool_of_one_batch_does_not_livelock(deployment, watermark):
    """sglang-jax's reserve of KV could defer every request for ever."""
    policies = {
        Role.COLOCATED: PrefillFirst(watermark=watermark),
        Role.DECODE: DecodeOnly(watermark=watermark),
    }
    # 100 prompt + 64 output tokens: KV of 163 tokens, 41 blocks of 4.
    for blocks in (41, 4 * 41, 16 * 41):
        controller = make_controller(deployment, blocks, policies=policies)
        requests = [make_request(i, prompt=100, out=64) for i in range(16)]
        for timeline in simulate(controller, requests):
            assert len(timeline.token_s) == 64


def test_recompute_may_exceed_the_caps_of_a_step():
    # A prompt of 3 is within the caps of 4; with its generated tokens it soon is not.
    policies = {
        Role.COLOCATED: PrefillFirst(max_batched_tokens=4),
        Role.PREFILL: PrefillOnly(token_budget=4),
    }
    for deployment in SYSTEMS:
        controller = make_controller(deployment, blocks=4, policies=policies)
        requests = [make_request(i, prompt=3, out=12) for i in range(3)]
        timelines = simulate(controller, requests)
        assert sum(timeline.preemptions for timeline in timelines) > 0
        assert all(len(timeline.token_s) == 12 for timeline in timelines)


# ---- cancellation and loss at every place --------------------------------------------

# (deployment, what happens before, place of request 0); request 1 stands by.
SITUATIONS = {
    "unrouted": ("colocated:tp1", [Down(0), 0, 1], Place.UNROUTED),
    "waiting": ("colocated:tp1", [1, 0], Place.WAITING),
    "in prefill": ("colocated:tp1", [0, 1], Place.STEPPING),
    "running, stalled": ("colocated:tp1", [0, 1], Place.RUNNING),
    "waiting for prefill": (PAIR, [1, 0], Place.WAITING),
    "in prefill, to be moved": (PAIR, [0, 1], Place.STEPPING),
    "parked without a target": (PAIR, [Down(1), 0, 1], Place.PARKED),
    "moving": (PAIR, [0, 1], Place.MOVING),
}


def bring_about(situation: str) -> Run:
    deployment, events, place = SITUATIONS[situation]
    run = Run(make_controller(deployment, blocks=100))
    for event in events:
        if isinstance(event, int):
            event = Arrived(with_prompt(event, prompt=5, out=5))
        run.turn(event)
    run.until(0, place)
    return run


def bring_up(run: Run) -> None:
    for instance in run.controller.instances:
        if not instance.up:
            run.turn(Up(instance.id))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_cancelling_frees_everything(situation):
    run = bring_about(situation)
    run.turn(Cancelled(0))
    tokens = list(run.timeline(0).tokens)
    bring_up(run)
    run.finish()
    assert run.timeline(0).status is Status.CANCELLED
    assert run.timeline(0).tokens == tokens  # nothing comes after
    assert run.place(0) is Place.ENDED
    assert_served(run.timeline(1))
    assert_all_free(run.controller)


def test_cancelling_a_decoding_request_frees_everything():
    run = bring_about("moving")
    run.until(0, Place.STEPPING)
    run.turn(Cancelled(0))
    assert run.controller.instances[1].blocks.held(0)  # until the step is done
    run.finish()
    assert run.timeline(0).status is Status.CANCELLED
    assert_served(run.timeline(1))
    assert_all_free(run.controller)


def test_cancelling_a_parked_request_leaves_the_queue_of_its_target():
    controller = make_controller(PAIR, blocks=[4, 2])
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=3)) for i in range(3)))
    run.until(1, Place.PARKED)
    assert [s.id for s in controller.instances[1].pull_queue] == [1, 2]
    run.turn(Cancelled(1))
    assert [s.id for s in controller.instances[1].pull_queue] == [2]
    run.finish()
    assert_served(run.timeline(2))
    assert_all_free(controller)


def test_cancelling_twice_or_after_the_end_changes_nothing():
    run = bring_about("in prefill")
    run.turn(Cancelled(0))
    end_s = run.timeline(0).end_s
    run.finish()
    run.turn(Cancelled(0), Cancelled(1))
    assert run.timeline(0).end_s == end_s
    assert_served(run.timeline(1))


@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1), (1, 0)])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_loss_at_any_place_costs_time_but_no_token(situation, lost):
    run = bring_about(situation)
    lost = [i for i in lost if i < len(run.controller.instances)]
    for instance in lost:
        run.turn(Down(instance))
        assert not run.controller.instances[instance].blocks.held_by
    bring_up(run)
    run.finish()
    for i in range(2):
        assert_served(run.timeline(i))
    assert_all_free(run.controller)


@pytest.mark.parametrize("lost", [0, 1])
def test_loss_of_a_cancelled_request_on_the_move_frees_both_sides(lost):
    run = bring_about("moving")
    run.turn(Cancelled(0))
    run.turn(Down(lost))
    bring_up(run)
    run.finish()
    assert run.timeline(0).status is Status.CANCELLED
    assert_served(run.timeline(1))
    assert_all_free(run.controller)


def test_source_lost_in_a_transfer_is_recomputed_and_destination_lost_is_not():
    source, destination = (bring_about("moving") for _ in range(2))
    source.turn(Down(0))
    assert source.place(0) is Place.UNROUTED
    source.turn(Up(0))
    destination.turn(Down(1))
    assert destination.place(0) is Place.PARKED
    assert destination.controller.instances[0].blocks.held(0)
    destination.turn(Up(1))
    for run, dropped_s in ((source, [1.0]), (destination, [])):
        run.finish()
        assert_served(run.timeline(0))
        assert run.timeline(0).dropped_s == dropped_s
    # The recompute brought the second token, so no first transfer is left to time.
    assert source.timeline(0).transfer_start_s is None
    assert destination.timeline(0).transfer_end_s == 2.0  # the second pull: 1-2


def test_pulls_of_a_lost_destination_go_to_another_in_order():
    deployment = "prefill:tp1,2xdecode:tp1"
    # Decode instance 1 is lost with 0, 2 and 4 to be pulled; instance 2 has 1 and 3.
    controller = make_controller(deployment, blocks=[100, 2, 2])
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=3)) for i in range(6)))
    run.until(0, Place.MOVING)
    _, one, two = controller.instances
    assert [s.id for s in one.pull_queue] == [2, 4]
    run.turn(Down(1))
    assert [s.id for s in two.pull_queue] == [3, 5, 0, 2, 4]
    run.finish()
    for i in range(6):
        assert_served(run.timeline(i))


def test_the_only_destination_back_up_pulls_in_order_of_arrival():
    controller = make_controller(PAIR, blocks=[100, 2])
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, prompt=4, out=3)) for i in range(4)))
    run.until(0, Place.MOVING)
    run.turn(Down(1))
    run.turn(Up(1))
    run.finish()
    assert [t.request.id for t in run.transfers] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("deployment", SYSTEMS)
def test_requests_that_waited_for_an_instance_keep_their_order(deployment):
    policies = {
        Role.COLOCATED: PrefillFirst(max_seqs=1),
        Role.PREFILL: PrefillOnly(max_seqs=1),
    }
    controller = make_controller(deployment, policies=policies)
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i)) for i in range(3)))
    run.turn(Down(0))
    run.turn(Arrived(with_prompt(3)))
    run.turn(Up(0))
    run.finish()
    assert [s.slices[0].request.id for s in run.steps] == [0, 0, 1, 2, 3]


def test_a_lost_instance_hands_its_queue_to_another_in_order():
    policies = {Role.COLOCATED: PrefillFirst(max_seqs=1)}
    controller = make_controller("2xcolocated:tp1", policies=policies)
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i)) for i in range(6)))
    run.turn(Down(0))  # with 0 in its step, 2 and 4 waiting; 3 and 5 wait at the other
    assert [s.id for s in controller.instances[1].waiting] == [0, 2, 4, 3, 5]
    run.finish()
    for i in range(6):
        assert_served(run.timeline(i))


def test_all_of_a_role_lost_and_back():
    deployment = "2xprefill:tp1,2xdecode:tp1"
    requests = [with_prompt(i, i / 2, prompt=5, out=6) for i in range(12)]
    down = [(4.25, Down(0)), (4.25, Down(1)), (6.25, Down(2)), (6.5, Down(3))]
    up = [(9.0, Up(1)), (11.0, Up(3)), (12.0, Up(0)), (12.0, Up(2))]
    controller = make_controller(deployment, blocks=20)
    engine = CheckingEngine(COST)
    timelines = serve(
        controller,
        VirtualBackend(engine),
        requests,
        [*down, *up],
        lambda now_s, events, works: engine.done(events),
    )
    for timeline in timelines:
        assert_served(timeline)
    assert_all_free(controller)


def test_loss_and_return_of_one_instant():
    run = bring_about("running, stalled")
    run.turn(Down(0), Up(0))
    run.finish()
    for i in range(2):
        assert_served(run.timeline(i))


def test_without_an_instance_requests_stay_active_and_nothing_raises():
    requests = [make_request(i, out=9) for i in range(2)]
    backend = VirtualBackend(CostExecutor(COST))
    timelines = serve(make_controller(), backend, requests, [(1.5, Down(0))])
    assert [t.status for t in timelines] == [Status.ACTIVE] * 2


# ---- impossible states ---------------------------------------------------------------


def test_unknown_and_repeated_done_raise():
    controller = make_controller()
    (step,) = controller.step(0.0, [Arrived(make_request())])
    with pytest.raises(RuntimeError, match=f"work {step.id + 1} is done but was not"):
        controller.step(1.0, [Done(step.id + 1, 0.0, 1.0)])
    controller.step(1.0, [Done(step.id, 0.0, 1.0)])
    with pytest.raises(RuntimeError, match=f"work {step.id} is done but was not"):
        controller.step(1.0, [Done(step.id, 0.0, 1.0)])


def test_done_of_a_lost_instance_raises():
    controller = make_controller()
    (step,) = controller.step(0.0, [Arrived(make_request())])
    with pytest.raises(RuntimeError, match=f"work {step.id} is done but was not"):
        controller.step(1.0, [Down(0), Done(step.id, 0.0, 1.0)])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "request 0: a step returned no token"),
        ((1,), "step 1: expected 2 tokens, got 1"),
        ((1, 2, 3), "step 1: expected 2 tokens, got 3"),
    ],
)
def test_a_token_too_few_or_too_many_raises(tokens, message):
    controller = make_controller()
    arrivals = [Arrived(with_prompt(i, out=2)) for i in range(2)]
    (step,) = controller.step(0.0, arrivals)
    with pytest.raises(RuntimeError, match=message):
        controller.step(1.0, [Done(step.id, 0.0, 1.0, tokens)])


@pytest.mark.parametrize("ended", [False, True])
def test_a_request_id_is_used_once(ended):
    run = Run(make_controller())
    run.turn(Arrived(with_prompt(0)))
    if ended:
        run.finish()
    with pytest.raises(RuntimeError, match="request 0 arrived twice"):
        run.turn(Arrived(with_prompt(0)))


def test_cancelling_what_never_arrived_raises():
    with pytest.raises(RuntimeError, match="cancelled request 0 never arrived"):
        make_controller().step(0.0, [Cancelled(0)])


class Idle(PrefillFirst):
    """A policy that never plans anything."""

    def plan(self, instance):
        return dataclasses.replace(super().plan(instance), chunks=())


def test_requests_that_wait_for_ever_raise():
    controller = make_controller(policies={Role.COLOCATED: Idle()})
    message = "1 requests wait, but nothing can be planned: {0: 'WAITING'}"
    with pytest.raises(RuntimeError, match=message):
        controller.step(0.0, [Arrived(make_request())])


# ---- construction --------------------------------------------------------------------


def test_memory_for_each_instance():
    with pytest.raises(
        ValueError, match="expected one KVMemory for each of the 2 .* 1"
    ):
        make_controller(PAIR, blocks=[5])


def test_blocks_that_are_moved_have_one_size():
    memory = [KVMemory(num_blocks=9, block_tokens=n, max_context=99) for n in (4, 8, 2)]
    deployment = Deployment.parse(f"{PAIR},colocated:tp1")
    with pytest.raises(ValueError, match=r"block_tokens: expected .* got \[4, 8\]"):
        Controller(deployment, POLICIES, memory)
    memory[1] = memory[0]
    Controller(deployment, POLICIES, memory)  # what colocated has does not matter


def test_a_policy_for_each_role():
    memory = [i.memory for i in make_controller(PAIR).instances]
    message = "has decode instances, but the system has policies for prefill only"
    with pytest.raises(ValueError, match=message):
        Controller(Deployment.parse(PAIR), {Role.PREFILL: PrefillOnly()}, memory)


def test_routers_choose():
    """Round robin over prefill, and always the last decode instance."""
    turns = itertools.cycle([0, 1])
    controller = make_controller(
        "2xprefill:tp1,2xdecode:tp1",
        prefill_router=lambda request, instances: instances[next(turns)],
        decode_router=lambda request, instances: instances[-1],
    )
    run = Run(controller)
    run.turn(*(Arrived(with_prompt(i, out=2)) for i in range(4)))
    run.finish()
    prefills = {p.request.id: s.instance for s in run.steps[:2] for p in s.slices}
    assert prefills == {0: 0, 2: 0, 1: 1, 3: 1}
    assert {t.dst for t in run.transfers} == {3}


# ---- KV that leaves chunk by chunk ---------------------------------------------------

CHUNKED = {Role.PREFILL: PrefillChunked(token_budget=2)}


def streaming(deployment, policies=CHUNKED, cost=SECOND) -> Run:
    """With a prompt of 12 tokens under way: six chunks, of which two fill a block."""
    run = Run(make_controller(deployment, policies=policies, streams=True), cost)
    run.turn(Arrived(with_prompt(0, prompt=12, out=3)))
    return run


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("decoders", [1, 2])
def test_a_target_is_lost_while_its_prompt_is_computed(decoders, landed):
    """What was sent is sent again, to whoever is up when there is more to send."""
    cost = LinearCost(step_base_s=1.0, transfer_base_s=0.0 if landed else 10.0)
    run = streaming(f"prefill:tp1,{decoders}xdecode:tp1", cost=cost)
    state = run.controller._requests[0]
    while state.pull_target is None or bool(state.transfers_in_flight) is landed:
        run.turn()
    assert state.place is Place.STEPPING
    (target, *_) = {transfer.dst for transfer in run.transfers}
    run.turn(Down(target), *([] if decoders > 1 else [Up(target)]))
    run.finish()
    assert_served(run.timeline(0))
    assert run.timeline(0).preemptions == 0
    assert run.transfers[-1].dst == (target if decoders == 1 else 3 - target)
    sent_again = [t for t in run.transfers if t.start == 0]
    assert len(sent_again) == 2
    assert_all_free(run.controller)


def test_a_cancelled_prompt_keeps_its_blocks_until_its_kv_has_landed():
    run = streaming(PAIR)
    state = run.controller._requests[0]
    while state.place is not Place.STEPPING or not state.transfers_in_flight:
        run.turn()
    run.turn(Cancelled(0))
    held = [i.blocks.held(0) for i in run.controller.instances]
    assert held == [3, 4]
    run.finish()
    assert run.timeline(0).status is Status.CANCELLED
    assert_all_free(run.controller)


def test_kv_cannot_land_before_its_step_is_over():
    controller = make_controller(PAIR, streams=True)
    step, transfer = controller.step(0.0, [Arrived(make_request(prompt=4, out=2))])
    with pytest.raises(RuntimeError, match="KV landed before it was computed"):
        controller.step(1.0, [Done(transfer.id, 0.0, 1.0)])
    assert transfer.step == step.id


def test_kv_that_is_leaving_cannot_be_preempted():
    """A prefill policy that lets go of a prompt in the middle is told so."""

    @dataclasses.dataclass(frozen=True)
    class Fickle(PrefillChunked):
        def plan(self, instance):
            return (
                Plan(preempt=instance.partial)
                if instance.partial
                else super().plan(instance)
            )

    run = streaming(PAIR, {Role.PREFILL: Fickle(token_budget=4)})
    with pytest.raises(RuntimeError, match="its KV is leaving and cannot be dropped"):
        run.finish()
