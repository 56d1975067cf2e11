"""What devices and links were busy with, of logs made by hand."""

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.runlog.utilisation import read_occupancy
from disagg_jax.work import (
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
from tests.serving import make_request


def step(id, instance=0, iterations=1):
    part = Slice(make_request(id, prompt=8), 8, 1, True, (0,), ())
    return Step(id, instance, [part], StepLoad.of([part]), iterations)


def moved(id, src=0, dst=1):
    return Transfer(id, make_request(id, prompt=8), src, dst, (0,), (0,), 4)


def read(deployment, *turns):
    """Of turns (time, events, works): the occupancy of stages, and all of it."""
    log = EventLog()
    for turn in turns:
        log(*turn)
    found = read_occupancy(Deployment.parse(deployment), log.lines)
    stages = [
        (use.step.id, use.stage, use.start_s, use.end_s, use.iteration, use.lost)
        for use in found.stages
    ]
    return stages, found


def test_a_stage_takes_a_step_when_both_are_free():
    """Stages of 1 and 4 s, and another instance beside them with one of 2 s."""
    stages, _ = read(
        "colocated:tp1pp2,colocated:tp1",
        (0.0, [], [step(1), step(3, 1)]),
        (1.0, [StageFree(1)], [step(2)]),
        (2.0, [StageFree(2), Done(3, 0.0, 2.0)], []),
        (5.0, [Done(1, 0.0, 5.0, stage_ends_s=(1.0,))], []),
        (9.0, [Done(2, 1.0, 9.0, stage_ends_s=(2.0,))], []),
    )
    assert stages == [
        (3, 0, 0.0, 2.0, 0, False),
        (1, 0, 0.0, 1.0, 0, False),
        (1, 1, 1.0, 5.0, 0, False),
        (2, 0, 1.0, 2.0, 0, False),
        (2, 1, 5.0, 9.0, 0, False),
    ]


def test_a_real_clock_may_say_that_a_step_ended_before_it_could_begin():
    stages, _ = read(
        "colocated:tp1",
        (0.0, [], [step(1), step(2)]),
        (2.0, [Done(1, 0.0, 2.0), Done(2, 0.5, 1.5)], []),
    )
    assert stages == [(1, 0, 0.0, 2.0, 0, False), (2, 0, 1.5, 1.5, 0, False)]


def test_iterations_of_a_span_follow_its_start_on_the_device():
    """It was decided at 1 and began at 2."""
    stages, _ = read(
        "colocated:tp1",
        (1.0, [], [step(4, iterations=3)]),
        (3.5, [Progress(4, (3.0, 3.5))], []),
        (4.5, [Done(4, 2.0, 4.5, ends_s=(4.5,))], []),
    )
    assert stages == [
        (4, 0, 2.0, 3.0, 0, False),
        (4, 0, 3.0, 3.5, 1, False),
        (4, 0, 3.5, 4.5, 2, False),
    ]


@pytest.mark.parametrize("left", [2, 3])
def test_a_span_that_is_cut_ends_with_what_is_left_of_it(left):
    """With what was told, or with the iteration that goes on."""
    more = [Done(4, 0.0, 3.0, ends_s=(3.0,))] if left == 3 else []
    stages, _ = read(
        "colocated:tp1",
        (0.0, [], [step(4, iterations=9)]),
        (2.0, [Progress(4, (1.0, 2.0))], [TruncateSpan(4, left)]),
        (3.0, more, []),
    )
    assert stages == [(4, 0, i, i + 1.0, i, False) for i in range(left)]


@pytest.mark.parametrize("lost", [0, 1])
def test_what_an_instance_had_in_flight_is_lost_with_it(lost):
    """A transfer at either end of it; nobody knows when that began."""
    stages, found = read(
        "2xcolocated:tp1",
        (0.0, [], [step(1, 0), step(2, 1), moved(3, 0, 1), moved(4, 1, 0)]),
        (2.5, [Down(lost)], []),
        (3.0, [Up(lost), Straggle(0, 2.0), Done(2 - lost, 0.0, 3.0)], []),
    )
    # Steps 1 and 2 are on instances 0 and 1.
    assert stages == [
        (1 + lost, 0, 0.0, 2.5, 0, True),
        (2 - lost, 0, 0.0, 3.0, 0, False),
    ]
    uses = [(u.transfer.id, u.start_s, u.end_s, u.bytes, u.lost) for u in found.links]
    assert uses == [(3, 2.5, 2.5, 0, True), (4, 2.5, 2.5, 0, True)]
    assert found.changes == [
        (2.5, Down(lost)),
        (3.0, Up(lost)),
        (3.0, Straggle(0, 2.0)),
    ]


@pytest.mark.parametrize(
    ("at_s", "last"), [(2.0, []), (2.5, [(4, 0, 2.0, 2.5, 2, True)])]
)
def test_a_span_is_lost_between_two_iterations_or_in_the_middle_of_one(at_s, last):
    stages, _ = read(
        "colocated:tp1",
        (0.0, [], [step(4, iterations=9)]),
        (2.0, [Progress(4, (1.0, 2.0))], []),
        (at_s, [Down(0)], []),
    )
    assert stages == [(4, 0, i, i + 1.0, i, False) for i in range(2)] + last


def test_of_a_step_that_is_lost_behind_its_first_stage_that_stage_is_known():
    stages, _ = read(
        "colocated:tp1pp3",
        (0.0, [], [step(1)]),
        (1.0, [StageFree(1)], [step(2)]),
        (1.5, [Down(0)], []),
    )
    assert stages == [(1, 0, 0.0, 1.0, 0, True), (2, 0, 1.0, 1.5, 0, True)]


def test_a_transfer_is_on_its_link_from_its_first_byte_to_its_last():
    _, found = read(
        "prefill:tp1,decode:tp1",
        (0.0, [], [moved(3)]),
        (2.0, [Done(3, 0.5, 2.0, bytes=64)], []),
    )
    (use,) = found.links
    assert (use.start_s, use.end_s, use.bytes, use.lost) == (0.5, 2.0, 64, False)


@pytest.mark.parametrize(
    ("deployment", "ends_s", "message"),
    [
        ("colocated:tp1pp3", (1.0,), "expected step 1 to pass 3 stages, got 2"),
        ("colocated:tp1", (1.0,), "expected step 1 to pass 1 stages, got 2"),
    ],
)
def test_steps_pass_as_many_stages_as_their_instance_has(deployment, ends_s, message):
    done = Done(1, 0.0, 2.0, stage_ends_s=ends_s)
    with pytest.raises(ValueError, match=message):
        read(deployment, (0.0, [], [step(1)]), (2.0, [done], []))


def test_work_is_on_instances_of_the_deployment():
    for work, got in ((step(1, 2), 2), (moved(1, 0, 2), 2), (moved(1, 3, 1), 3)):
        with pytest.raises(ValueError, match=f"one of the 2 instances .*, got {got}"):
            read("2xcolocated:tp1", (0.0, [], [work]))
