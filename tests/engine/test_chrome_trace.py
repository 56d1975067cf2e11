"""Drawings of the engine's runs, on both clocks."""

import pytest

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.engine.executor import EngineExecutor, as_measured
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.metrics import e2e_s
from disagg_jax.runlog.chrome_trace import chrome_trace
from disagg_jax.runlog.event_log import EventLog
from tests.drawings import by_lane, check_trace, lane_names, slices
from tests.engine.harness import make_config, make_controller, make_request

# Of test_stages: its programs serve here too.
DEEP = make_config("deep", layers=4, q_heads=8, kv_heads=4)


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "deployment",
    [
        pytest.param("prefill:tp1pp3,decode:tp1pp2", marks=pytest.mark.slow),
        "prefill:tp2pp2,2xdecode:tp1",
    ],
)
def test_a_run_of_the_engine(world, deployment, streams, clock):
    engine = world.engine(deployment, DEEP)
    backend = (
        WallBackend(engine)
        if clock == "wall"
        else VirtualBackend(EngineExecutor(engine, as_measured))
    )
    requests = [make_request(i, 6 + i, 9, arrival_s=0.002 * i) for i in range(8)]
    log = EventLog()
    with engine.serving():
        controller = make_controller(engine, streams=streams)
        timelines = serve(controller, backend, requests, observer=log)
    trace = chrome_trace(engine.deployment, log.lines, timelines)
    check_trace(trace)
    assert len(lane_names(trace)["devices"]) == engine.deployment.devices
    assert len(by_lane(trace, "devices")) == engine.deployment.devices
    assert len(slices(trace, "links")) >= len(requests)
    for timeline, stages in zip(
        timelines, by_lane(trace, "requests").values(), strict=True
    ):
        total_s = sum(end_s - start_s for _, start_s, end_s in stages)
        assert total_s == pytest.approx(e2e_s(timeline), abs=1e-8)  # of 6 times to ns
    if clock == "virtual":
        drawn_s = sum(
            end_s - start_s for *_, start_s, end_s, _ in slices(trace, "devices")
        )
        tp = {
            i: spec.parallelism.tp for i, spec in enumerate(engine.deployment.instances)
        }
        busy_s = sum(s * tp[k[0]] for k, s in backend.busy_s.items() if k[0] >= 0)
        assert drawn_s == pytest.approx(busy_s, rel=1e-5)
