"""How far two runs decided alike."""

import dataclasses

from disagg_jax.calibration.decision_agreement import Agreement, agreement
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.work import Slice, Step, Transfer
from tests.serving import make_request
from tests.sim.linear_runs import COST, burst, run


def test_runs_agree_with_themselves_and_not_with_slower_ones():
    lines, _, _ = run("prefill:tp1,decode:tp1", COST, burst())
    same = agreement(lines, lines)
    assert same.decided == same.shared == same.before > 20
    slow = dataclasses.replace(COST, step_base_s=4.0)
    others, _, _ = run("prefill:tp1,decode:tp1", slow, burst())
    found = agreement(lines, others)
    assert found.decided == same.decided
    assert 0 < found.before <= found.shared < found.decided


def log_of(*works):
    log = EventLog()
    for work in works:
        log(0.0, [], [work])
    return log.lines


def prompt_step(id, request, instance=0):
    part = Slice(make_request(request, prompt=8), 0, 8, True, (), ())
    return Step.of(id, instance, [part])


def test_decisions_are_compared_instance_by_instance_in_their_order():
    moved = Transfer(9, make_request(0, prompt=8), 0, 1, (), (), 8)
    steps = [prompt_step(id, id) for id in range(3)]
    ours = log_of(steps[0], moved, steps[1], steps[2])
    # A transfer is a decision of the instance it goes to: those of 0 are the same.
    found = agreement(ours, log_of(*steps, moved))
    assert found == Agreement(decided=4, shared=4, before=4)
    # In another order on 0 from the second on; the transfer to 1 is the same.
    found = agreement(ours, log_of(steps[0], steps[2], steps[1], moved))
    assert found == Agreement(decided=4, shared=4, before=1 + 1)
    # What follows the first difference does not count again.
    other = prompt_step(1, 7)
    found = agreement(log_of(*steps), log_of(steps[0], other, steps[2]))
    assert found == Agreement(decided=3, shared=2, before=1)
    # Only the first two, or one of them on another instance.
    found = agreement(ours, log_of(steps[0], steps[1]))
    assert found == Agreement(decided=4, shared=2, before=2)
    found = agreement(ours, log_of(steps[0], prompt_step(1, 1, instance=2)))
    assert found == Agreement(decided=4, shared=1, before=1)
    # What is decided twice is shared once with who decided it once.
    found = agreement(log_of(steps[0], steps[0]), log_of(steps[0]))
    assert found == Agreement(decided=2, shared=1, before=1)
