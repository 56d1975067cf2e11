"""An engine that is a simulation, beside its simulation: what is told apart."""

import dataclasses
import statistics
import types

import pytest

from disagg_jax import metrics
from disagg_jax.calibration.decision_agreement import Slowdown
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.metrics import SLO
from disagg_jax.metrics.summary import summarise
from disagg_jax.search.rates import SearchPlan, estimate, search
from experiments.accuracy_study.paired_runs import Twin
from experiments.configs.config import WorkloadConfig
from experiments.runs.run_dir import Point, RunDir
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import build_engine
from tests.experiments.calibrating import CONFIG, calibrated, device

RATES = (60.0, 80.0, 100.0)  # about its goodput
SLO_S = SLO(ttft_s=0.1, tpot_s=0.02)
SLOWER = Slowdown(decode=(1.3, 1.5), prompt=(1.2,), works=100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretended(ServedDeployment):
    """An engine whose steps take what a profile says, on a slower machine."""

    state: types.SimpleNamespace  # twin, slowdown and calls; the same in every copy

    def run(self, requests, observer=None):
        assert self.around is not ServedDeployment.around  # the probes
        self.state.calls += 1
        twin = self.state.twin
        cost = self.state.slowdown.of(twin.cost)
        lengths = [dataclasses.replace(r, prompt=None) for r in requests]
        simulated = dataclasses.replace(twin.simulated, cost=cost)
        return simulated.run(lengths, observer=observer)


@pytest.fixture(scope="module")
def engine_and_profile(random_model):
    """A server of one instance and what is measured of its programs."""
    workload = WorkloadConfig(num_requests=40)
    config = dataclasses.replace(CONFIG, workload=workload, num_seeds=2)
    system = CONFIG.systems["vllm"]
    server = Pretended(
        engine=build_engine(config, system, random_model, {}),
        policies=system.policies,
        state=types.SimpleNamespace(slowdown=SLOWER, calls=0),
    )
    return config, server, calibrated([server.engine], device())


@pytest.fixture
def twin(tmp_path, engine_and_profile, random_model):
    config, server, profile = engine_and_profile
    server.state.calls = 0
    source = RequestSource.load(config, random_model)
    run_dir = RunDir(tmp_path, {})
    seeds = config.num_seeds
    found = Twin.of("vllm", server, source, SLO_S, seeds, profile, run_dir, {})
    server.state.twin = found
    return found


def served(twin, rates, slowdown=SLOWER):
    """The engine's runs, kept as those of a machine that is slower by so much."""
    twin.server.state.slowdown = slowdown
    for rate in rates:
        for point in twin.points(rate):
            twin.serve(point)
            kept = twin.run_dir.load(point) | {"slowdown": dataclasses.asdict(slowdown)}
            rows, log = twin.run_dir.requests(point), [*twin.run_dir.events(point)]
            twin.run_dir.save(point, kept, rows, [line.rstrip("\n") for line in log])
    return twin


def test_a_run_is_kept_and_not_repeated(twin):
    twin.server.state.slowdown = SLOWER
    point = Point("vllm", 80.0, 1)
    for _ in range(2):
        twin.serve(point)
    assert twin.server.state.calls == 1
    kept = twin.run_dir.load(point)
    again = dataclasses.replace(twin.server, around=id)
    timelines = again.run(twin.source(80.0, 1)).timelines
    expected = summarise(timelines, SLO_S, 1)
    assert kept == {
        **expected,
        "slowdown": {"decode": [1.0], "prompt": [1.0], "works": 60},
    }
    rows = twin.run_dir.requests(point)
    assert [row["token_s"] for row in rows] == [t.token_s for t in timelines]
    assert [row["request_id"] for row in rows] == [t.request.id for t in timelines]


def test_an_engine_that_is_the_simulation_is_told_to_be_one(twin):
    """By each seed: the same latencies, decisions and durations, if it is as slow."""
    (compared,) = [served(twin, [80.0]).compare(80.0)]
    assert compared.difference == compared.by_durations == 0
    for ours, theirs in zip(compared.engine, compared.simulated, strict=True):
        assert theirs == {k: v for k, v in ours.items() if k != "slowdown"}
    assert compared.measured == [run["attainment"] for run in compared.engine]
    assert len(set(compared.measured)) == 2  # or seeds would be one run
    assert all(0 < a.shared == a.decided for a in compared.agreements)
    assert compared.ok and compared.relative("p90_ttft_ms") == 0
    # On the machine as it was profiled it is another.
    assert compared.profiled == twin.attainments(80.0)
    assert min(compared.profiled) > max(compared.measured)
    assert compared.difference_as_profiled > 0
    assert compared.slowdown("decode") == pytest.approx(1.4)
    assert compared.slowdown("prompt") == pytest.approx(1.2)


def test_a_machine_slower_than_its_probes_say_is_a_matter_of_durations(twin):
    """The engine's own durations give its attainment; decisions may differ."""
    served(twin, [80.0], Slowdown(decode=(1.5,), prompt=(1.4,)))
    for point in twin.points(80.0):
        kept = twin.run_dir.load(point) | {"slowdown": dataclasses.asdict(Slowdown())}
        rows, log = twin.run_dir.requests(point), [*twin.run_dir.events(point)]
        twin.run_dir.save(point, kept, rows, [line.rstrip("\n") for line in log])
    compared = twin.compare(80.0)
    assert compared.difference > 0
    assert compared.by_durations == pytest.approx(compared.difference, abs=0.05)
    assert any(a.shared < a.decided for a in compared.agreements)
    assert [run["attainment"] for run in compared.simulated] == compared.profiled


def test_steps_are_measured_against_the_machine_as_slow_as_it_was(twin):
    served(twin, [80.0])
    steps = [*twin.step_times(twin.points(80.0))]
    assert len(steps) > 100
    for step in steps:
        assert step.predicted_s == pytest.approx(step.measured_s, rel=1e-9)


def test_attainment_may_differ_as_it_does_over_two_percent_of_the_rate(twin):
    """And by two points at least."""
    served(twin, RATES[::2])
    changes = []
    for rate in RATES[::2]:
        low, high = (statistics.fmean(twin.attainments(rate * f)) for f in (0.98, 1.02))
        changes.append(abs(high - low))
        assert twin.compare(rate).allowed == max(0.02, changes[-1])
    assert min(changes) < 0.02 < max(changes)


def test_the_middle_rate_is_run_again_for_the_first_seed(twin):
    again = twin.again(RATES)
    assert again == Point("vllm-again", 80.0, 0)
    assert twin.again(RATES[:2]).rate_rps == 80.0
    summary = {"attainment": 0.9}
    twin.run_dir.save(Point("vllm", 80.0, 0), summary, [], [])
    twin.run_dir.save(Point("vllm", 80.0, 1), {"attainment": 0.1}, [], [])
    twin.run_dir.save(again, {"attainment": 0.75}, [], [])
    assert twin.repeated(RATES) == pytest.approx(0.75 - 0.9)


def test_the_knee_is_the_simulated_goodput_wherever_the_search_begins(twin):
    def evaluate(rate):
        tried[rate] = [
            metrics.attainment(run.timelines, SLO_S).joint
            for run in (
                twin.simulated.run(twin.requests(rate, replica)) for replica in (0, 1)
            )
        ]
        return tried[rate]

    tried = {}
    search(evaluate, 100.0, SearchPlan(target=0.9, tolerance=0.03))
    expected = estimate(tried, 0.9).interval.mean
    assert twin.knee_rps(0.9) == pytest.approx(expected, rel=0.1)


def test_a_simulation_has_the_policies_and_memory_of_its_server(twin):
    simulated = twin.simulated
    assert simulated.policies == twin.server.policies
    assert simulated.memory == twin.server.memory
    requests = twin.requests(9.0, 1)
    assert all(request.prompt is None for request in requests)
    assert [(r.arrival_s, r.max_tokens) for r in requests] == [
        (r.arrival_s, r.max_tokens) for r in twin.source(9.0, 1)
    ]
