"""Whether two halves of the timings agree on who is ahead."""

import dataclasses

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.search.rates import SearchPlan
from experiments.runs.saved_run import Point
from experiments.sweep import settled
from experiments.sweep.point import PointTask
from experiments.sweep.settled import HalfSearch, half_goodput, verdict
from tests.experiments.sweep.test_sweep import SLO_S, Pretended, Source, sweep


def test_timings_are_settled_if_the_same_system_is_ahead_by_both_halves():
    ahead = [{"a": 2.0, "b": 1.0}, {"a": 1.5, "b": 1.4}]
    found = verdict(ahead)
    assert found["settled"] and found["winners"] == ["a", "a"]
    assert found["rps_per_device"] == ahead
    other = verdict([{"a": 2.0, "b": 1.0}, {"a": 1.3, "b": 1.4}])
    assert not other["settled"] and other["winners"] == ["a", "b"]


def pretended(limit_rps):
    deployment = Deployment.parse("2xcolocated:tp1")
    return Pretended(deployment, limit_rps, executed=False)


@pytest.mark.parametrize("begin_rps", [3.0, 19.0, 70.0])
def test_the_goodput_by_a_half_is_found_from_wherever_it_begins(tmp_path, begin_rps):
    """Attainment falls from 1 to 0.75 above 20/s: 90 % between the two rates there."""
    task = PointTask(
        served=pretended(20.0),
        source=Source(),
        point=Point("vllm_v0", begin_rps, 0),
        slo=SLO_S,
        criteria=sweep(tmp_path).criteria,
        virtual=True,
    )
    plan = SearchPlan(target=0.9, growth=1.1, tolerance=0.1, max_rates=40)
    found = half_goodput(HalfSearch(task=task, criterion="distserve", plan=plan))
    assert 20 / 1.1 <= found <= 20 * 1.1


def test_goodputs_by_a_half_are_per_device(tmp_path):
    one = sweep(tmp_path, "rates=")
    timed = {"vllm_v0": pretended(20.0), "disaggregated": pretended(40.0)}
    found = settled.goodputs(
        one.config,
        dataclasses.replace(one, timed=timed),
        Source(),
        {"vllm_v0": 20.0, "disaggregated": 40.0},
        map,
    )
    assert dict(found) == pytest.approx(
        {"vllm_v0": 10.0, "disaggregated": 20.0}, rel=0.1
    )
