"""Every colocated system in the engine: the reference's tokens, whatever the step size.

The pool holds one request of the longest context and nothing beside it, so that systems
which preempt do, and those which reserve serve one at a time.
"""

import json

import pytest

from disagg_jax.control.loop import serve
from disagg_jax.control.virtual_clock import VirtualBackend
from disagg_jax.deployment import Role
from disagg_jax.engine.executor import EngineExecutor
from disagg_jax.runlog.event_log import EventLog, replay
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from tests.engine.harness import (
    MIXED,
    MODELS,
    POOL,
    assert_reference,
    make_controller,
    make_request,
    mixed_requests,
    one_second,
    serve_virtual,
)

CONFIG = MODELS["divided"]
SEQS = 4


def policies(policy):
    return {Role.COLOCATED: policy}


def chunked(size: int):
    return [
        Sarathi(chunk_tokens=size, max_seqs=SEQS),
        SarathiServe(token_budget=size, max_seqs=SEQS),
        SplitFuse(token_budget=size, max_seqs=SEQS),
        RunningFirst(max_batched_tokens=size, max_seqs=SEQS),
    ]


def name(policy) -> str:
    size = policy.limits.prefill_tokens
    return f"{type(policy).__name__}-{size}"


# Chunks of a block, of no multiple of one, and as long as any prompt.
ALL = [Orca(max_seqs=SEQS, max_batched_tokens=64)]
ALL += [policy for size in (4, 7, 16, 64) for policy in chunked(size)]


@pytest.mark.parametrize("policy", ALL, ids=name)
def test_tokens_are_the_references(world, policy):
    engine = world.engine("colocated:tp1", CONFIG, MIXED)
    requests = mixed_requests(world, CONFIG)
    timelines = serve_virtual(engine, requests, policies=policies(policy))
    assert_reference(world, CONFIG, timelines)
    preempts = isinstance(policy, SarathiServe | SplitFuse | RunningFirst)
    assert (sum(t.preemptions for t in timelines.values()) > 0) == preempts
    assert engine.totals["mixed"].tokens > sum(r.prompt_tokens for r in requests) / 2


@pytest.mark.parametrize("policy", [ALL[0], *chunked(7)], ids=name)
@pytest.mark.parametrize(
    ("model", "devices"),
    [
        pytest.param("divided", "tp2", marks=pytest.mark.slow),
        pytest.param("repeated", "tp4", marks=pytest.mark.slow),
        ("padded", "tp2"),
        ("divided", "tp1pp2"),
    ],
)
def test_tokens_on_several_devices(world, model, devices, policy):
    config = MODELS[model]
    engine = world.engine(f"colocated:{devices}", config, MIXED)
    timelines = serve_virtual(
        engine, mixed_requests(world, config), policies=policies(policy)
    )
    assert_reference(world, config, timelines)


@pytest.mark.parametrize("policy", [ALL[0], *chunked(4)], ids=name)
def test_requests_that_each_fill_the_pool_take_turns(world, policy):
    requests = [make_request(i, 5, 59) for i in range(3)]
    engine = world.engine("colocated:tp1", CONFIG, MIXED)
    timelines = serve_virtual(engine, requests, policies=policies(policy))
    assert_reference(world, CONFIG, timelines)


@pytest.mark.parametrize("policy", [ALL[0], *chunked(7)], ids=name)
def test_a_log_replays_to_the_same_decisions(world, policy):
    engine = world.engine("colocated:tp1", CONFIG, MIXED)
    log, requests = EventLog(), mixed_requests(world, CONFIG)
    with engine.serving():
        backend = VirtualBackend(EngineExecutor(engine, one_second))
        controller = make_controller(engine, policies(policy))
        serve(controller, backend, requests, observer=log)
    assert len(log.lines) > 30
    fresh = make_controller(engine, policies(policy))
    assert list(replay(log.lines, fresh)) == []
    turn = json.loads(log.lines[1])
    turn["works"][0][3][0][2] += 1  # tokens of the first slice
    other = make_controller(engine, policies(policy))
    assert list(replay([log.lines[0], json.dumps(turn)], other)) == [0]


def test_the_pool_is_what_the_tests_say():
    assert POOL.num_blocks * POOL.block_tokens == POOL.max_context
