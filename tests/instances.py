"""Instances in given states, and tables of what policies plan for them."""

import pytest

from disagg_jax.control.instance_state import InstanceState
from disagg_jax.control.request_state import RequestState
from disagg_jax.deployment import InstanceSpec, KVMemory, Role
from disagg_jax.request import Timeline
from tests.serving import make_request

BLOCK = 4  # tokens
ROWS = ("places", "limits", "expected", "preempt")


def state(id: int, known: int, out: int = 1) -> RequestState:
    request = make_request(id, prompt=known, out=out)
    return RequestState(request, id, Timeline(request=request))


def make_instance(
    *, id=0, waiting=None, partial=None, running=None, arriving=None, free=100, out=1
):
    """An instance with {id: known tokens} in its places; a smaller id arrived earlier.

    All tokens but the newest of a running or arriving request have their KV in blocks;
    of a partial one, {id: (known, cached)}, as many as said. `free` blocks are left.
    Each may generate `out` more tokens.
    """
    waiting, running, arriving = waiting or {}, running or {}, arriving or {}
    cached = {owner: known - 1 for owner, known in {**running, **arriving}.items()}
    cached |= {owner: context for owner, (_, context) in (partial or {}).items()}
    held = sum(-(-tokens // BLOCK) for tokens in cached.values())
    memory = KVMemory(num_blocks=held + free, block_tokens=BLOCK, max_context=1000)
    instance = InstanceState(id, InstanceSpec(role=Role.COLOCATED), memory)
    instance.waiting.extend(state(*item, out) for item in waiting.items())
    instance.arriving = {id: state(id, n, out) for id, n in arriving.items()}
    parts = {id: state(id, known, out) for id, (known, _) in (partial or {}).items()}
    instance.partly = parts
    ready = [state(*item, out) for item in running.items()]
    for request in [*ready, *instance.arriving.values(), *parts.values()]:
        request.set_tokens(request.num_tokens, cached[request.id])
        instance.blocks.extend(request.id, request.cached_tokens)
    for request in ready:
        instance.ready.join(request)
    assert instance.blocks.free == free
    return instance


def planned(policy, instance):
    plan = policy.plan(instance)
    slices = {chunk.request.id: chunk.tokens for chunk in plan.chunks}
    slices |= {request.id: 1 for request in plan.decodes}
    assert len(slices) == len(plan.chunks) + len(plan.decodes)
    return slices, [request.id for request in plan.preempt]


def case(name, expected, preempt=(), *, limits=None, **places):
    return pytest.param(places, limits or {}, expected, list(preempt), id=name)
