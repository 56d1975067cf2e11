"""Comparing runs, and simulating one with the durations that it had."""

import dataclasses

import pytest

from disagg_jax.calibration.decision_agreement import (
    MeasuredCost,
    Slowdown,
    agreement,
    step_load,
)
from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.runlog.event_log import EventLog, LoggedStep
from disagg_jax.runlog.utilisation import Occupancy, StageUse, read_occupancy
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad, Transfer
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
