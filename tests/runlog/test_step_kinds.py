"""What stages were busy with: of runs made by hand, and against the event log."""

import collections

import pytest

from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment
from disagg_jax.runlog import EventLog, StepKinds, read_occupancy
from disagg_jax.sim import Simulation
from disagg_jax.work import Done, Progress, Step, StepLoad, TruncateSpan
from disagg_jax.workload import RandomWorkload

PROMPT = StepLoad(((0, 8),), 0, 0)
BOTH = StepLoad(((0, 8),), 2, 20)
DECODES = StepLoad((), 2, 20)


def shares(deployment, busy_s, end_s, *turns):
    """(prefill, mixed, decode) of each stage after turns (events, works)."""
    kinds = StepKinds()
    for events, works in turns:
        kinds(0.0, events, works)
    run = Run(timelines=[], end_s=end_s, busy_s=busy_s)
    return [
        [(of.prefill, of.mixed, of.decode) for of in stages]
        for stages in kinds.shares(Deployment.parse(deployment), run)
    ]


def test_each_kind_has_its_share_of_the_time():
    """Of 8 s: a prompt takes 1, a mixed step 2, a span that is cut 3."""
    found = shares(
        "2xcolocated:tp1",
        {(0,): 6.0},
        8.0,
        ([], [Step(1, 0, [], PROMPT)]),
        ([Done(1, 0.0, 1.0)], [Step(2, 0, [], BOTH)]),
        ([Done(2, 1.0, 3.0)], [Step(3, 0, [], DECODES, iterations=9)]),
        ([Progress(3, (4.0, 5.0, 6.0))], [TruncateSpan(3, 3)]),
    )
    assert found == [[(0.125, 0.25, 0.375)], [(0.0, 0.0, 0.0)]]


def test_a_later_stage_begins_when_both_are_free():
    """Two prompts, 1 s on the first stage and 4 on the second, which waits for one."""
    found = shares(
        "colocated:tp1pp2",
        {(0,): 2.0, (0, 1): 8.0},
        16.0,
        ([], [Step(1, 0, [], PROMPT), Step(2, 0, [], PROMPT)]),
        ([Done(1, 0.0, 5.0, stage_ends_s=(1.0,))], []),
        ([Done(2, 1.0, 9.0, stage_ends_s=(2.0,))], []),
    )
    assert found == [[(0.125, 0.0, 0.0), (0.5, 0.0, 0.0)]]


def test_a_run_without_time_has_shares_of_zero():
    assert shares("colocated:tp1", {}, 0.0) == [[(0.0, 0.0, 0.0)]]


@pytest.mark.parametrize(
    ("system", "deployment", "there"),
    [
        ("vllm_v0", "2xcolocated:tp1", {"prefill", "decode"}),
        (
            "sarathi_serve",
            "colocated:tp1pp2,colocated:tp1",
            {"prefill", "mixed", "decode"},
        ),
        ("disaggregated", "prefill:tp1pp2,decode:tp1", {"prefill", "decode"}),
    ],
)
def test_shares_are_those_of_the_event_log(system, deployment, there):
    simulation = Simulation.of("llama-3-8b", "h100", system=system)
    workload = RandomWorkload.parse("lognormal:500:0.5:1500", "uniform:2:16")
    requests, parsed = workload.requests(60, 20.0, 0), Deployment.parse(deployment)
    log, kinds = EventLog(), StepKinds()

    def both(*turn):
        log(*turn)
        kinds(*turn)

    run = simulation.build(deployment).run(requests, observer=both)
    prompts = {t.request.id: t.request.prompt_tokens for t in run.timelines}
    seconds = collections.defaultdict(float)
    for use in read_occupancy(parsed, log.lines).stages:
        decodes = sum(start >= prompts[id] for id, start, _ in use.step.slices)
        some, every = decodes > 0, decodes == len(use.step.slices)
        kind = "decode" if every else "mixed" if some else "prefill"
        seconds[use.step.instance, use.stage, kind] += use.end_s - use.start_s
    assert {kind for *_, kind in seconds} == there
    for i, stages in enumerate(kinds.shares(parsed, run)):
        for k, of in enumerate(stages):
            for kind in ("prefill", "mixed", "decode"):
                expected = seconds[i, k, kind] / run.end_s
                assert getattr(of, kind) == pytest.approx(expected, abs=1e-9)
