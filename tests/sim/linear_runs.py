"""Runs of a simulation with a linear cost, for tests that compare runs."""

import dataclasses

from disagg_jax.deployment import Deployment, KVMemory
from disagg_jax.runlog.event_log import EventLog
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from tests.serving import POLICIES, make_request

DEPLOYMENTS = ("2xcolocated:tp1", "prefill:tp1,decode:tp1", "prefill:tp1pp2,decode:tp1")
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
    stages = tuple(spec.parallelism.pp for spec in parsed.instances)
    memory = KVMemory(num_blocks=40, block_tokens=4, max_context=1000)
    simulated = SimulatedDeployment(
        deployment=parsed,
        policies=POLICIES,
        memory=(memory,) * len(parsed.instances),
        cost=dataclasses.replace(cost, pp=stages)
        if isinstance(cost, LinearCost)
        else cost,
        spans=False,
    )
    log = EventLog()
    done = simulated.run(requests, observer=log)
    return log.lines, [t.token_s for t in done.timelines], simulated.cost


def burst(n=12):
    return [
        make_request(i, 0.7 * i, prompt=5 + 3 * i % 11, out=3 + i % 5) for i in range(n)
    ]
