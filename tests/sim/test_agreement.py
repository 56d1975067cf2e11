"""Comparing runs, and giving one run's decisions another's durations."""

import dataclasses

import pytest

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.event_log import EventLog
from disagg_jax.sim.agreement import agreement, retime
from disagg_jax.sim.cost import LinearCost
from disagg_jax.sim.simulate import SimulatedDeployment
from tests.serving import POLICIES, make_request

COST = LinearCost(
    step_base_s=1.0,
    prefill_token_s=0.25,
    decode_token_s=0.125,
    context_token_s=0.0625,
    transfer_base_s=0.5,
    transfer_token_s=0.03125,
)


def run(deployment, cost, requests):
    parsed = Deployment.parse(deployment)
    stages = tuple(spec.pp for spec in parsed.instances)
    memory = KVMemory(num_blocks=40, block_tokens=4, max_context=1000)
    simulated = SimulatedDeployment(
        deployment=parsed,
        policies=POLICIES,
        memory=(memory,) * len(parsed.instances),
        cost=dataclasses.replace(cost, pp=stages),
        spans=False,
    )
    log = EventLog()
    done = simulated.run(requests, observer=log)
    return log.lines, [t.token_s for t in done.timelines], simulated.cost


def burst(n=12):
    return [
        make_request(i, 0.7 * i, prompt=5 + 3 * i % 11, out=3 + i % 5) for i in range(n)
    ]


DEPLOYMENTS = ("2xcolocated:tp1", "prefill:tp1,decode:tp1", "prefill:tp1pp2,decode:tp1")


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_run_with_its_own_durations_is_itself(deployment):
    lines, token_s, cost = run(deployment, COST, burst())
    found = retime(lines, burst(), cost)
    assert [t.token_s for t in found] == [pytest.approx(each) for each in token_s]


def test_other_durations_move_the_same_decisions():
    """One request: prompt of 4 (1 + 1 = 2 s), then two decodes over 5 and 6 tokens.

    1.125 + 5/16 = 1.4375 and 1.125 + 6/16 = 1.5; all of it twice as long, from 3 s on.
    """
    request = make_request(0, 3.0, prompt=4, out=3)
    lines, token_s, cost = run("colocated:tp1", COST, [request])
    assert token_s == [[5.0, 6.4375, 7.9375]]
    slower = LinearCost(
        **{
            field.name: 2 * getattr(cost, field.name)
            for field in dataclasses.fields(cost)
            if field.name.endswith("_s")
        }
    )
    (found,) = retime(lines, [request], slower)
    assert found.token_s == pytest.approx([7.0, 9.875, 12.875])


def test_runs_agree_with_themselves_and_not_with_slower_ones():
    lines, _, _ = run("prefill:tp1,decode:tp1", COST, burst())
    same = agreement(lines, lines)
    assert same.decided == same.shared == same.before > 20
    slow = dataclasses.replace(COST, step_base_s=4.0)
    others, _, _ = run("prefill:tp1,decode:tp1", slow, burst())
    found = agreement(lines, others)
    assert found.decided == same.decided
    assert 0 < found.before <= found.shared < found.decided


def test_a_log_with_spans_is_refused():
    parsed = Deployment.parse("colocated:tp1")
    memory = KVMemory(num_blocks=40, block_tokens=4, max_context=1000)
    simulated = SimulatedDeployment(
        deployment=parsed, policies=POLICIES, memory=(memory,), cost=COST
    )
    log, requests = EventLog(), burst(4)
    simulated.run(requests, observer=log)
    with pytest.raises(ValueError, match="log: expected"):
        retime(log.lines, requests, COST)
