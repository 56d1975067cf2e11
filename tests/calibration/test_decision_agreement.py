"""Comparing runs, and simulating one with the durations that it had."""

import dataclasses

import pytest

from disagg_jax.calibration.decision_agreement import (
    Agreement,
    MeasuredCost,
    Slowdown,
    agreement,
    step_load,
    step_times,
)
from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.runlog.event_log import EventLog, LoggedStep, LoggedTransfer
from disagg_jax.runlog.utilisation import LinkUse, Occupancy, StageUse, read_occupancy
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Slice, Step, StepLoad, Transfer
from tests.serving import POLICIES, make_request

COST = LinearCost(
    step_base_s=1.0,
    prefill_token_s=0.25,
    decode_token_s=0.125,
    context_token_s=0.0625,
    transfer_base_s=0.5,
    transfer_token_s=0.03125,
)


def run(deployment, cost, requests):
    parsed = Deployment.parse(deployment)
    stages = tuple(spec.pp for spec in parsed.instances)
    memory = KVMemory(num_blocks=40, block_tokens=4, max_context=1000)
    simulated = SimulatedDeployment(
        deployment=parsed,
        policies=POLICIES,
        memory=(memory,) * len(parsed.instances),
        cost=dataclasses.replace(cost, pp=stages)
        if isinstance(cost, LinearCost)
        else cost,
        spans=False,
    )
    log = EventLog()
    done = simulated.run(requests, observer=log)
    return log.lines, [t.token_s for t in done.timelines], simulated.cost


def burst(n=12):
    return [
        make_request(i, 0.7 * i, prompt=5 + 3 * i % 11, out=3 + i % 5) for i in range(n)
    ]


DEPLOYMENTS = ("2xcolocated:tp1", "prefill:tp1,decode:tp1", "prefill:tp1pp2,decode:tp1")


def scaled(cost, factor):
    return dataclasses.replace(
        cost,
        **{
            field.name: factor * getattr(cost, field.name)
            for field in dataclasses.fields(cost)
            if field.name.endswith("_s")
        },
    )


def informed(deployment, cost, lines):
    """`cost` with the durations of a run on `deployment`."""
    parsed = Deployment.parse(deployment)
    stages = tuple(spec.pp for spec in parsed.instances)
    cost = dataclasses.replace(cost, pp=stages)
    return MeasuredCost(cost, read_occupancy(parsed, lines))


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_profile_that_is_off_by_a_factor_is_put_right(deployment):
    lines, token_s, _ = run(deployment, COST, burst())
    cost = informed(deployment, scaled(COST, 2.5), lines)
    _, found, _ = run(deployment, cost, burst())
    assert found == [pytest.approx(each) for each in token_s]
    _, wrong, _ = run(deployment, scaled(COST, 2.5), burst())
    assert wrong != [pytest.approx(each) for each in token_s]


def test_each_kind_and_place_has_its_own_ratios_in_the_order_of_the_run():
    """Prompts twice and three times as long as predicted, decodes half as long."""
    steps = [
        LoggedStep(id=i, instance=0, slices=slices, iterations=1)
        for i, slices in enumerate([((0, 0, 4),), ((0, 4, 1),), ((1, 0, 8),)])
    ]
    predicted = [COST.stages_s(0, step_load(step))[0] for step in steps]
    ends_s = [
        ratio * time_s for ratio, time_s in zip((2, 0.5, 3), predicted, strict=True)
    ]
    uses = [
        StageUse(step, 0, 10.0, 10.0 + end_s)
        for step, end_s in zip(steps, ends_s, strict=True)
    ]
    cost = MeasuredCost(COST, Occupancy(stages=uses))
    prompt, decode = StepLoad(((0, 16),), 0, 0), StepLoad((), 3, 30)
    (alone_s,), (decode_s,) = COST.stages_s(0, prompt), COST.stages_s(0, decode)
    found = [cost.stages_s(0, prompt)[0] / alone_s for _ in range(3)]
    assert found == pytest.approx([2, 3, 2])
    assert cost.stages_s(0, decode) == pytest.approx([decode_s / 2])
    # Neither other instances nor mixed steps were in the run.
    assert cost.stages_s(1, prompt) == (alone_s,)
    mixed = StepLoad(((0, 16),), 3, 30)
    assert cost.stages_s(0, mixed) == COST.stages_s(0, mixed)


class Unequal:
    """A `DeploymentCost`: stages of 1 and 4 s, transfers of `parts` parts of 1 s."""

    def __init__(self, parts=1):
        self.parts = parts

    def stages_s(self, instance, load):
        return (1.0, 4.0)

    def hop(self, transfer):
        return Hop(1.0, parts=self.parts)


def logged(id, start, count, front=0):
    slices = ((id, start, count),)
    return LoggedStep(id=id, instance=0, slices=slices, iterations=1, front=front)


def test_each_stage_of_a_step_has_its_own_ratio():
    """Stages of 1 and 4 s took 2 and 12 s, and of the next prompt 3 and 2."""
    uses = [
        StageUse(logged(1, 0, 8), 0, 0.0, 2.0),
        StageUse(logged(1, 0, 8), 1, 2.0, 14.0),
        StageUse(logged(2, 0, 8), 0, 2.0, 5.0),
        StageUse(logged(2, 0, 8), 1, 14.0, 16.0),
    ]
    cost = MeasuredCost(Unequal(), Occupancy(stages=uses))
    prompt = StepLoad(((0, 8),), 0, 0)
    found = [cost.stages_s(0, prompt) for _ in range(3)]
    assert found == [(2.0, 12.0), (3.0, 2.0), (2.0, 12.0)]
    # The same beside what was predicted, on a machine that became slower: works 1 and 2
    # are in sections of their own, twice and three times as long.
    slowdown = Slowdown(prompt=(2.0, 3.0))
    times = list(step_times(Occupancy(stages=uses), Unequal(), slowdown))
    assert [(t.kind, t.measured_s, t.predicted_s) for t in times] == [
        ("prefill", 2.0, 2.0),
        ("prefill", 12.0, 8.0),
        ("prefill", 3.0, 3.0),
        ("prefill", 2.0, 12.0),
    ]


@pytest.mark.parametrize("parts", [1, 4])
def test_each_way_between_two_instances_has_its_own_ratio(parts):
    """A part is predicted to take 1 s; transfers took 2 and 6 s in all."""
    links = [
        LinkUse(
            LoggedTransfer(id=id, request=0, src=src, dst=dst, context=8, step=1),
            10.0,
            10.0 + took_s,
        )
        for id, (src, dst, took_s) in enumerate([(0, 1, 2.0), (1, 0, 6.0)])
    ]
    cost = MeasuredCost(Unequal(parts), Occupancy(links=links))
    request = make_request(0, 0.0, prompt=5)
    for src, dst, expected_s in ((0, 1, 2.0), (1, 0, 6.0), (0, 2, 1.0 * parts)):
        hop = cost.hop(Transfer(1, request, src, dst, (), (), 5))
        assert hop.parts == parts
        assert hop.duration_s * hop.parts == pytest.approx(expected_s)


def test_the_load_of_a_logged_step():
    # A prompt of one token is no decode, nor is a chunk of two after three. The decode
    # attends to its four cached tokens and to itself.
    slices = ((0, 0, 1), (1, 4, 1), (2, 3, 2))
    step = LoggedStep(id=1, instance=0, slices=slices, iterations=1, front=7)
    assert step_load(step) == StepLoad(((0, 1), (3, 2)), 1, 5, 7)


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


def test_runs_agree_with_themselves_and_not_with_slower_ones():
    lines, _, _ = run("prefill:tp1,decode:tp1", COST, burst())
    same = agreement(lines, lines)
    assert same.decided == same.shared == same.before > 20
    slow = dataclasses.replace(COST, step_base_s=4.0)
    others, _, _ = run("prefill:tp1,decode:tp1", slow, burst())
    found = agreement(lines, others)
    assert found.decided == same.decided
    assert 0 < found.before <= found.shared < found.decided


def test_spans_are_refused():
    cost = MeasuredCost(COST, Occupancy())
    with pytest.raises(ValueError, match="expected a simulation without spans"):
        cost.decoder(0)


def test_a_slower_machine_takes_longer_for_steps_by_their_kind():
    slowed = Slowdown(decode=(2.0,), prompt=(3.0,)).of(COST)
    decodes = StepLoad((), 2, 10)
    (decode_s,) = COST.stages_s(0, decodes)
    assert slowed.stages_s(0, decodes) == (2 * decode_s,)
    for load in (StepLoad(((0, 4),), 0, 0), StepLoad(((4, 2),), 2, 10)):
        (step_s,) = COST.stages_s(0, load)
        assert slowed.stages_s(0, load) == (3 * step_s,)
    transfer = Transfer(1, make_request(0, 0.0, prompt=5), 0, 1, (), (), 5)
    assert slowed.hop(transfer) == COST.hop(transfer)
    with pytest.raises(ValueError, match="without spans"):
        slowed.decoder(0)


def test_a_machine_changes_its_speed_by_sections_of_works():
    """Of two pieces of work each, transfers counted; the last goes on."""
    slowed = Slowdown(decode=(2.0, 4.0, 8.0), works=2).of(COST)
    decodes = StepLoad((), 1, 4)
    (decode_s,) = COST.stages_s(0, decodes)
    transfer = Transfer(1, make_request(0, 0.0, prompt=5), 0, 1, (), (), 5)
    found = []
    for _ in range(4):
        found.append(slowed.stages_s(0, decodes)[0] / decode_s)
        slowed.hop(transfer)
    assert found == [2.0, 4.0, 8.0, 8.0]


def test_a_machine_of_the_same_speed_changes_nothing():
    for deployment in DEPLOYMENTS[:2]:
        same = Slowdown().of(COST)
        assert run(deployment, same, burst())[1] == run(deployment, COST, burst())[1]
