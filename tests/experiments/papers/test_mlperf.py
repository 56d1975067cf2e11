"""MLPerf's bounds: what they favour among the systems."""

from __future__ import annotations

from disagg_jax.search.goodput import find_goodput
from experiments.papers import mlperf
from experiments.papers.figure import Lab


def test_tighter_bounds_cost_goodput_and_reserving_memory_costs_more():
    lab = Lab(num_requests=150, seeds=1)
    found = {
        (system, bounds): find_goodput(mlperf._search(lab, system, bounds)).rps
        for system in ("sarathi_serve", "vllm_v0", "orca")
        for bounds in mlperf._BOUNDS
    }
    server, interactive = mlperf._BOUNDS
    for system in ("sarathi_serve", "vllm_v0", "orca"):
        assert found[system, interactive] < found[system, server]
    assert found["sarathi_serve", interactive] > found["orca", interactive]
    assert found["vllm_v0", server] > found["orca", server]


def test_all_systems_have_as_many_devices():
    lab = Lab(num_requests=4, seeds=1)
    devices = {
        mlperf._search(lab, system, mlperf._BOUNDS[0]).simulated.deployment.devices
        for system in mlperf._SYSTEMS
    }
    assert devices == {8}
