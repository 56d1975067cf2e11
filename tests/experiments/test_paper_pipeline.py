"""The GPT-3 study: bubbles by hand, and as the backend counts them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.work import Slice, Step, StepLoad
from experiments.figures import pipeline
from experiments.figures.pipeline import Bubbles
from tests.serving import make_request


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
    simulated = pipeline.build(pipeline._PIPELINE, policy)
    bubbles = Bubbles(simulated.cost)
    run = simulated.run(pipeline.requests(12, seed=0), observer=bubbles)
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

    simulated.run(pipeline.requests(12, seed=0), observer=observe)
    return steps[0].load


def test_lengths_are_zipf_and_the_ratio_is_kept():
    requests = pipeline.requests(4000, seed=1)
    totals = sorted(r.prompt_tokens + r.max_tokens for r in requests)
    assert 1024 <= totals[0] and totals[-1] <= 4096
    # F(x) = (x / 3073)^0.6 for ranks x: half of them within 3073 * .5^(1/.6) = 968.
    assert totals[2000] == pytest.approx(1024 + 968, rel=0.04)
    assert all(9 < r.prompt_tokens / r.max_tokens < 11 for r in requests)


def test_chunks_leave_fewer_bubbles_and_end_sooner():
    runs = {
        name: pipeline.run_pipeline(
            pipeline.PipelinePoint(
                simulated=pipeline.build(*system), num_requests=120, seed=0
            )
        )
        for name, system in pipeline._systems().items()
        if name != pipeline._TP_ONLY
    }
    sarathi, orca = runs.values()
    assert sarathi.ends_s[-1] < orca.ends_s[-1]
    assert 2 * sarathi.bubbles_s[60] < orca.bubbles_s[60]
