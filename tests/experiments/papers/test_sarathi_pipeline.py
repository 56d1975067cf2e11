"""The GPT-3 study: bubbles by hand, and as the backend counts them."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest

from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.work import Slice, Step, StepLoad
from experiments.papers import sarathi_pipeline
from experiments.papers.figure import Lab
from experiments.papers.sarathi_pipeline import Bubbles, VariedCost
from tests.serving import make_request

ON = Lab().roofline(*sarathi_pipeline.ON)


@dataclasses.dataclass
class Given:
    """A `DeploymentCost` of given stages, step after step."""

    stages: list[tuple[float, ...]]

    def stages_s(self, instance, load):
        return self.stages.pop(0)


def step(id, *requests):
    slices = [
        Slice(make_request(r), start=0, count=1, samples=True, blocks=(), tokens=())
        for r in requests
    ]
    return Step(id, 0, slices, StepLoad((), 1, 1))


def test_bubbles_by_hand():
    # Step:     0     1     2 (comes at 5)
    # stage 0  0-1   1-4   5-6     idle 4-5 before step 2
    # stage 1  1-4   4-5   6-7     idle 5-6 before step 2
    bubbles = Bubbles(Given([(1, 3), (3, 1), (1, 1)]))
    for now_s, asked in ((0, step(0, 7)), (1, step(1, 8)), (5, step(2, 7, 8))):
        bubbles(now_s, [], [asked])
    assert bubbles.total_s == 2
    assert bubbles.by_request_s == {7: 2, 8: 2}


@pytest.mark.parametrize("policy", [Orca(max_seqs=27), Sarathi(max_seqs=27)])
def test_bubbles_are_the_time_in_which_the_backend_is_not_busy(policy):
    simulated = sarathi_pipeline.build(ON, sarathi_pipeline._PIPELINE, policy)
    bubbles = Bubbles(simulated.cost)
    run = simulated.run(sarathi_pipeline.requests(12, seed=0), observer=bubbles)
    # Every stage works or idles from its first step to its last; the last stage ends
    # the run, so what is left of it are its steps and bubbles behind the first's hops.
    busy_s = sum(run.busy_s.values())
    (ends_s,) = bubbles._ends_s.values()
    first_s = simulated.cost.stages_s(0, _first_load(simulated))
    starts_s = [math.fsum(first_s[:k]) for k in range(len(first_s))]
    spans_s = sum(end - start for start, end in zip(starts_s, ends_s, strict=True))
    assert bubbles.total_s == pytest.approx(spans_s - busy_s)
    assert ends_s[-1] == pytest.approx(run.end_s)


def _first_load(simulated):
    steps = []

    def observe(now_s, events, works):
        steps.extend(w for w in works if isinstance(w, Step))

    simulated.run(sarathi_pipeline.requests(12, seed=0), observer=observe)
    return steps[0].load


def test_lengths_are_zipf_and_the_ratio_is_kept():
    requests = sarathi_pipeline.requests(4000, seed=1)
    totals = sorted(r.prompt_tokens + r.max_tokens for r in requests)
    assert 1024 <= totals[0] and totals[-1] <= 4096
    # F(x) = (x / 3073)^0.6 for ranks x: half of them within 3073 * .5^(1/.6) = 968.
    assert totals[2000] == pytest.approx(1024 + 968, rel=0.04)
    assert all(9 < r.prompt_tokens / r.max_tokens < 11 for r in requests)


def sarathi_and_orca(**fields):
    return [
        sarathi_pipeline.run_pipeline(
            sarathi_pipeline.PipelinePoint(
                simulated=sarathi_pipeline.build(
                    ON, *sarathi_pipeline._systems()[name]
                ),
                num_requests=120,
                seed=0,
                **fields,
            )
        )
        for name in (sarathi_pipeline._SARATHI, sarathi_pipeline._ORCA)
    ]


def test_chunks_leave_fewer_bubbles_and_end_sooner():
    sarathi, orca = sarathi_and_orca()
    assert sarathi.ends_s[-1] < orca.ends_s[-1]
    assert 2 * sarathi.bubbles_s[60] < orca.bubbles_s[60]


def test_chunks_leave_fewer_bubbles_only_where_their_steps_take_equally_long():
    even, varied = (
        [run.bubbles_s[60] for run in sarathi_and_orca(deviation=deviation)]
        for deviation in (0.0, 0.2)
    )
    assert varied[0] > 2 * even[0]
    assert varied[1] / varied[0] < even[1] / even[0]


def test_every_deviation_has_a_row_with_runs_of_its_own():
    claims = sarathi_pipeline.make(Lab(num_requests=30, seeds=1, workers=1)).claims
    rows = {c.claim.split(":")[0]: c.ours for c in claims if "vary" in c.claim}
    assert list(rows) == [f"Step times vary by {n} %" for n in (10, 15, 20)]
    assert len(set(rows.values())) == 3


LOADS = [StepLoad(((0, 256),), n, 100 * n) for n in range(1000)]


def varied_s(deviation, seed=0):
    cost = VariedCost(
        cost=Given([(1.0, 2.0)] * len(LOADS)), deviation=deviation, seed=seed
    )
    return [cost.stages_s(0, load) for load in LOADS]


def test_no_deviation_changes_nothing():
    assert varied_s(0.0) == [(1.0, 2.0)] * len(LOADS)


def test_step_times_vary_by_the_deviation_on_all_stages_alike():
    stages_s = varied_s(0.1)
    assert all(second == 2 * first for first, second in stages_s)
    factors = [first for first, _ in stages_s]
    # Standard errors of 1000: 0.1 / sqrt(1000) = .003 of the mean, .002 of the other.
    assert statistics.mean(factors) == pytest.approx(1.0, abs=0.01)
    assert statistics.stdev(factors) == pytest.approx(0.1, abs=0.007)


def test_a_load_takes_equally_long_at_equal_seeds_whatever_came_before():
    assert varied_s(0.1) == varied_s(0.1)
    assert varied_s(0.1, seed=1) != varied_s(0.1)
    first, second = (
        VariedCost(cost=LinearCost(step_base_s=1.0), deviation=0.1, seed=0)
        for _ in range(2)
    )
    forward = [first.stages_s(0, load) for load in LOADS]
    backward = [second.stages_s(1, load) for load in reversed(LOADS)]
    assert forward == backward[::-1]


def test_decodes_alone_vary_in_the_same_way():
    cost = VariedCost(cost=LinearCost(step_base_s=1.0), deviation=0.1, seed=0)
    (step_s,) = cost.stages_s(0, StepLoad((), 3, 70))
    assert cost.decoder(0)(3, 70) == step_s != 1.0


def test_no_step_takes_less_than_no_time():
    assert min(first for first, _ in varied_s(2.0)) == 0.0
    with pytest.raises(ValueError, match="deviation: expected >= 0, got -0.1"):
        varied_s(-0.1)
