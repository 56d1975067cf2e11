"""The event log: what was told and decided, as JSON, and told again."""

import dataclasses
import json
import math

import pytest

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Role
from disagg_jax.formats import EVENT_LOG
from disagg_jax.request import Request, Sampling
from disagg_jax.runlog.event_log import (
    EventLog,
    LoggedStep,
    LoggedTransfer,
    _event_from_json,
    _event_to_json,
    read_turns,
    replay,
)
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.work import (
    Arrived,
    Cancelled,
    Done,
    Down,
    Progress,
    Slice,
    StageFree,
    Step,
    StepLoad,
    Straggle,
    Transfer,
    TruncateSpan,
    Up,
)
from tests.serving import CheckingEngine, make_controller, make_request, with_prompt

EVENTS = [
    Arrived(make_request()),
    Arrived(
        Request(
            id=0,
            arrival_s=0.1 + 0.2,  # not a short decimal
            prompt_tokens=3,
            max_tokens=2,
            prompt=(0, 5, 0),
            sampling=Sampling(temperature=1 / 3, top_k=5, top_p=0.9, seed=2**31 - 1),
            eos_token=0,
            ignore_eos=True,
            stop_tokens=frozenset({0, 7}),
        )
    ),
    Done(0, 0.1, math.nextafter(0.1, 1)),
    Done(1, 0.0, 1e-9, (0, 1), 0),
    Done(2, 0.0, 1e300, (), 2**40),
    Done(3, 0.0, 0.4, (), 0, (0.1, 0.4)),
    Done(4, 0.0, 0.4, (5,), 0, (), (0.1, 0.2)),
    Cancelled(0),
    Down(0),
    Up(3),
    Straggle(2, 1.5),
    StageFree(6),
    Progress(7, (0.1, 0.2)),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_survive_json(event):
    assert _event_from_json(json.loads(json.dumps(_event_to_json(event)))) == event


# Tiny pools, so that requests are preempted; 1 is cancelled, an instance is lost.
RUNS = {
    "2xcolocated:tp1": [(7.0, Cancelled(1)), (9.0, Down(0)), (12.0, Up(0))],
    "2xprefill:tp1,decode:tp1": [(7.0, Cancelled(1)), (9.0, Down(2)), (12.0, Up(2))],
}


def logged_run(deployment: str) -> list[str]:
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=5)
    requests = [
        with_prompt(i, i / 2, prompt=3 + i % 4, out=9, sampling=sampling)
        for i in range(12)
    ]
    log, engine = EventLog(), CheckingEngine()
    timelines = serve(
        make_controller(deployment, blocks=6),
        VirtualBackend(engine),
        requests,
        RUNS[deployment],
        log,
    )
    assert sum(t.preemptions for t in timelines) > 2
    return log.lines


@pytest.mark.parametrize("deployment", RUNS)
def test_replay_makes_the_same_decisions(deployment):
    lines = logged_run(deployment)
    told = {event[0] for line in lines[1:] for event in json.loads(line)["events"]}
    assert told == {"Arrived", "Done", "Cancelled", "Down", "Up"}
    controller = make_controller(deployment, blocks=6)
    assert list(replay(lines, controller)) == []
    assert len(controller.timelines) == 12


@pytest.mark.parametrize("number", [None, EVENT_LOG.oldest - 1, EVENT_LOG.number + 1])
def test_a_log_of_another_format_is_refused_before_its_first_turn(number):
    """Without a number it is from before there were formats."""
    other = json.dumps({} if number is None else {"format": number})
    controller = make_controller()
    for read in (read_turns, lambda lines: replay(lines, controller)):
        with pytest.raises(ValueError, match="event log: expected format 3 to 3, "):
            next(iter(read([other, "no turn"])))


def test_replay_shows_the_turn_where_another_policy_decides_otherwise():
    log = EventLog()
    arrivals = [(float(i), [Arrived(make_request(j))]) for j, i in enumerate((0, 1, 2))]
    controller = make_controller()
    for now_s, events in [*arrivals, (3.0, [Done(1, 0.0, 3.0)])]:
        log(now_s, events, controller.step(now_s, events))
    # Turn 3: both that wait start together, or one of them alone.
    policies = {Role.COLOCATED: PrefillFirst(max_seqs=1)}
    assert list(replay(log.lines, make_controller())) == []
    assert list(replay(log.lines, make_controller(policies=policies))) == [3]


def test_replay_shows_other_blocks_and_other_tokens():
    """The same slices in other blocks, or with other inputs, are another decision."""

    def logged(step):
        log = EventLog()
        log(0.0, [Arrived(step.slices[0].request)], [step])
        return log.lines

    controller = make_controller()
    request = make_request(0, prompt=3)
    (step,) = controller.step(0.0, [Arrived(request)])
    (part,) = step.slices
    assert list(replay(logged(step), make_controller())) == []
    for change in ({"blocks": (1,)}, {"tokens": (7, 7, 7)}):
        other = dataclasses.replace(part, **change)
        assert other != part
        lines = logged(dataclasses.replace(step, slices=(other,)))
        assert list(replay(lines, make_controller())) == [0]


def test_what_was_decided_is_read_as_it_was_logged():
    slices = [
        Slice(make_request(5, prompt=9), 2, 3, False, (4, 1), ()),
        Slice(make_request(6, prompt=9), 9, 1, True, (7, 3, 2), ()),
    ]
    step = Step(8, 2, slices, StepLoad.of(slices), iterations=4)
    moved = Transfer(9, make_request(5, prompt=9), 1, 3, (0,), (2,), 7, step=8)
    log = EventLog()
    log(0.25, [Up(1)], [step, moved, TruncateSpan(8, 3)])
    ((now_s, events, works),) = read_turns(log.lines)
    assert (now_s, events) == (0.25, [Up(1)])
    # Of the blocks there is left how many those that decode have: 3.
    parts = [(5, 2, 3), (6, 9, 1)]
    logged_step = LoggedStep(
        id=8, instance=2, slices=parts, iterations=4, decode_blocks=3
    )
    logged_transfer = LoggedTransfer(id=9, request=5, src=1, dst=3, context=7, step=8)
    assert works == [logged_step, logged_transfer, TruncateSpan(8, 3)]
    assert logged_step.instances == step.instances == (2,)
    assert logged_transfer.instances == moved.instances == (1, 3)


def checksums(*works):
    """What the log keeps of blocks and tokens, of each piece of work."""
    log = EventLog()
    log(0.0, [], works)
    return [work[-1 if work[0] == "Transfer" else -2] for work in logged_works(log)]


def logged_works(log):
    return json.loads(log.lines[1])["works"]


def test_transfers_between_other_blocks_are_other_decisions():
    request = make_request(5, prompt=9)
    moved = Transfer(9, request, 1, 3, (0, 4), (2, 1), 7)
    others = [
        dataclasses.replace(moved, src_blocks=(0, 5)),
        dataclasses.replace(moved, dst_blocks=(2, 0)),
        dataclasses.replace(moved, src_blocks=(4, 0)),  # in another order
        dataclasses.replace(moved, src_blocks=(2, 1), dst_blocks=(0, 4)),
    ]
    found = checksums(moved, *others)
    assert len(set(found)) == len(found)
    assert checksums(moved) == checksums(dataclasses.replace(moved))


def test_the_same_blocks_of_other_requests_are_another_decision():
    def step(*blocks):
        parts = [
            Slice(make_request(i, prompt=9), 0, 4, False, ids, ())
            for i, ids in enumerate(blocks)
        ]
        return Step.of(1, 0, parts)

    found = checksums(step((1,), (0,)), step((0,), (1,)), step((2,), (1,)))
    assert len(set(found)) == 3


def test_equal_requests_are_equal_lines_whatever_the_order_of_their_stop_tokens():
    lines = []
    for tokens in ((1, 9, 17), (17, 9, 1)):  # they collide in a small hash table
        log = EventLog()
        request = make_request(stop_tokens=frozenset(tokens))
        log(0.0, [Arrived(request)], [])
        lines.append(log.lines)
    assert lines[0] == lines[1]
    assert json.loads(lines[0][1])["events"][0][1]["stop_tokens"] == [1, 9, 17]


def test_an_early_end_of_a_span_is_logged_with_what_is_left_of_it():
    log = EventLog()
    log(0.0, [], [TruncateSpan(3, 2)])
    assert json.loads(log.lines[1])["works"] == [["TruncateSpan", 3, 2]]


def test_a_line_holds_one_turn():
    log = EventLog()
    controller = make_controller()
    events = [Arrived(make_request(0, prompt=3))]
    log(0.5, events, controller.step(0.5, events))
    record = json.loads(log.lines[1])
    assert record["now_s"] == 0.5
    assert record["events"][0][1]["prompt_tokens"] == 3
    ((kind, step, instance, slices, iterations, checksum, front),) = record["works"]
    assert (kind, step, instance) == ("Step", 1, 0)
    assert slices == [[0, 0, 3]]  # request 0, from its first token, 3 of them
    assert isinstance(checksum, int)
    assert front == 0  # it decodes nothing
