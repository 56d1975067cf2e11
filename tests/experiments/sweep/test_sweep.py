"""Sweeps over servers that only pretend: which points run, and what they add up to."""

import collections
import dataclasses
import json

import pytest

from disagg_jax.control.run import Run, StepTotals
from disagg_jax.deployment import Deployment
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import DistServe, UnloadedLatency, for_slo
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.search.rates import SearchPlan
from experiments.configs.named import get_config
from experiments.configs.override import override
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import Point
from experiments.sweep.summary import Judge, pairs
from experiments.sweep.sweep import OutOfTime, Sweep
from models.tokenizer import ByteTokenizer, NoText

SLO_S = SLO(ttft_s=1.0, tpot_s=0.1)
SMALL = ["rates=4,8", "num_seeds=2", "execute_all=false"]
N = 4  # requests of a run


def requests(rate_rps, seed=0):
    """One every 1 / rate seconds; ids say which seed."""
    return [
        Request(
            id=100 * seed + i, arrival_s=i / rate_rps, prompt_tokens=4, max_tokens=3
        )
        for i in range(N)
    ]


def served(request, ttft_s, late_s=0.0):
    """Three tokens 0.05 s apart, the last `late_s` late."""
    at = request.arrival_s
    tokens_s = [at + ttft_s, at + ttft_s + 0.05, at + ttft_s + 0.1 + late_s]
    return Timeline(
        request=request,
        status=Status.FINISHED,
        prefill_start_s=at,
        decode_start_s=tokens_s[0],
        end_s=tokens_s[-1],
        token_s=tokens_s,
    )


@dataclasses.dataclass
class Pretended:
    """Its first request of a run is late above `limit_rps`, all above twice that."""

    deployment: Deployment
    limit_rps: float
    late_s: float = 0.0  # of the last token of the last request, when programs run
    calls: list = dataclasses.field(default_factory=list)

    executed: bool = True

    def run(self, asked, *, observer=None):
        self.calls.append("run" if self.executed else "simulate")
        found, totals = self._timelines(asked), None
        if self.executed:
            found[-1] = served(asked[-1], 0.5, self.late_s)
            for timeline in found:
                timeline.tokens = [1, 2, 3]
            totals = {"prefill": StepTotals(steps=1, tokens=12, width=16)}
        instances = range(len(self.deployment.instances))
        busy_s = {(i,): float(i + 1) for i in instances}
        return Run(timelines=found, end_s=4.0, busy_s=busy_s, totals=totals)

    def _timelines(self, asked):
        rate_rps = 1 / (asked[1].arrival_s - asked[0].arrival_s)
        late = 1 if rate_rps > self.limit_rps else 0
        late = N - 1 if rate_rps > 2 * self.limit_rps else late
        return [served(r, 5.0 if i < late else 0.5) for i, r in enumerate(asked)]


class Durations:
    """10 ms for each token of a prompt; 20 ms for two rows that decode."""

    def prefill_s(self, tokens):
        return 0.01 * tokens

    def decode_s(self):
        return 0.02, 2


class Source:
    """Random requests: no trace, and seeds that share nothing."""

    trace, why_dependent = None, ""

    def __call__(self, rate_rps, seed=0):
        return requests(rate_rps, seed)


def without_programs(systems):
    return {n: dataclasses.replace(one, executed=False) for n, one in systems.items()}


def of_systems(one, **systems):
    """The sweep with other systems."""
    timed = without_programs(systems)
    fresh = {"tried": collections.defaultdict(dict), "scouted_rps": {}}
    return dataclasses.replace(one, served=systems, timed=timed, **fresh)


def sweep(path, *changes, late_s=0.0, limits=(10.0, 20.0), run_dir=None):
    config = override(get_config("smoke"), [*SMALL, *changes])
    first = Pretended(Deployment.parse("2xcolocated:tp1"), limits[0], late_s)
    other = Pretended(Deployment.parse("prefill:tp1,decode:tp1"), limits[1], late_s)
    systems, slo = {"vllm_v0": first, "disaggregated": other}, SLO_S
    return Sweep(
        timed=without_programs(systems),
        too_slow_s={},
        config=config,
        model=None,
        source=Source(),
        served=systems,
        durations=Durations(),
        slo=slo,
        choices={"vllm_v0": ["as told"]},
        criteria=for_slo(
            slo,
            target=0.9,
            prompt_tokens=4,
            unloaded=lambda r: UnloadedLatency(ttft_s=1, tpot_s=1),
        ),
        run_dir=run_dir or RunDir(path, {}),
        progress=lambda message: None,
    )


def test_every_rate_is_run_with_every_seed_of_the_whole_deployment(tmp_path):
    one = sweep(tmp_path, "execute_all=true")
    summary = one.run()
    one.run_dir.write_requests(one.points())
    rates = [8.0, 16.0]  # of two devices
    assert one.run_dir.points() == [
        Point(name, rate, seed)
        for name in ("disaggregated", "vllm_v0")
        for rate in rates
        for seed in (0, 1)
    ]
    rows = [
        json.loads(line)
        for line in (tmp_path / "requests.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2 * 2 * 2 * N
    assert [row["system"] for row in rows[:16]] == ["vllm_v0"] * 16
    first = rows[0]
    assert (first["rate_rps"], first["seed"], first["request_id"]) == (8.0, 0, 0)
    assert {row["request_id"] // 100 for row in rows if row["seed"] == 1} == {1}
    assert summary["num_seeds"] == 2
    # One of four requests is late at 16/s on the system whose limit is 10.
    assert [p["attainment"]["mean"] for p in points(summary, "vllm_v0")] == [1.0, 0.75]
    assert [p["rate_rps"] for p in points(summary, "vllm_v0")] == rates
    assert [p["rate_rps_per_device"] for p in points(summary, "vllm_v0")] == [
        4.0,
        8.0,
    ]


def points(summary, name):
    return summary["systems"][name]["points"]


def test_goodputs_are_per_device_and_ratios_over_vllm_by_seed(tmp_path):
    summary = sweep(tmp_path).run()
    # vllm_v0 crosses 0.9 between 8 (1.0) and 16/s (0.75): 8 + 8 x 0.1 / 0.25 = 11.2,
    # 5.6 per device. The other passes at 16, where the rates end: 8 per device.
    vllm = summary["systems"]["vllm_v0"]["goodput"]
    assert vllm["per_seed_rps_per_device"] == pytest.approx([5.6, 5.6])
    assert vllm["goodput_rps_per_device"] == pytest.approx(
        {"mean": 5.6, "low": 5.6, "high": 5.6}
    )
    assert (vllm["pass_rps_per_device"], vllm["fail_rps_per_device"]) == (4.0, 8.0)
    assert vllm["bracketed"]
    assert vllm["at_pass_rate"]["attainment"] == 1.0
    other = summary["systems"]["disaggregated"]["goodput"]
    assert other["per_seed_rps_per_device"] == pytest.approx([8.0, 8.0])
    assert other["fail_rps_per_device"] is None and not other["bracketed"]
    ratios = summary["ratios"]
    assert list(ratios) == ["disaggregated/vllm_v0"]
    assert ratios["disaggregated/vllm_v0"]["per_seed"] == pytest.approx([8 / 5.6] * 2)


def test_a_throughput_is_per_device_at_its_best_rate(tmp_path):
    one = sweep(tmp_path, "criterion=sarathi")
    found = one.run()["systems"]["vllm_v0"]["throughput"]
    # 4 requests of 7 tokens: at 8/s from 0 to 3/8 + 0.6 s; at 16/s one takes 5.1 s.
    thousands = 28 / (3 / 8 + 0.6) / 1e3
    score = one.run_dir.load(Point("vllm_v0", 8.0, 0))["criteria"]["sarathi"]
    assert score == pytest.approx(thousands)
    assert found["best_rps_per_device"] == 4.0
    assert found["per_seed_per_device"] == pytest.approx([thousands / 2] * 2)
    mean = found["max_throughput_per_device"]["mean"]
    assert mean == pytest.approx(thousands / 2)


def test_the_first_seed_is_executed_at_the_highest_passing_rate(tmp_path):
    one = sweep(tmp_path, "executed_requests=3")
    one.run()
    for name, at in (("vllm_v0", 8.0), ("disaggregated", 16.0)):
        for rate in (8.0, 16.0):
            for seed in (0, 1):
                point, ran = Point(name, rate, seed), (rate, seed) == (at, 0)
                done = one.run_dir.load(point)
                assert done["num_prompts"] == N
                assert done["executed"] == one.run_dir.has_requests(point) == ran
                assert done["padding_prefill"] == (0.25 if ran else None)
        tokens = [row["tokens"] for row in one.run_dir.requests(Point(name, at, 0))]
        assert tokens == [[1, 2, 3]] * 3
    calls = one.served["vllm_v0"].calls
    # Four points, and then both ways the first requests of one of them.
    assert calls == ["simulate"] * 4 + ["run", "simulate"]
    padding = one.run()["systems"]["vllm_v0"]["goodput"]["at_pass_rate"]
    assert padding["padding_prefill"] == 0.25  # of the seed that ran


def test_where_nothing_passes_nothing_is_executed(tmp_path):
    one = sweep(tmp_path, limits=(1.0, 1.0))
    summary = one.run()
    assert "run" not in one.served["vllm_v0"].calls
    assert summary["systems"]["vllm_v0"]["goodput"]["pass_rps_per_device"] is None
    assert summary["ratios"] == {}  # over nothing


@pytest.mark.parametrize("late_s", [1e-3, -1e-3, 1e-9])
def test_a_token_at_another_time_than_its_duration_says_is_an_error(tmp_path, late_s):
    """As many requests and tokens; one token a little off."""
    with pytest.raises(RuntimeError, match="vllm_v0-8.0rps-0: the programs' timelines"):
        sweep(tmp_path, late_s=late_s).run()
    saved = RunDir(tmp_path, {})
    assert not saved.load(Point("vllm_v0", 8.0, 0))["executed"]
    # The resumed run does not take the wrong timelines for those of the durations.
    with pytest.raises(RuntimeError, match="timelines are not those"):
        sweep(tmp_path, late_s=late_s).run()


def test_a_resumed_sweep_runs_what_is_missing_and_nothing_else(tmp_path):
    whole = sweep(tmp_path / "whole").run()
    resumed = tmp_path / "resumed"
    sweep(resumed).run()
    lost = resumed / "points" / "vllm_v0-16.0rps-1.json"
    lost.unlink()
    again = sweep(resumed)
    assert json.dumps(again.run()) == json.dumps(whole)
    assert again.served["vllm_v0"].calls == ["simulate"]
    assert again.served["disaggregated"].calls == []
    # An executed point that was lost is simulated first: its rate has to pass again.
    (resumed / "points" / "vllm_v0-8.0rps-0.json").unlink()
    again = sweep(resumed)
    assert json.dumps(again.run()) == json.dumps(whole)
    assert again.served["vllm_v0"].calls == ["simulate", "run", "simulate"]


def test_everything_is_executed_where_that_is_asked_for(tmp_path):
    one = sweep(tmp_path, "execute_all=true")
    one.run()
    assert one.served["vllm_v0"].calls == ["run"] * 4


def test_a_search_begins_where_half_of_the_devices_time_is_used(tmp_path):
    one = sweep(tmp_path, "rates=", "search.max_rates=4")
    tried = []
    summary = dataclasses.replace(one, progress=tried.append).run()
    # A request takes 4 x 0.01 s of prefill and 3 x 0.02 / 2 s of decode on a device:
    # 0.5 x 2 / 0.07 = 14.3/s of two devices.
    assert "7.15 requests/s per device" in tried[0]
    rates = [point["rate_rps"] for point in points(summary, "vllm_v0")]
    assert 14.3 in rates
    assert rates == sorted(rates)
    assert all(rate == float(f"{rate:.4g}") for rate in rates)
    plan = SearchPlan(target=0.9, max_rates=4)
    assert len(rates) == plan.max_rates


def test_busy_shares_are_by_role_with_the_idlest_stage(tmp_path):
    one = sweep(tmp_path)
    one.run()
    both = one.run_dir.load(Point("vllm_v0", 8.0, 0))  # 0.25 and 0.5
    assert (both["busy_colocated"], both["busy_colocated_least"]) == (0.375, 0.25)
    assert both["busy_prefill"] is both["busy_decode_least"] is None
    split = one.run_dir.load(Point("disaggregated", 8.0, 0))
    assert (split["busy_prefill"], split["busy_decode"]) == (0.25, 0.5)


def test_means_are_over_seeds_and_none_where_a_run_lacks_one(tmp_path):
    one = sweep(tmp_path)
    one.run()
    for seed, value in ((0, 1.0), (1, 3.0)):
        path = tmp_path / "points" / f"vllm_v0-8.0rps-{seed}.json"
        content = json.loads(path.read_text())
        content |= {"mean_e2e_ms": value, "preemptions": None if seed else 1.0}
        content["steady"] = seed == 0
        path.write_text(json.dumps(content))
    summary = sweep(tmp_path).run()
    found = points(summary, "vllm_v0")[0]
    assert found["metrics"]["mean_e2e_ms"] == 2.0
    assert found["metrics"]["preemptions"] is None
    assert not found["steady"]
    assert not summary["systems"]["vllm_v0"]["goodput"]["steady"]


def test_every_criterion_ranks_by_requests_per_device(tmp_path):
    summary = sweep(tmp_path).run()
    (first, second) = summary["criteria"]["distserve"]["rank"]
    assert (first["system"], first["bound"]) == ("disaggregated", 8.0)
    assert second["system"] == "vllm_v0"
    assert summary["criteria"]["distserve"]["unit"].endswith("per device")
    assert summary["choices"] == {"vllm_v0": ["as told"]}


def test_throughputs_are_ranked_per_device(tmp_path):
    summary = sweep(tmp_path).run()
    ranked = summary["criteria"]["sarathi"]["rank"]
    # 4 requests of 7 tokens from 0 to 3 / rate + 0.6 s on two devices, the other system
    # at 16/s, where vllm_v0's late request makes 8/s its best.
    thousands = {
        "disaggregated": 28 / (3 / 16 + 0.6) / 1e3,
        "vllm_v0": 28 / (3 / 8 + 0.6) / 1e3,
    }
    assert [row["system"] for row in ranked] == ["disaggregated", "vllm_v0"]
    for row in ranked:
        assert row["mean"] == pytest.approx(thousands[row["system"]] / 2)


def test_a_search_is_for_the_target_of_its_criterion(tmp_path):
    """MLPerf's 99 %, not the 50 % of the plan: three of four pass above 10/s."""
    one = sweep(tmp_path, "rates=", "criterion=mlperf", "search.target=0.5")
    found = one.run()["systems"]["vllm_v0"]["goodput"]
    passing, failing = found["pass_rps_per_device"], found["fail_rps_per_device"]
    assert passing <= 10 / 2 < failing <= passing * 1.1
    assert one.run()["target"] == 0.99


# -- what a run says of itself ---------------------------------------------------------


@dataclasses.dataclass
class Told(Pretended):
    """How many requests of a run are late, by its rate and its seed."""

    late: dict = dataclasses.field(default_factory=dict)

    def _timelines(self, asked):
        rate_rps = round(1 / (asked[1].arrival_s - asked[0].arrival_s), 6)
        late = self.late[rate_rps][asked[0].id // 100]
        return [served(r, 5.0 if i < late else 0.5) for i, r in enumerate(asked)]


def told(path, late, *changes, **fields):
    """A sweep of vllm alone, on two devices; the rates are those of `late`."""
    rates = ",".join(str(rate / 2) for rate in late)
    whole = sweep(path, f"rates={rates}", *changes)
    server = Told(Deployment.parse("2xcolocated:tp1"), 0.0, late=late)
    return dataclasses.replace(of_systems(whole, vllm_v0=server), **fields)


def ends(content):
    """Both ends of every interval in a summary."""
    parts = content.values() if isinstance(content, dict) else content
    if isinstance(content, dict) and "low" in content:
        yield from (content["low"], content["high"])
    for part in parts:
        if isinstance(part, dict | list):
            yield from ends(part)


class Shared(Source):
    """Runs that are no independent samples, of a trace."""

    trace = {"said": ["of a trace"], "rows": 3}
    why_dependent = "they share rows"


@pytest.mark.parametrize("criterion", ["distserve", "sarathi"])
def test_seeds_that_share_requests_give_no_interval_anywhere(tmp_path, criterion):
    """Nor is anything resolved; of independent ones each figure has both ends."""
    one = sweep(tmp_path, f"criterion={criterion}")
    found = one.run()
    assert "no_intervals" not in found and "trace" not in found
    assert None not in ends(found) and len([*ends(found)]) > 20
    shared = dataclasses.replace(one, source=Shared()).run()
    assert set(ends(shared)) == {None}
    assert shared["no_intervals"] == "they share rows"
    assert shared["trace"] == Shared.trace
    if criterion == "distserve":
        resolved = [
            s["systems"]["vllm_v0"]["goodput"]["resolved"] for s in (found, shared)
        ]
        assert resolved == [True, False]


def test_a_goodput_may_be_bracketed_and_not_resolved(tmp_path):
    """Seeds of 75 % and none above, so far apart that they tell nothing."""
    found = told(tmp_path, {8.0: [0, 0], 16.0: [1, 4]}).run()["systems"]["vllm_v0"]
    assert found["goodput"]["bracketed"] and not found["goodput"]["resolved"]


@pytest.mark.parametrize(("fail_rps", "resolved"), [(362.8, True), (363.4, False)])
def test_ends_two_tolerances_apart_decide_though_rates_are_rounded(fail_rps, resolved):
    """Between them the seeds disagree."""
    judge = Judge(
        name="distserve",
        criterion=DistServe(slo=SLO_S, target=0.9),
        tolerance=0.15,
        independent=True,
        confidence=0.95,
    )
    scores = {274.3: (1.0, 1.0), 315.5: (0.8, 1.0), fail_rps: (0.2, 0.3)}
    runs = {
        rate: [{"criteria": {"distserve": score}} for score in each]
        for rate, each in scores.items()
    }
    assert fail_rps > 274.3 * 1.15**2
    assert judge.goodput(runs).resolved == resolved


def test_attainment_that_rises_with_the_rate_is_said_per_device(tmp_path):
    said = []
    late = {4.0: [1, 1], 8.0: [0, 0], 16.0: [2, 2]}
    one = told(tmp_path, late, progress=said.append)
    inversion = one.run()["systems"]["vllm_v0"]["goodput"]["inversion"]
    text = (
        "attainment is not monotone in the rate: 75.0% at 2 requests/s per device, "
        "100.0% at 4"
    )
    assert inversion == {
        **{"fail_rps_per_device": 2.0, "fail_score": 0.75},
        **{"pass_rps_per_device": 4.0, "pass_score": 1.0, "text": text},
    }
    assert [line for line in said if "monotone" in line] == [f"{'vllm_v0':>14}  {text}"]
    monotone = told(tmp_path / "b", {8.0: [0, 0], 16.0: [2, 2]}, progress=said.append)
    assert monotone.run()["systems"]["vllm_v0"]["goodput"]["inversion"] is None
    assert len([line for line in said if "monotone" in line]) == 1


def test_a_throughput_is_bracketed_steady_and_executed_at_its_best_rate(tmp_path):
    """At 1/s each request is alone, at 8/s they pile up, at 16/s one is late."""
    one = told(tmp_path, {1.0: [0, 0], 8.0: [0, 0], 16.0: [1, 1]}, "criterion=sarathi")
    summary = one.run()
    found = summary["systems"]["vllm_v0"]["throughput"]
    assert found["best_rps_per_device"] == 4.0
    assert found["bracketed"] and not found["steady"]
    assert found["at_best_rate"]["attainment"] == 1.0
    points = summary["systems"]["vllm_v0"]["points"]
    assert [point["steady"] for point in points] == [True, False, False]
    executed = [
        point.rate_rps
        for point in one.run_dir.points()
        if one.run_dir.load(point)["executed"]
    ]
    assert executed == [8.0]
    only = told(tmp_path / "b", {1.0: [0, 0], 16.0: [3, 3]}, "criterion=sarathi")
    found = only.run()["systems"]["vllm_v0"]["throughput"]
    assert found["best_rps_per_device"] == 0.5
    assert found["steady"] and not found["bracketed"]


def test_throughputs_have_ratios_too_without_vllm_over_the_first(tmp_path):
    one = sweep(tmp_path, "criterion=sarathi")
    # At 16/s on time, and at 8/s: the same tokens in fewer seconds.
    ratio = (3 / 8 + 0.6) / (3 / 16 + 0.6)
    found = one.run()["ratios"]["disaggregated/vllm_v0"]
    assert found["per_seed"] == pytest.approx([ratio] * 2)
    assert found["mean"] == pytest.approx(ratio)
    others = {f"{name}@8": server for name, server in one.served.items()}
    systems = {f"{name}@8": system for name, system in one.config.systems.items()}
    without = dataclasses.replace(
        of_systems(one, **others),
        config=dataclasses.replace(one.config, systems=systems),
        choices={},
        run_dir=RunDir(tmp_path / "b", {}),
    )
    (pair,) = without.run()["ratios"].items()
    assert pair == ("disaggregated@8/vllm_v0@8", found)


def test_a_base_that_one_seed_never_passes_gives_no_ratios(tmp_path):
    one = sweep(tmp_path)
    base = told(tmp_path / "b", {8.0: [0, 4], 16.0: [0, 4]}).served["vllm_v0"]
    summary = of_systems(one, **{**one.served, "vllm_v0": base}).run()
    assert summary["systems"]["vllm_v0"]["goodput"]["per_seed_rps_per_device"] == [8, 0]
    assert summary["ratios"] == {}


def test_all_searches_begin_where_the_first_systems_does(tmp_path):
    one, said = sweep(tmp_path, "rates=", "search.max_rates=2"), []
    dataclasses.replace(one, progress=said.append).run()
    (first, *_) = [line for line in said if "disaggregated " in line]
    assert " 7.15 requests/s per device" in first


def test_rates_are_tried_with_four_digits_and_once(tmp_path):
    rates = "rates=1.00004,1.06254,1.00001"
    one = sweep(tmp_path, "execute_all=true", rates)
    found = points(one.run(), "vllm_v0")
    one.run_dir.write_requests(one.points())
    assert [point["rate_rps"] for point in found] == [2.0, 2.125]
    rows = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows)) == 2 * 2 * 2 * N


def test_progress_is_per_device_and_by_what_is_searched_for(tmp_path):
    said = []
    late = {8.0: [0, 0], 16.0: [1, 2]}
    told(tmp_path / "a", late, progress=said.append).run()
    assert said[:3] == [
        f"{'vllm_v0':>14}      4.00 requests/s per device: attainment 100.0%  "
        "(100.0%, 100.0%)",
        f"{'vllm_v0':>14}      8.00 requests/s per device: attainment  62.5%  "
        "(75.0%, 50.0%)",
        f"{'vllm_v0':>14}      4.00 requests/s per device: running its programs",
    ]
    said.clear()
    told(tmp_path / "b", late, "criterion=sarathi", progress=said.append).run()
    thousands = f"{28 / (3 / 8 + 0.6) / 1e3:.4g}"
    assert said[0].endswith(f": sarathi {thousands}  ({thousands}, {thousands})")


# -- a limit of time -------------------------------------------------------------------


def limited(one, rates, **changes):
    """The sweep with time for so many rates of points that are not done."""
    left = iter([False] * rates)
    out_of_time = {"out_of_time": lambda: next(left, True), "missing": []}
    return dataclasses.replace(one, **out_of_time, **changes)


def test_given_rates_that_there_was_time_for_are_kept_and_the_others_said(tmp_path):
    """Two systems at two rates; there is time for the first and half of the second."""
    one = limited(sweep(tmp_path), 3)
    summary = one.run()
    found = {n: len(each["points"]) for n, each in summary["systems"].items()}
    assert found == {"vllm_v0": 2, "disaggregated": 1}
    assert one.missing == [
        "the look after 2 seeds at disaggregated",
        *("the programs of vllm_v0", "the programs of disaggregated"),
    ]
    whole = sweep(tmp_path / "whole").run()
    fresh = {"tried": collections.defaultdict(dict)}
    again = limited(one, 9, **fresh)
    assert again.run() == whole and again.missing == []


def test_without_time_for_one_system_there_is_no_summary(tmp_path):
    one = limited(sweep(tmp_path), 0)
    with pytest.raises(OutOfTime):
        one.run()
    assert one.points() == []
    assert one.missing == ["the look after 2 seeds at vllm_v0, disaggregated"]


def test_of_a_search_only_systems_that_were_looked_at_are_kept(tmp_path):
    changes = ("rates=", "search.max_rates=4")
    ended = sweep(tmp_path / "ended", *changes)
    ended.run()
    each = {name: len(rates) for name, rates in ended.tried.items()}
    one = limited(sweep(tmp_path / "cut", *changes), each["vllm_v0"] + 1)
    assert list(one.run()["systems"]) == ["vllm_v0"]
    assert one.missing[0] == "the look after 2 seeds at disaggregated"


def test_a_later_look_that_was_cut_leaves_the_one_before(tmp_path):
    """The rates are the same after 1 and 2 seeds, so that the second look is whole."""
    one = limited(sweep(tmp_path, "first_seeds=1", "num_seeds=2"), 5)
    summary = one.run()
    seeds = [p["num_seeds"] for n in summary["systems"] for p in points(summary, n)]
    assert seeds == [1, 1, 1, 1] and summary["num_seeds"] == 1
    assert one.missing[0] == "the look after 2 seeds"
    assert len(one.run_dir.points()) == 4 + 1  # the point of the fifth rate is kept


def test_a_sweep_says_how_many_rates_of_a_look_are_done(tmp_path):
    told = []
    one = dataclasses.replace(
        sweep(tmp_path), target="tight", step=lambda *done: told.append(done)
    )
    one.run()
    part = "tight look after 2 seeds"
    assert sorted(set(told)) == [(part, done, 4) for done in range(5)]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_mean_over_the_seeds_is_no_median(tmp_path):
    summary = told(tmp_path, {8.0: [0, 0, 3]}, "num_seeds=3").run()
    (point,) = summary["systems"]["vllm_v0"]["points"]
    assert point["metrics"]["attainment"] == pytest.approx((1 + 1 + 0.25) / 3)
    assert point["attainment"]["mean"] == pytest.approx((1 + 1 + 0.25) / 3)
    assert summary["num_seeds"] == 3


def test_a_point_says_which_target_was_missed(tmp_path):
    """Late first tokens; the others come in time."""
    (point,) = points(told(tmp_path, {8.0: [1, 1]}).run(), "vllm_v0")
    assert point["attainment_ttft"]["mean"] == 0.75
    assert point["attainment_tpot"]["mean"] == 1.0


def test_the_summary_says_how_it_was_made(tmp_path):
    one = sweep(tmp_path / "a", "workload.num_requests=11", "criterion=mlperf")
    found = one.run()
    assert (found["model"], found["clock"], found["durations"]) == (
        *("tiny", "virtual", "table"),
    )
    assert (found["num_requests"], found["num_seeds"]) == (11, 2)
    assert (found["criterion"], found["executed"]) == ("mlperf", "passing")
    assert found["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    vllm = found["systems"]["vllm_v0"]
    assert (vllm["deployment"], vllm["devices"]) == ("2xcolocated:tp1", 2)
    units = {name: each["unit"] for name, each in found["criteria"].items()}
    assert all(unit.endswith(" per device") for unit in units.values())
    for name, criterion in one.criteria.items():
        assert found["criteria"][name]["definition"] == str(criterion)
        assert found["criteria"][name]["target"] == criterion.target
    live = sweep(tmp_path / "b", "clock=wall").run()
    assert (live["clock"], live["durations"], live["executed"]) == (
        *("wall", "live", "all"),
    )


@dataclasses.dataclass
class Uneven(Pretended):
    """Its programs give the second token late, and the first and last in time."""

    def run(self, asked, *, observer=None):
        run = super().run(asked, observer=observer)
        if self.executed:
            run.timelines[-1].token_s[1] += 1e-3
        return run


def test_a_token_between_two_in_time_is_compared_too(tmp_path):
    one = sweep(tmp_path)
    server = Uneven(Deployment.parse("2xcolocated:tp1"), 10.0)
    with pytest.raises(RuntimeError, match="vllm_v0-8.0rps-0: the programs' timelines"):
        of_systems(one, vllm_v0=server).run()


@dataclasses.dataclass
class Padded(Pretended):
    """Its steps have so many tokens of so many that they were compiled for."""

    def run(self, asked, *, observer=None):
        run = super().run(asked, observer=observer)
        totals = {
            "mixed": StepTotals(steps=2, tokens=30, width=40),
            "decode": StepTotals(steps=9, tokens=12, width=96),
        }
        return dataclasses.replace(run, totals=totals if self.executed else None)


def test_padding_is_what_the_tokens_leave_of_each_kind_of_step(tmp_path):
    one = sweep(tmp_path, "rates=4")
    server = Padded(Deployment.parse("2xcolocated:tp1"), 10.0)
    of_systems(one, vllm_v0=server).run()
    found = one.run_dir.load(Point("vllm_v0", 8.0, 0))
    padding = [found[f"padding_{kind}"] for kind in ("prefill", "mixed", "decode")]
    assert padding == [None, 0.25, 0.875]


@dataclasses.dataclass(frozen=True)
class Letters:
    """A model whose tokens are letters, or have no text."""

    tokenizer: object


@pytest.mark.parametrize(
    ("weights", "tokenizer", "text"),
    [
        ("trained", ByteTokenizer(), "\x01\x02\x03"),
        ("trained", NoText(OSError("no tokenizer"), ()), None),
        ("random", ByteTokenizer(), None),  # noise
    ],
)
def test_requests_have_a_text_where_it_means_something(
    tmp_path, weights, tokenizer, text
):
    one = sweep(tmp_path, f"weights={weights}", "rates=4")
    dataclasses.replace(one, model=Letters(tokenizer)).run()
    (row, *_) = one.run_dir.requests(Point("vllm_v0", 8.0, 0))
    assert row["tokens"] == [1, 2, 3] and row.get("text") == text


# -- looks -----------------------------------------------------------------------------

LOOKS = ["rates=", "first_seeds=2", "num_seeds=8"]


@dataclasses.dataclass
class EachItsOwn(Pretended):
    """Every second seed has a limit that is 1.4 times as high."""

    def _timelines(self, asked):
        limit_rps = self.limit_rps * (1.4 if asked[0].id // 100 % 2 else 1.0)
        return dataclasses.replace(self, limit_rps=limit_rps)._even(asked)

    def _even(self, asked):
        return super()._timelines(asked)


def test_a_sweep_stops_at_the_first_look_that_resolves_every_system(tmp_path):
    """All seeds are alike, so two resolve; the interval has no width."""
    summary = sweep(tmp_path, *LOOKS).run()
    assert (summary["num_seeds"], summary["looks"]) == (2, [2, 4, 8])
    assert summary["confidence"] == pytest.approx(1 - 0.05 / 3)
    assert all(s["goodput"]["resolved"] for s in summary["systems"].values())


def test_a_sweep_goes_on_to_all_seeds_while_a_system_is_not_resolved(tmp_path):
    one = sweep(tmp_path, *LOOKS)
    uneven = EachItsOwn(Deployment.parse("2xcolocated:tp1"), 10.0)
    one = of_systems(one, **{**one.served, "vllm_v0": uneven})
    summary = one.run()
    assert summary["num_seeds"] == 8
    vllm, other = (summary["systems"][n] for n in ("vllm_v0", "disaggregated"))
    assert not vllm["goodput"]["resolved"] and other["goodput"]["resolved"]
    # Two seeds looked for the rates; all runs of a look are of the same rates.
    assert {p["num_seeds"] for p in vllm["points"]} == {2, 8}
    for system in (vllm, other):
        assert len(system["goodput"]["per_seed_rps_per_device"]) == 8
        assert system["goodput"]["bracketed"]
    # A resumed run finds every point.
    again = of_systems(sweep(tmp_path, *LOOKS), **{**one.served, "vllm_v0": uneven})
    uneven.calls.clear()
    assert json.dumps(again.run()) == json.dumps(summary)
    assert uneven.calls == []


def test_pairs_are_told_apart_by_seed(tmp_path):
    (pair,) = sweep(tmp_path, *LOOKS).run()["pairs"]
    assert (pair["ahead"], pair["behind"]) == ("disaggregated", "vllm_v0")
    assert pair["told_apart"] and pair["ratio"]["mean"] == pytest.approx(2, rel=0.1)


def test_a_pair_whose_order_changes_with_the_seed_is_not_told_apart(tmp_path):
    found = {"a": [1.0, 2.0, 3.0], "b": [1.1, 1.9, 3.1], "c": [0.5, 1.0, 1.5]}
    systems = {n: {"goodput": {"per_seed_rps_per_device": x}} for n, x in found.items()}
    told = {
        (pair["ahead"], pair["behind"]): pair["told_apart"]
        for pair in pairs(sweep(tmp_path).judge, systems)
    }
    assert told == {("b", "a"): False, ("b", "c"): True, ("a", "c"): True}


def test_the_points_of_a_target_are_its_own(tmp_path):
    tight, relaxed = (
        dataclasses.replace(sweep(tmp_path), target=name)
        for name in ("tight", "relaxed")
    )
    tight.run()
    assert {point.target for point in tight.points()} == {"tight"}
    relaxed.run()
    assert len(tight.run_dir.points()) == 2 * len(tight.points())
