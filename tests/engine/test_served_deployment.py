"""One runner: the engine's runs are the simulator's, where durations are equal."""

import dataclasses

import jax
import pytest

from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Deployment
from disagg_jax.engine.served_deployment import (
    ServedDeployment,
    devices_for,
    devices_needed,
)
from disagg_jax.request import Status
from disagg_jax.sim.cost.deployment import CostExecutor
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Cancelled
from tests.engine.harness import MODELS, POLICIES, assert_reference, make_request

CONFIG = MODELS["divided"]
COST = LinearCost(
    step_base_s=1.0,
    prefill_token_s=0.25,
    decode_token_s=0.125,
    context_token_s=2**-6,
    transfer_base_s=0.5,
)


def modelled(work, parts_s):
    return CostExecutor(COST).run(work)


def served(world, deployment, **fields) -> ServedDeployment:
    engine = world.engine(deployment, CONFIG)
    return ServedDeployment(engine=engine, policies=POLICIES, **fields)


def requests():
    lengths = [(5, 9), (16, 1), (40, 24), (1, 12), (13, 7), (8, 3)]
    return [
        make_request(i, prompt, out, arrival_s=1.5 * i)
        for i, (prompt, out) in enumerate(lengths)
    ]


def lengths_only(asked):
    return [dataclasses.replace(request, prompt=None) for request in asked]


def stamps(run):
    """All that durations decide: not tokens, and not the bytes of KV."""
    return [
        dataclasses.replace(t, request=t.request.id, tokens=[], transfer_bytes=0)
        for t in run.timelines
    ]


@pytest.mark.parametrize("deployment", ["2xcolocated:tp1", "prefill:tp1,decode:tp1"])
def test_equal_durations_are_equal_runs(world, deployment):
    runner = served(world, deployment, timing=modelled)
    simulated = SimulatedDeployment(
        deployment=runner.deployment,
        policies=POLICIES,
        memory=runner.memory,
        cost=COST,
    )
    leave = [(20.0, Cancelled(2))]
    expected = simulated.run(lengths_only(requests()), leave)
    assert expected.timelines[2].status is Status.CANCELLED
    for executed in (True, False):
        run = dataclasses.replace(runner, executed=executed).run(requests(), leave)
        assert stamps(run) == stamps(expected)
        assert (run.end_s, run.busy_s) == (expected.end_s, expected.busy_s)
        assert (run.totals is not None) == executed
        assert any(t.tokens for t in run.timelines) == executed


@pytest.mark.parametrize(
    ("side", "deployment", "idle"),
    [
        ("prefill_router", "2xcolocated:tp1", 0),
        ("decode_router", "prefill:tp1,2xdecode:tp1", 1),
    ],
)
def test_a_router_picks_the_instances(world, side, deployment, idle):
    routers = {side: lambda request, instances: instances[len(instances) - 1]}
    runner = served(world, deployment, timing=modelled, executed=False, **routers)
    shares = runner.run(requests()).busy_shares(runner.deployment)
    assert [i for i, (share,) in enumerate(shares) if not share] == [idle]


def test_the_wall_clock_serves_the_reference_tokens(world):
    runner = served(world, "prefill:tp1,decode:tp1")
    assert not isinstance(runner.backend(), VirtualBackend)
    run = runner.run([dataclasses.replace(r, arrival_s=0.0) for r in requests()])
    assert_reference(world, CONFIG, {t.request.id: t for t in run.timelines})
    assert run.end_s >= max(t.token_s[-1] for t in run.timelines)
    assert run.busy_s == {}
    assert run.totals["prefill"].tokens >= 5 + 16 + 40 + 1 + 13 + 8  # some twice


def test_requests_without_token_ids_are_refused_if_programs_run(world):
    lengths = lengths_only(requests())
    runner = served(world, "2xcolocated:tp1", timing=modelled)
    with pytest.raises(ValueError, match="expected token ids, got lengths only"):
        runner.run(lengths)
    run = dataclasses.replace(runner, executed=False).run(lengths)
    assert {t.status for t in run.timelines} == {Status.FINISHED}


def test_what_wraps_the_executor_sees_all_work(world):
    seen = []

    class Watched:
        def __init__(self, executor):
            self.executor = executor

        def run(self, work):
            seen.append(work)
            return self.executor.run(work)

    works = []
    served(world, "2xcolocated:tp1", timing=modelled, around=Watched).run(
        requests(), observer=lambda now_s, events, decided: works.extend(decided)
    )
    assert seen == works != []


def test_a_device_stands_for_several_on_the_virtual_clock_only(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: ["only"])
    apart = Deployment.parse("prefill:tp1,2xdecode:tp1")
    assert devices_needed(apart, shared=False) == 3
    assert devices_needed(apart, shared=True) == 2  # equal instances share theirs
    assert devices_for(apart, shared=True) == ["only"] * 2
    assert devices_for(apart, shared=False) == ["only"]
    # Shards of one program cannot share a device.
    split = Deployment.parse("prefill:tp2,decode:tp1")
    assert devices_for(split, shared=True) == ["only"]
