"""An engine that is a simulation, beside its simulation: what is told apart."""

import dataclasses
import statistics
import types

import pytest

from disagg_jax import metrics
from disagg_jax.calibration.machine_speed import Slowdown
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.metrics import SLO
from disagg_jax.metrics.goodput import estimate
from disagg_jax.metrics.summary import summarise
from disagg_jax.runlog.event_log import LoggedStep
from disagg_jax.runlog.utilisation import Occupancy, StageUse
from disagg_jax.search.rates import SearchPlan, search
from experiments.accuracy_study.paired_runs import PairedRun, predicted_steps
from experiments.configs.config import WorkloadConfig
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import Point
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import build_engine
from tests.experiments.calibrating import CONFIG, calibrated, device

RATES = (60.0, 80.0, 100.0)  # about its goodput
SLO_S = SLO(ttft_s=0.1, tpot_s=0.02)
SLOWER = Slowdown(decode=(1.3, 1.5), prompt=(1.2,), works=100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretended(ServedDeployment):
    """An engine whose steps take what a profile says, on a slower machine."""

    state: types.SimpleNamespace  # pair, slowdown and calls; the same in every copy

    def run(self, requests, observer=None):
        assert self.around is not ServedDeployment.around  # the probes
        self.state.calls += 1
        pair = self.state.pair
        cost = self.state.slowdown.of(pair.cost)
        lengths = [dataclasses.replace(r, prompt=None) for r in requests]
        simulated = dataclasses.replace(pair.simulated, cost=cost)
        return simulated.run(lengths, observer=observer)


@pytest.fixture(scope="module")
def engine_and_profile(random_model):
    """A server of one instance and what is measured of its programs."""
    workload = WorkloadConfig(num_requests=40)
    config = dataclasses.replace(CONFIG, workload=workload, num_seeds=2)
    system = CONFIG.systems["vllm_v0"]
    server = Pretended(
        engine=build_engine(config, system, random_model, {}),
        policies=system.policies,
        state=types.SimpleNamespace(slowdown=SLOWER, calls=0),
    )
    return config, server, calibrated([server.engine], device())


@pytest.fixture
def pair(tmp_path, engine_and_profile, random_model):
    config, server, profile = engine_and_profile
    server.state.calls = 0
    source = RequestSource.load(config, random_model)
    run_dir = RunDir(tmp_path, {})
    found = PairedRun(
        name="vllm_v0",
        server=server,
        source=source,
        slo=SLO_S,
        seeds=config.seeds,
        profile=profile,
        run_dir=run_dir,
        probes={},
    )
    server.state.pair = found
    return found


def served(pair, rates, slowdown=SLOWER):
    """The engine's runs, kept as those of a machine that is slower by so much."""
    pair.server.state.slowdown = slowdown
    for rate in rates:
        for point in pair.points(rate):
            pair.serve(point)
            kept = pair.run_dir.load(point) | {"slowdown": dataclasses.asdict(slowdown)}
            rows, log = pair.run_dir.requests(point), [*pair.run_dir.events(point)]
            pair.run_dir.save(point, kept, rows, [line.rstrip("\n") for line in log])
    return pair


def test_a_run_is_kept_and_not_repeated(pair):
    pair.server.state.slowdown = SLOWER
    point = Point("vllm_v0", 80.0, 1)
    for _ in range(2):
        pair.serve(point)
    assert pair.server.state.calls == 1
    kept = pair.run_dir.load(point)
    again = dataclasses.replace(pair.server, around=id)
    timelines = again.run(pair.source(80.0, 1)).timelines
    expected = summarise(timelines, SLO_S, 1)
    assert kept == {
        **expected,
        "slowdown": {"decode": [1.0], "prompt": [1.0], "works": 60},
    }
    rows = pair.run_dir.requests(point)
    assert [row["token_s"] for row in rows] == [t.token_s for t in timelines]
    assert [row["request_id"] for row in rows] == [t.request.id for t in timelines]


def test_an_engine_that_is_the_simulation_is_told_to_be_one(pair):
    """By each seed: the same latencies, decisions and durations, if it is as slow."""
    (compared,) = [served(pair, [80.0]).compare(80.0)]
    assert compared.difference == compared.by_durations == 0
    for ours, theirs in zip(compared.engine, compared.simulated, strict=True):
        assert theirs == {k: v for k, v in ours.items() if k != "slowdown"}
    assert compared.measured == [run["attainment"] for run in compared.engine]
    assert len(set(compared.measured)) == 2  # or seeds would be one run
    assert all(0 < a.shared == a.decided for a in compared.agreements)
    assert compared.ok and compared.relative("p90_ttft_ms") == 0
    # On the machine as it was profiled it is another.
    assert compared.profiled == pair.attainments(80.0)
    assert min(compared.profiled) > max(compared.measured)
    assert compared.difference_as_profiled > 0
    assert compared.slowdown("decode") == pytest.approx(1.4)
    assert compared.slowdown("prompt") == pytest.approx(1.2)


def test_a_machine_slower_than_its_probes_say_is_a_matter_of_durations(pair):
    """The engine's own durations give its attainment; decisions may differ."""
    served(pair, [80.0], Slowdown(decode=(1.5,), prompt=(1.4,)))
    for point in pair.points(80.0):
        kept = pair.run_dir.load(point) | {"slowdown": dataclasses.asdict(Slowdown())}
        rows, log = pair.run_dir.requests(point), [*pair.run_dir.events(point)]
        pair.run_dir.save(point, kept, rows, [line.rstrip("\n") for line in log])
    compared = pair.compare(80.0)
    assert compared.difference > 0
    assert compared.by_durations == pytest.approx(compared.difference, abs=0.05)
    assert any(a.shared < a.decided for a in compared.agreements)
    assert [run["attainment"] for run in compared.simulated] == compared.profiled


def test_steps_are_measured_against_the_machine_as_slow_as_it_was(pair):
    served(pair, [80.0])
    steps = [*pair.predicted_steps(pair.points(80.0))]
    assert len(steps) > 100
    for step in steps:
        assert step.predicted_s == pytest.approx(step.measured_s, rel=1e-9)


def test_attainment_may_differ_as_it_does_over_two_percent_of_the_rate(pair):
    """And by two points at least."""
    served(pair, RATES[::2])
    changes = []
    for rate in RATES[::2]:
        low, high = (statistics.fmean(pair.attainments(rate * f)) for f in (0.98, 1.02))
        changes.append(abs(high - low))
        assert pair.compare(rate).allowed == max(0.02, changes[-1])
    assert min(changes) < 0.02 < max(changes)


def test_the_middle_rate_is_run_again_for_the_first_seed(pair):
    again = pair.again(RATES)
    assert again == Point("vllm_v0-again", 80.0, 0)
    assert pair.again(RATES[:2]).rate_rps == 80.0
    summary = {"attainment": 0.9}
    pair.run_dir.save(Point("vllm_v0", 80.0, 0), summary, [], [])
    pair.run_dir.save(Point("vllm_v0", 80.0, 1), {"attainment": 0.1}, [], [])
    pair.run_dir.save(again, {"attainment": 0.75}, [], [])
    assert pair.repeated(RATES) == pytest.approx(0.75 - 0.9)


def test_the_knee_is_the_simulated_goodput_wherever_the_search_begins(pair):
    def evaluate(rate):
        tried[rate] = [
            metrics.attainment(run.timelines, SLO_S).joint
            for run in (
                pair.simulated.run(pair.requests(rate, seed)) for seed in (0, 1)
            )
        ]
        return tried[rate]

    tried = {}
    search(evaluate, 100.0, SearchPlan(target=0.9, tolerance=0.03))
    expected = estimate(tried, 0.9).interval.mean
    assert pair.knee_rps(0.9) == pytest.approx(expected, rel=0.1)


def test_a_simulation_has_the_policies_and_memory_of_its_server(pair):
    simulated = pair.simulated
    assert simulated.policies == pair.server.policies
    assert simulated.memory == pair.server.memory
    requests = pair.requests(9.0, 1)
    assert all(request.prompt is None for request in requests)
    assert [(r.arrival_s, r.max_tokens) for r in requests] == [
        (r.arrival_s, r.max_tokens) for r in pair.source(9.0, 1)
    ]


class Unequal:
    """A `DeploymentCost` of stages that take 1 and 4 s."""

    def stages_s(self, instance, load):
        return (1.0, 4.0)


def test_each_step_is_beside_its_time_on_a_machine_that_became_slower():
    """Steps 1 and 2 are in sections of their own, twice and three times as long."""
    steps = [
        LoggedStep(id=i, instance=0, slices=((i, 0, 8),), iterations=1) for i in (1, 2)
    ]
    uses = [
        StageUse(steps[0], 0, 0.0, 2.0),
        StageUse(steps[0], 1, 2.0, 14.0),
        StageUse(steps[1], 0, 2.0, 5.0),
        StageUse(steps[1], 1, 14.0, 16.0),
    ]
    slowdown = Slowdown(prompt=(2.0, 3.0))
    found = predicted_steps(Occupancy(stages=uses), Unequal(), slowdown)
    assert [(t.kind, t.measured_s, t.predicted_s) for t in found] == [
        ("prefill", 2.0, 2.0),
        ("prefill", 12.0, 8.0),
        ("prefill", 3.0, 3.0),
        ("prefill", 2.0, 12.0),
    ]
