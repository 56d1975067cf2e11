"""Checks a system's policies: serves small cases, and looks at what they plan.

In a run the controller refuses a plan that is outside the policy's limits, that has a
request twice or one that is not there, a chunk beyond its prompt, or blocks that are
not free (`control.plan_check`), and it says when requests wait for ever. These checks
add what no single plan shows: that no instance idles while it has work, that the run
ends, and that every request gets all its tokens and gives back all its memory.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from disagg_jax.control.controller import Controller
from disagg_jax.control.instance_state import InstanceState
from disagg_jax.deployment import Deployment, InstanceSpec, KVMemory, Role
from disagg_jax.request import Request, Status, Timeline
from disagg_jax.scheduling.interface import Policy
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.work import Event, Work

# Turns of the controller for each token: many more than preemptions make necessary.
_TURNS = 100


def check_system(
    policies: Mapping[Role, Policy], *, cases: int = 50, seed: int = 0
) -> None:
    """Serve random cases with two instances of each role, and check all plans.

    Raises:
      RuntimeError: on a plan or a run that is not allowed, with what was expected.
    """
    rng = random.Random(seed)
    for _ in range(cases):
        longest = rng.choice((6, 60, 600))  # tokens of a prompt
        memory = KVMemory(
            num_blocks=rng.randint(3, 30),
            block_tokens=max(2, longest // 8),
            max_context=8 * longest,
        )
        requests = [
            Request(
                id=i,
                arrival_s=float(rng.randint(0, 12)),
                prompt_tokens=rng.randint(1, longest),
                max_tokens=rng.randint(1, 8),
            )
            for i in range(rng.randint(1, 40))
        ]
        check_run(policies, memory, requests)


def check_run(
    policies: Mapping[Role, Policy],
    memory: KVMemory,
    requests: Sequence[Request],
    *,
    streams: bool = False,
) -> list[Timeline]:
    """Serve `requests` with two instances of each role, and check all plans.

    Args:
      memory: of each instance.
      streams: whether KV leaves while the rest of its prompt is computed.

    Raises:
      RuntimeError: as `check_system`.
    """
    instances = tuple(InstanceSpec(role=role) for role in policies) * 2
    simulated = SimulatedDeployment(
        deployment=Deployment(instances),
        policies=policies,
        memory=(memory,) * len(instances),
        cost=LinearCost(step_base_s=1.0, prefill_token_s=0.25, transfer_base_s=0.5),
        streams=streams,
        spans=False,
    )
    controller = simulated.controller()
    watch = _IdleWatch(
        controller, sum(r.max_tokens + r.prompt_tokens for r in requests)
    )
    timelines = simulated.run(requests, observer=watch, controller=controller).timelines
    for timeline in timelines:
        _check_end(timeline)
    for instance in controller.instances:
        lost = memory.num_blocks - instance.blocks.free
        _expect(
            not lost, f"{instance}: expected all KV blocks back, {lost} are missing"
        )
    return timelines


class _IdleWatch:
    """An observer that looks for idle instances, and for a run without an end."""

    def __init__(self, controller: Controller, tokens: int):
        self._instances = controller.instances
        self._turns_left = _TURNS * (tokens + 1)

    def __call__(
        self, now_s: float, events: Sequence[Event], works: Sequence[Work]
    ) -> None:
        self._turns_left -= 1
        _expect(
            self._turns_left > 0, "expected the run to end: no request makes progress"
        )
        for instance in self._instances:
            if instance.step is None:
                why = _work_of(instance)
                _expect(
                    not why,
                    f"{instance}: expected a step or a pull at {now_s} s: {why}",
                )


def _work_of(instance: InstanceState) -> str:
    """Say what an instance without a step could do, whatever its policy; '' if nothing.

    With KV of others in its memory, a prompt or a pull may have to wait.
    """
    if instance.running or instance.partial:
        return f"{len(instance.running) + len(instance.partial)} requests have begun"
    empty = instance.blocks.free == instance.memory.num_blocks
    if empty and instance.waiting:
        return f"{len(instance.waiting)} requests wait, and all memory is free"
    if empty and instance.pull_queue:
        return f"KV of {len(instance.pull_queue)} waits, and all memory is free"
    return ""


def _check_end(timeline: Timeline) -> None:
    request, tokens = timeline.request, len(timeline.token_s)
    if timeline.status is Status.REFUSED:
        return
    finished = timeline.status is Status.FINISHED and tokens == request.max_tokens
    expected = f"request {request.id}: expected {request.max_tokens} tokens"
    _expect(finished, f"{expected}, got {tokens}; {timeline.status}")


def _expect(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)
