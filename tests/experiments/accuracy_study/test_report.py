"""The tables of the accuracy command from results made by hand."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from disagg_jax.calibration.decision_agreement import Agreement
from disagg_jax.deployment import Deployment
from disagg_jax.metrics.attainment import SLO
from disagg_jax.metrics.goodput import GoodputEstimate
from disagg_jax.metrics.intervals import interval_across
from disagg_jax.work import StepLoad
from experiments.accuracy_study import report
from experiments.accuracy_study.paired_runs import Compared, PredictedStep
from experiments.accuracy_study.report import Result, StepErrors, SystemAccuracy

STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
KEYS = [
    *(f"p{p}_{name}_ms" for name in ("ttft", "tpot") for p in (50, 90, 99)),
    *(f"mean_{stage}_ms" for stage in STAGES),
]


def run(attainment, scale, **more):
    """A run whose latencies are 1, 2, ... ms in the order of `KEYS`, times a scale."""
    latencies = {key: scale * i for i, key in enumerate(KEYS, 1)}
    return {"attainment": attainment, **latencies, **more}


def agreed(decided, shared):
    return Agreement(decided=decided, shared=shared, before=3)


def compared(rate_rps=8.0, **changes):
    """Two seeds: 80 % on the engine, 86 % simulated, latencies longer by 1, 2, ..."""
    slowdown = {"decode": [1.0, 1.2], "prompt": [1.3], "works": 60}
    simulated = run(0.85, 1.0)
    for i, key in enumerate(KEYS, 1):
        simulated[key] *= 1 + i / 100
    fields = {
        "engine": [run(0.7, 1.0, slowdown=slowdown), run(0.9, 1.0, slowdown=slowdown)],
        "simulated": [simulated, {**simulated, "attainment": 0.87}],
        "profiled": [0.83, 0.85],
        "measured": [0.8, 0.82],
        "allowed": 0.03,
        "agreements": [agreed(30, 10), agreed(10, 10)],
    }
    return Compared(rate_rps=rate_rps, **(fields | changes))


def goodput(*per_seed_rps):
    return GoodputEstimate(
        per_seed_rps=per_seed_rps,
        interval=interval_across(per_seed_rps),
        pass_rps=1.0,
        fail_rps=2.0,
        bracketed=True,
        resolved=True,
    )


def step(measured_s, predicted_s):
    return PredictedStep(0, StepLoad((), 1, 8), measured_s, predicted_s)


ERRORS = report._errors([step(1.0, 1.0), step(3.0, 6.0)])


def result(**changes):
    vllm = SystemAccuracy(
        deployment="2xcolocated:tp1",
        devices=2,
        rates=[compared(4.0), compared(8.0), compared(12.0)],
        engine=goodput(10.0, 14.0),
        simulated=goodput(12.0, 15.0),
        profiled=goodput(9.0, 9.0),
        steps={"decode": ERRORS},
        shown=[step(1e-3, 2e-3)],
        again=-0.0321,
    )
    pair = dataclasses.replace(
        vllm,
        deployment="prefill:tp1,decode:tp3",
        devices=4,
        engine=goodput(20.0, 20.0),
        simulated=goodput(20.5, 20.5),
        steps={"prefill": StepErrors(7, 2.0, 0.5, 0.031, 0.042)},
    )
    fields = {
        "systems": {"vllm_v0": vllm, "pair": pair},
        "slo": SLO(ttft_s=0.0123, tpot_s=0.00456),
        "target": 0.9,
        "num_requests": 70,
        "seeds": 2,
        "clock": "virtual",
        "profile": {
            **{"model": "tiny", "dtype": "float32", "device": "cpu"},
            **{"date": "2024-01-02", "commit": "abc"},
        },
        "mark": "",
        "moved": (1.021, 0.97),
    }
    return Result(**(fields | changes))


def cells(title, text):
    """The table below a title, its columns split."""
    table = text.split(f"# {title}\n")[1].split("\n\n")[0]
    return [line.split() for line in table.splitlines()]


TEXT = report.text(result())


def test_a_ratio_of_steps_is_of_their_sums():
    """A mean of the ratios, 1 and 2, would be 1.5."""
    assert ERRORS == StepErrors(2, 4.0, 7 / 4, 0.5, pytest.approx(0.9))
    (row,) = cells("steps in the runs, predicted against measured", TEXT)[1:2]
    assert row == ["vllm_v0", "decode", "2", "4.0", "+75.0%", "50.0%", "90.0%"]


def test_all_steps_together_are_weighted_by_their_seconds():
    """4 s were predicted to take 7, and 2 s to take 1: 8 / 6 over both systems."""
    cost = report.verdicts(result())[-1]
    assert "steps are predicted to take +33.3% of what they took, together" in cost
    steps = cells("steps in the runs, predicted against measured", TEXT)
    assert steps[2] == ["pair", "prefill", "7", "2.0", "-50.0%", "3.1%", "4.2%"]


def test_a_rate_has_each_number_in_its_place():
    title = "attainment and latency, simulated against engine"
    rows = cells(title, TEXT)
    assert rows[1] == [
        *("vllm_v0", "2", "80.0%", "86.0%", "+6.0%", "3.0%", "MISSED"),
        "+4.0%",  # as profiled: 84 %
        *("+10%", "+30%"),  # the machine: decodes, prompts
        *("+5.0%", "+1.0%"),  # 86 against 81 % with the engine's durations; the rest
        "50%",  # 20 of 40 decisions
        *("+1.0%", "+2.0%", "+3.0%", "+4.0%", "+5.0%", "+6.0%"),
    ]
    assert [row[1] for row in rows[1:]] == ["2", "4", "6", "1", "2", "3"]


@pytest.mark.parametrize(("allowed", "mark"), [(0.0601, "ok"), (0.0599, "MISSED")])
def test_a_difference_may_be_as_large_as_is_allowed(allowed, mark):
    one = dataclasses.replace(
        result().systems["vllm_v0"], rates=[compared(allowed=allowed)]
    )
    rows = cells(
        "attainment and latency, simulated against engine",
        report.text(result(systems={"vllm_v0": one})),
    )
    assert rows[1][6] == mark


def test_goodputs_are_per_device_and_their_errors_relative():
    rows = cells("goodput, requests/s per device", TEXT)
    # 10 and 14 requests/s on 2 devices: 6 +- 12.706 x 1, from 0 on; 12 and 15: 6.75 +-
    # 9.53.
    assert rows[1] == [
        *("vllm_v0", "2xcolocated:tp1", "6", "[0,", "18.71]"),
        *("6.75", "[0,", "16.28]", "+12.5%", "MISSED", "-25.0%", "-3.2%"),
    ]
    assert rows[2][2:] == [
        *("5", "[5,", "5]", "5.125", "[5.125,", "5.125]"),
        *("+2.5%", "ok", "-55.0%", "-3.2%"),
    ]


def test_an_engine_that_never_passed_gives_no_error_to_divide_by():
    never = dataclasses.replace(result().systems["vllm_v0"], engine=goodput(0.0, 0.0))
    assert never.error(never.simulated) == never.error(never.profiled) == math.inf


def test_stages_are_those_of_the_middle_rate():
    title = "mean stages at the middle rate, engine -> simulated, ms"
    rows = cells(title, TEXT)
    assert rows[1] == [
        *("vllm_v0", "4", "7.00", "->", "7.49", "8.00", "->", "8.64", "9.00", "->"),
        *("9.81", "10.00", "->", "11.00", "11.00", "->", "12.21"),
    ]
    assert rows[0][2:] == list(STAGES)


def test_the_head_says_what_was_compared():
    head = TEXT.split("\n\n")[0]
    for said in (
        "tiny float32 on cpu; 70 requests x 2 seeds a point; clock virtual, live",
        "SLO: TTFT <= 12.30 ms and TPOT <= 4.56 ms for 90% of requests",
        "profile of 2024-01-02, commit abc; programs alone take +2.1% before the runs, "
        "-3.0% after",
    ):
        assert f"# {said}" in head
    marked = report.text(result(mark="compiled, not measured"))
    assert "# tiny float32 on cpu; profile compiled, not measured; 70 req" in marked


def test_the_verdicts_count_and_name_causes():
    attainment, off, order, pairs, _ = report.verdicts(result())
    assert attainment == (
        "attainment: 0 of 6 points within what is allowed; largest difference 6.0%   "
        "MISSED: 6 by durations, 0 by scheduling; the stage that differs most is "
        "mostly decode"
    )
    assert off == (
        "goodput: off by 7.5% on average, 12.5% at most; aim 5%   MISSED; as profiled "
        "40.0% on average"
    )
    # Per device: 6 against 5, and 6.75 against 5.125.
    assert order.endswith("engine vllm_v0 > pair; simulated vllm_v0 > pair   ok")
    assert "the engine tells 0 of 1 apart" in pairs


def test_a_cause_is_scheduling_where_little_goes_with_the_durations():
    """Of a difference of 6 points, 2 go with the engine's durations."""
    scheduled = compared(measured=[0.84, 0.84])
    one = dataclasses.replace(
        result().systems["vllm_v0"], rates=[scheduled, compared()]
    )
    verdict = report.verdicts(result(systems={"vllm_v0": one}))[0]
    assert "MISSED: 1 by durations, 1 by scheduling;" in verdict


def one(**changes):
    """A result of vllm alone."""
    return result(
        systems={"vllm_v0": dataclasses.replace(result().systems["vllm_v0"], **changes)}
    )


def test_a_difference_below_zero_may_miss_too():
    below = compared(simulated=[run(0.7, 1.0), run(0.7, 1.0)], measured=[0.7, 0.7])
    (verdict, *_) = report.verdicts(one(rates=[compared(allowed=0.1), below]))
    assert "1 of 2 points within what is allowed; largest difference 10.0%" in verdict
    # 70 % simulated, and 70 % with the engine's durations: by scheduling.
    assert "MISSED: 0 by durations, 1 by scheduling" in verdict
    fine = one(rates=[compared(allowed=0.0601)] * 2)
    assert report.verdicts(fine)[0].endswith("difference 6.0%   ok")


def test_a_cause_below_zero_is_one_of_durations_too():
    """10 points too few, 6 of which go with the engine's durations."""
    below = compared(simulated=[run(0.7, 1.0)] * 2, measured=[0.76, 0.76])
    (verdict, *_) = report.verdicts(one(rates=[below]))
    assert "MISSED: 1 by durations, 0 by scheduling" in verdict


def test_the_stage_that_differs_most_is_that_of_most_points():
    """Either way: a shorter transfer by 5 ms, and twice a longer queue by 6."""
    queue = compared(simulated=[run(0.9, 1.0) | {"mean_prefill_queue_ms": 13.0}] * 2)
    moved = compared(simulated=[run(0.9, 1.0) | {"mean_transfer_ms": 4.0}] * 2)
    for rates, worst in (
        ([moved, queue, queue], "prefill_queue"),
        ([queue, moved, moved], "transfer"),
    ):
        (verdict, *_) = report.verdicts(one(rates=rates))
        assert verdict.endswith(f"the stage that differs most is mostly {worst}")


@pytest.mark.parametrize(
    ("simulated", "shown", "mark"),
    [
        (12.59, "+4.9%", "ok"),
        (12.7, "+5.8%", "MISSED"),
        (11.41, "-4.9%", "ok"),
        (11.3, "-5.8%", "MISSED"),
    ],
)
def test_a_goodput_may_be_off_by_five_percent_either_way(simulated, shown, mark):
    """Of 12 requests/s."""
    found = one(engine=goodput(12.0), simulated=goodput(simulated))
    row = cells("goodput, requests/s per device", report.text(found))[1]
    assert row[4:6] == [shown, mark]
    off = report.verdicts(found)[1]
    assert f"aim 5%   {mark}; as profiled" in off


def test_the_worst_goodput_has_to_meet_the_aim():
    """3 and 6 %: 4.5 % on average is not enough."""
    systems = {
        name: dataclasses.replace(
            result().systems[name], engine=goodput(100.0), simulated=goodput(found)
        )
        for name, found in (("vllm_v0", 103.0), ("pair", 106.0))
    }
    off = report.verdicts(result(systems=systems))[1]
    assert "off by 4.5% on average, 6.0% at most; aim 5%   MISSED" in off


def sides(engines, simulated):
    """Systems of one and two devices with goodputs by seed, in requests/s of all."""
    vllm = result().systems["vllm_v0"]
    return result(
        systems={
            f"x{devices}": dataclasses.replace(
                vllm, devices=devices, engine=goodput(*e), simulated=goodput(*s)
            )
            for devices, e, s in zip((1, 2, 4), engines, simulated, strict=False)
        }
    )


def test_the_order_is_by_goodput_per_device_on_both_sides():
    """8, 7 and 3 per device on the engine; 7, 8 and 3 simulated."""
    engines = [(8.0, 8.0), (14.0, 14.2), (12.0, 12.4)]
    found = sides(engines, [(7.0, 7.0), (16.0, 16.0), (12.0, 12.0)])
    assert found.order("engine") == ["x1", "x2", "x4"]
    assert found.order("simulated") == ["x2", "x1", "x4"]
    order, pairs = report.verdicts(found)[2:4]
    assert order == (
        "order of the systems: engine x1 > x2 > x4; simulated x2 > x1 > x4   MISSED"
    )
    assert pairs == (
        "pairs: the engine tells 3 of 3 apart (95 %, paired by seed); the simulator "
        "has 2 of these in the same order   MISSED"
    )
    assert found.told_apart() == [("x1", "x2"), ("x1", "x4"), ("x2", "x4")]


def test_a_pair_that_its_seeds_do_not_tell_apart_may_change_places():
    """8 and 6 against 7.1 and 7.1 per device."""
    found = sides([(8.2, 6.2), (14.2, 14.2)], [(7.0, 7.0), (16.0, 16.0)])
    assert found.told_apart() == []
    pairs = report.verdicts(found)[3]
    assert "tells 0 of 1 apart" in pairs and pairs.endswith("order   ok")


def test_an_error_that_one_in_ten_exceeds_is_the_ninth_of_ten():
    """1 % to 11 %: at 90 % of the way it is 10 %."""
    steps = [step(1.0, 1 + i / 100) for i in range(1, 12)]
    errors = report._errors(steps)
    assert errors.p90_error == pytest.approx(0.10)
    assert errors.mean_error == pytest.approx(0.06)
    below = report._errors([step(1.0, 0.9), step(1.0, 1.1)])
    assert below.mean_error == pytest.approx(0.1) and below.ratio == pytest.approx(1)


@dataclasses.dataclass(frozen=True)
class Told:
    """As much of a paired run as a result reads."""

    steps: list
    name: str = "vllm_v0"
    slo: SLO = SLO(ttft_s=1.0, tpot_s=0.1)

    @property
    def server(self):
        return SimpleNamespace(deployment=Deployment.parse("prefill:tp1,decode:tp1"))

    def compare(self, rate):
        """On the engine it passes up to 8, simulated up to 12, as profiled up to 4."""
        limits = {"engine": 8.0, "simulated": 12.0, "profiled": 4.0}
        good = {side: [float(rate <= limit)] * 2 for side, limit in limits.items()}
        return compared(
            rate,
            engine=[run(share, 1.0) for share in good["engine"]],
            simulated=[run(share, 1.0) for share in good["simulated"]],
            profiled=good["profiled"],
            measured=[0.0, 0.0],
        )

    def points(self, rate):
        return [rate]

    def predicted_steps(self, points):
        assert points == [4.0, 8.0, 12.0, 16.0]
        return self.steps

    def repeated(self, rates):
        assert rates == [4.0, 8.0, 12.0, 16.0]
        return 0.125


def test_a_result_has_the_goodput_of_each_side_and_the_steps_of_all_rates():
    decodes = [step(1.0 + i, 2.0) for i in range(5000)]
    prompt = PredictedStep(0, StepLoad(((0, 9),), 0, 0), 1.0, 3.0)
    profile = SimpleNamespace(provenance={"model": "tiny"}, mark="")
    workload = SimpleNamespace(num_requests=33)
    found = report.compare(
        [Told([*decodes, prompt])],
        {"vllm_v0": [4.0, 8.0, 12.0, 16.0]},
        target=0.9,
        profile=profile,
        moved=(1.0, 2.0),
        config=SimpleNamespace(workload=workload, num_seeds=2, clock="virtual"),
    )
    assert (found.num_requests, found.seeds, found.clock) == (33, 2, "virtual")
    assert (found.moved, found.target, found.profile) == (
        *((1.0, 2.0), 0.9, {"model": "tiny"}),
    )
    vllm = found.systems["vllm_v0"]
    passing = [vllm.engine.pass_rps, vllm.simulated.pass_rps, vllm.profiled.pass_rps]
    assert passing == [8.0, 12.0, 4.0]
    assert (vllm.deployment, vllm.devices) == ("prefill:tp1,decode:tp1", 2)
    assert vllm.again == 0.125
    assert {kind: errors.steps for kind, errors in vllm.steps.items()} == {
        "decode": 5000,
        "prefill": 1,
    }
    # Of the many some are drawn, from the first to the last.
    drawn = [s.measured_s for s in vllm.shown if s.kind == "decode"]
    assert len(drawn) <= 2000 and drawn[0] == 1.0 and drawn[-1] > 4990
    assert [s for s in vllm.shown if s.kind == "prefill"] == [prompt]


def test_the_record_has_all_but_the_steps_of_the_picture():
    record = report.to_json(result())
    vllm = record["systems"]["vllm_v0"]
    assert "shown" not in vllm
    assert vllm["steps"]["decode"] == ERRORS._asdict()
    assert vllm["engine"]["per_seed_rps"] == (10.0, 14.0)
    assert record["moved"] == (1.021, 0.97)
    assert record["verdicts"] == report.verdicts(result())


def test_the_picture_is_per_device_and_in_ms():
    attainment = report.attainment_panel(result())
    by_label = {series.label: series for series in attainment.series}
    assert by_label["vllm_v0, engine"].points == [
        (rate, pytest.approx(0.8)) for rate in (2.0, 4.0, 6.0)
    ]
    assert by_label["pair, simulated"].points[0] == (1.0, pytest.approx(0.86))
    assert by_label["pair, simulated"].style == "dashed" and attainment.line == 0.9
    (kind,) = report._scatter(result()).series
    assert list(kind.points) == [(1.0, 2.0)] * 2 and kind.label == "decode"
