"""A simulation with the durations of a run: those of the run, whatever the profile."""

import dataclasses

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.runlog.event_log import LoggedStep
from disagg_jax.runlog.utilisation import Occupancy, StageUse, read_occupancy
from disagg_jax.sim.cost.measured_run import MeasuredCost, step_load
from disagg_jax.work import StepLoad
from tests.sim.linear_runs import COST, DEPLOYMENTS, burst, run


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


def test_spans_are_refused():
    cost = MeasuredCost(COST, Occupancy())
    with pytest.raises(ValueError, match="expected a simulation without spans"):
        cost.decoder(0)
