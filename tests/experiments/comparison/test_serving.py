"""The tables of a single cell: all layouts, and the fewest devices for a rate."""

from disagg_jax.search.comparison import SystemResult
from disagg_jax.search.fewest import Demand, FewestDevices, Trial
from experiments.comparison import serving
from experiments.comparison.serving import RateAnswer


def trial(devices, attainment=0.95, *, served=True):
    return Trial(
        devices=devices,
        deployment=f"{devices}xcolocated:tp1",
        attainment=attainment,
        served=served,
        ttft_s={"p50": 0.1, "p90": 0.25, "p99": 0.5},
        tpot_s={"p50": 0.01, "p90": 0.02, "p99": None},
    )


def answer(system, best, *failed, bound=2, least=1):
    trials = (*failed, *([best] if best else []))
    return FewestDevices(
        system=system, best=best, bound=bound, least=least, trials=trials
    )


SERVED = RateAnswer(
    demand=Demand(rate_rps=5.53, num_requests=100, seeds=(0,), max_devices=8),
    own=True,
    found=[
        answer("vllm_v0", trial(3), trial(2, 0.6, served=False)),
        answer("orca", trial(2)),
        answer("sarathi", trial(1), bound=1),
        answer("slow", None, trial(8, 0.8, served=False)),
        answer("large", None, bound=None, least=4),
        answer("late", None, bound=None, least=0),
    ],
)


def test_a_row_has_the_devices_the_latencies_and_why_not_fewer():
    head, runs, _, bounds, *rows = serving.fewest(SERVED).splitlines()
    assert head == (
        "the fewest devices that serve 5.53 requests/s, the trace's own rate; at most "
        "8 are tried"
    )
    assert runs == "whole deployments simulated at that rate: 1 run of 100 requests"
    assert bounds == (
        "an estimate of the capacity, with a margin; simulations of prefill and of "
        "decode alone"
    )
    shown = [" ".join(row.split()) for row in rows[1:]]
    assert shown == [
        "vllm_v0 3 3xcolocated:tp1 95.0% 0.1, 0.25, 0.5 10, 20, - 2 are too "
        "few, as simulated",
        "orca 2 2xcolocated:tp1 95.0% 0.1, 0.25, 0.5 10, 20, - bound: fewer than 2 "
        "cannot",
        "sarathi 1 1xcolocated:tp1 95.0% 0.1, 0.25, 0.5 10, 20, - there is no smaller "
        "deployment",
        "slow > 8 - - - - 8 are too few, as simulated",
        "large > 8 - - - - bound: 8 cannot",
        "late > 8 - - - - no layout meets the targets, even alone",
    ]


def test_the_sentence_begins_with_who_needs_fewest():
    assert serving.sentence(SERVED) == (
        "For 5.53 requests/s, the trace's own rate, devices needed: sarathi 1, orca 2, "
        "vllm_v0 3, slow more than 8, large more than 8, late more than 8."
    )


def test_the_record_has_the_trials():
    content = serving.record(SERVED)
    assert content["rate_rps"] == 5.53 and content["own_rate"]
    first, *_ = content["systems"]
    assert first["best"]["ttft_s"]["p90"] == 0.25
    assert first["below"]["attainment"] == 0.6 and len(first["trials"]) == 2


def test_all_layouts_have_a_goodput_or_say_why_not():
    known = {"seeds": [0, 1], "bracketed": True, "inversion": None}
    rows = (
        {"candidate": "a", "goodput": 2.0, "interval": [1.5, 2.5]},
        {"candidate": "b", "goodput": 1.0, "interval": [None, None]},
        {"candidate": "c", "goodput": 1.0, "interval": [0.5, 1.5], "bracketed": False},
        {"candidate": "d", "goodput": 1.0, "interval": [1.0, 1.0], "inversion": "up"},
        {"candidate": "e", "goodput": None, "at_most": 2.1, "why": "beaten"},
    )
    one = SystemResult(
        system="orca",
        colocated=True,
        deployment="a",
        parameters=(),
        per_seed_rps=(2.0, 2.0),
        needs=0.5,
        num_requests=9,
        candidates=tuple(known | row for row in rows),
    )
    _, _, *shown = serving.layouts([one]).splitlines()
    assert [" ".join(line.split()) for line in shown] == [
        "orca a 2 [1.5, 2.5] 2",
        "orca b 1 2",
        "orca c 1 [0.5, 1.5] 2 a seed passes or fails at every rate tried",
        "orca d 1 [1, 1] 2 up",
        "orca e <= 2.1 2 beaten",
    ]


def test_nothing_left_out_is_not_said():
    assert serving.left_out([]) == ""
