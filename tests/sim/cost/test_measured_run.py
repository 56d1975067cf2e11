"""A simulation with the durations of a run: those of the run, whatever the profile."""

import dataclasses

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.runlog.event_log import LoggedStep, LoggedTransfer
from disagg_jax.runlog.utilisation import LinkUse, Occupancy, StageUse, read_occupancy
from disagg_jax.sim.cost.measured_run import MeasuredCost, step_load
from disagg_jax.sim.hardware.network import Hop
from disagg_jax.work import StepLoad, Transfer
from tests.serving import make_request
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
    stages = tuple(spec.parallelism.pp for spec in parsed.instances)
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


class Unequal:
    """A `DeploymentCost`: stages of 1 and 4 s, transfers of `parts` parts of 1 s."""

    def __init__(self, parts=1):
        self.parts = parts

    def stages_s(self, instance, load):
        return (1.0, 4.0)

    def hop(self, transfer):
        return Hop((1.0,) * self.parts)


def logged(id, start, count):
    slices = ((id, start, count),)
    return LoggedStep(id=id, instance=0, slices=slices, iterations=1)


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
        assert len(hop.parts_s) == parts
        assert hop.duration_s == pytest.approx(expected_s)


def test_the_load_of_a_logged_step():
    # A prompt of one token is no decode, nor is a chunk of two after three. The decode
    # attends to its four cached tokens and to itself.
    slices = ((0, 0, 1), (1, 4, 1), (2, 3, 2))
    step = LoggedStep(id=1, instance=0, slices=slices, iterations=1, decode_blocks=7)
    assert step_load(step) == StepLoad(((0, 1), (3, 2)), 1, 5, 7)
