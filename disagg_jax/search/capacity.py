"""What a deployment does without queues: with one request, and fully used.

A search for the goodput begins near the capacity: utilisation 1 of the busiest stage,
prompts in the batches of a long queue, decodes in the largest batch that keeps the TPOT
target and fits the memory. Pooled instances reach about that at best; a short run can
exceed it, since it ends before a backlog hurts.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence

from disagg_jax.deployment import Role
from disagg_jax.metrics import SLO
from disagg_jax.metrics.criteria import UnloadedLatency
from disagg_jax.request import Request
from disagg_jax.sim.run import RunLatencies
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import StepLoad, Transfer

_SAMPLE = 100  # requests whose prompts are timed


def unloaded_latency(
    simulated: SimulatedDeployment, request: Request
) -> UnloadedLatency:
    """Return the latencies of a request that finds the deployment empty.

    No load makes them shorter, unless `load_helps`. The decode steps of a request are
    timed at its mean context, which is exact where durations are linear in the context.
    """
    entry = simulated.deployment.of(Role.PREFILL, Role.COLOCATED)[0]
    decode = simulated.deployment.of(Role.DECODE, Role.COLOCATED)[0]
    return UnloadedLatency(
        ttft_s=_prompt_s(simulated, entry, request),
        tpot_s=_token_s(simulated, entry, decode, request),
    )


def unloaded(
    simulated: SimulatedDeployment, requests: Sequence[Request]
) -> RunLatencies:
    """Return a run in which each request finds the deployment empty; no stages."""
    alone = [unloaded_latency(simulated, request) for request in requests]
    return RunLatencies(
        arrived=len(requests),
        ttft_s=tuple(a.ttft_s for a in alone),
        tpot_s=tuple(a.tpot_s for a in alone),
        stages=(),
        steady=True,
        end_s=0.0,
    )


def _prompt_s(simulated: SimulatedDeployment, instance: int, request: Request) -> float:
    load = StepLoad(((0, request.prompt_tokens),), 0, 0)
    return sum(simulated.cost.stages_s(instance, load))


def _token_s(
    simulated: SimulatedDeployment, src: int, dst: int, request: Request
) -> float:
    """Return the TPOT; each gap carries an equal share of the transfer."""
    gaps = request.max_tokens - 1
    if not gaps:
        return 0.0
    # Contexts run from prompt + 1 to prompt + gaps; the mean may be half an integer.
    twice = 2 * request.prompt_tokens + 1 + gaps
    step_s = statistics.fmean(
        sum(simulated.cost.stages_s(dst, StepLoad((), 1, context)))
        for context in (twice // 2, (twice + 1) // 2)
    )
    if src == dst:
        return step_s
    transfer = Transfer(0, request, src, dst, (), (), request.prompt_tokens)
    return step_s + simulated.cost.hop(transfer).duration_s / gaps


def capacity_rps(
    simulated: SimulatedDeployment, requests: Sequence[Request], slo: SLO
) -> float:
    """Return the requests/s that the deployment could serve; inf if all is free."""
    colocated = (
        (_prefill_rps(simulated, i, requests), _decode_rps(simulated, i, requests, slo))
        for i in simulated.deployment.of(Role.COLOCATED)
    )
    apart = min(phase_capacities_rps(simulated, requests, slo))
    return apart + sum(_rate(1 / a + 1 / b) for a, b in colocated)


def phase_capacities_rps(
    simulated: SimulatedDeployment, requests: Sequence[Request], slo: SLO
) -> tuple[float, float]:
    """Return the requests/s of all prefill and of all decode instances."""
    prefill, decode = (simulated.deployment.of(r) for r in (Role.PREFILL, Role.DECODE))
    return (
        sum(_prefill_rps(simulated, i, requests) for i in prefill),
        sum(_decode_rps(simulated, i, requests, slo) for i in decode),
    )


def _prefill_rps(
    simulated: SimulatedDeployment, instance: int, requests: Sequence[Request]
) -> float:
    """Return the prompts/s of an instance, in the batches of a long queue."""
    role = simulated.deployment.instances[instance].role
    limits = simulated.policies[role].limits
    batches: list[list[int]] = []
    room = 0
    for request in requests[:_SAMPLE]:
        tokens = request.prompt_tokens
        if tokens > room or len(batches[-1]) == limits.prefill_rows:
            batches.append([])
            room = limits.prefill_tokens
        batches[-1].append(tokens)
        room -= tokens
    stages_s = simulated.cost.stages_s
    loads = (StepLoad(tuple((0, n) for n in batch), 0, 0) for batch in batches)
    busy_s = sum(max(stages_s(instance, load)) for load in loads)
    return _rate(busy_s / len(requests[:_SAMPLE]))


def _decode_rps(
    simulated: SimulatedDeployment, instance: int, requests: Sequence[Request], slo: SLO
) -> float:
    """Return the requests/s whose later tokens an instance generates in time."""
    steps = statistics.fmean(r.max_tokens - 1 for r in requests)
    if steps == 0:
        return math.inf
    context = statistics.fmean(r.prompt_tokens + r.max_tokens / 2 for r in requests)
    memory, spec = simulated.memory[instance], simulated.deployment.instances[instance]
    stages = spec.parallelism.pp  # each holds a batch of its own
    fitting = int(memory.num_blocks * memory.block_tokens / context / stages)
    most = min(fitting, simulated.policies[spec.role].limits.decode_rows // stages)

    def stages_s(decodes: int) -> Sequence[float]:
        load = StepLoad((), decodes, int(decodes * context))
        return simulated.cost.stages_s(instance, load)

    def too_slow(decodes: int) -> bool:
        return sum(stages_s(decodes)) > slo.tpot_s

    sizes = range(2, max(most, 1) + 1)
    decodes = 1 + bisect.bisect_left(sizes, True, key=too_slow)
    return _rate(max(stages_s(decodes)) * steps / decodes)


def load_helps(simulated: SimulatedDeployment, requests: Sequence[Request]) -> bool:
    """Return whether some decode step takes less time than the step of one request.

    Measured times may say so. Low rates can then be served worse than high ones, and
    the unloaded latency is no bound.
    """
    context = statistics.fmean(r.prompt_tokens + r.max_tokens / 2 for r in requests)
    i = simulated.deployment.of(Role.DECODE, Role.COLOCATED)[0]
    spec, memory = simulated.deployment.instances[i], simulated.memory[i]
    most = simulated.policies[spec.role].limits.decode_rows // spec.parallelism.pp
    most = min(most, int(memory.num_blocks * memory.block_tokens / context))

    def step_s(decodes: int) -> float:
        load = StepLoad((), decodes, int(decodes * context))
        return sum(simulated.cost.stages_s(i, load))

    sizes = (2**k for k in range(1, max(most, 1).bit_length()))
    return any(step_s(decodes) < step_s(1) for decodes in sizes)


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else math.inf
