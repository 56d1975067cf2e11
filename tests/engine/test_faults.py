"""Faults found by running a peer: the serving loop of jax-llm-examples at 8b4b246.

Each is a test here that the engine does not have it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disagg_jax.engine import layer_group
from disagg_jax.engine.executor import as_measured
from disagg_jax.engine.wall_clock import WallBackend
from disagg_jax.programs import StepShape
from disagg_jax.request import Status
from disagg_jax.work import Step, Transfer
from tests.engine.harness import (
    BUCKETS,
    MODELS,
    POOL,
    assert_reference,
    drive,
    make_request,
    one_second,
    serve_virtual,
    with_middle_token,
)

CONFIG = MODELS["divided"]
DEPLOYMENTS = ["colocated:tp1", "prefill:tp1,decode:tp1"]


def served(world, clock, deployment, requests):
    engine = world.engine(deployment)
    if clock == "wall":
        return drive(engine, WallBackend(engine), requests)
    return serve_virtual(engine, requests)


def with_eos(world, id: int, prompt: int, out: int):
    request = make_request(id, prompt, out)
    return dataclasses.replace(
        request, eos_token=with_middle_token(world, CONFIG, request)
    )


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_eos_of_one_request_does_not_end_the_next_in_its_place(
    world, deployment, clock
):
    """40 requests through 4 places; half of them end by an EOS of their own."""
    requests = [
        with_eos(world, i, 9, 12) if i % 2 else make_request(i, 3 + i % 5, 8)
        for i in range(40)
    ]
    timelines = served(world, clock, deployment, requests)
    assert_reference(world, CONFIG, timelines)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_no_token_follows_eos_or_the_limit(world, deployment):
    requests = [with_eos(world, 0, 9, 20), make_request(1, 6, 16)]
    timelines = served(world, "wall", deployment, requests)
    assert timelines[0].tokens.count(requests[0].eos_token) == 1
    assert timelines[0].tokens[-1] == requests[0].eos_token
    assert len(timelines[0].tokens) < 20
    assert len(timelines[1].tokens) == len(timelines[1].token_s) == 16


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_request_id_0_is_served(world, deployment):
    timelines = served(world, "wall", deployment, [make_request(0, 5, 4)])
    assert_reference(world, CONFIG, timelines)


@pytest.mark.parametrize(
    "prompt", [(0,), (0, 0, 0, 0), (0, 7, 9), (7, 9, 0), (7, 0, 9), (7, 9)]
)
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_token_id_0_is_a_token_like_any_other(world, deployment, prompt):
    requests = [make_request(1, prompt, 8), make_request(2, 7, 8)]
    assert_reference(world, CONFIG, served(world, "virtual", deployment, requests))


def test_token_id_0_makes_a_difference(world):
    """The test above could not fail if a 0 did not matter to the reference."""
    prompts = [(7, 9), (0, 7, 9), (7, 9, 0), (7, 0, 9)]
    outputs = [world.reference(CONFIG, make_request(1, p, 8)) for p in prompts]
    assert len({tuple(output) for output in outputs}) == 4


@pytest.mark.parametrize("clock", ["virtual", "wall"])
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_prompt_longer_than_the_context_is_refused_alone(world, deployment, clock):
    requests = [
        make_request(0, 10, 6),
        make_request(1, 65, 1),
        make_request(2, 300, 5),
        make_request(3, 10, 6),
    ]
    timelines = served(world, clock, deployment, requests)
    for id in (1, 2):
        refused = timelines.pop(id)
        assert refused.status is Status.REFUSED
        assert "expected at most 64 tokens" in refused.error
        assert not refused.tokens
    assert_reference(world, CONFIG, timelines)


@pytest.mark.parametrize("prompt", [1, 33, 60, 63])
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_output_is_right_up_to_the_last_token_of_the_context(world, deployment, prompt):
    fits = make_request(0, prompt, 64 - prompt)
    beyond = make_request(1, prompt, 65 - prompt)
    timelines = served(world, "virtual", deployment, [fits, beyond])
    assert timelines.pop(1).status is Status.REFUSED
    assert_reference(world, CONFIG, timelines)
    assert len(timelines[0].tokens) == 64 - prompt


@pytest.mark.parametrize(
    "shape",
    [
        StepShape.prefill(64, 4),
        StepShape.decode(4, 16),
        StepShape.mixed(32, 8, 16, 4, 16),
    ],
    ids=str,
)
def test_float32_stays_float32(world, shape):
    """Every float of a step is 32 bits wide, and no matmul may round its inputs."""
    instance = world.engine("colocated:tp1").instances[0]
    (stage,) = instance.programs.stages
    fields = stage.kernel.fields(shape, POOL.block_tokens)
    step = functools.partial(
        layer_group._run_group,
        CONFIG,
        fields,
        shape,
        is_last=True,
        kernel=stage.kernel,
        kv_sharding=stage.kv_sharding,
    )
    packed = np.zeros(fields.size, np.int32)
    (params,), cache = instance.model.params, instance.cache
    jaxpr = jax.make_jaxpr(step)(params, cache, packed)
    floats, matmuls = set(), 0
    for equation in _equations(jaxpr.jaxpr):
        for var in [*equation.invars, *equation.outvars]:
            if jnp.issubdtype(var.aval.dtype, jnp.floating):
                floats.add(str(var.aval.dtype))
        if equation.primitive.name == "dot_general":
            matmuls += 1
            highest = jax.lax.Precision.HIGHEST
            assert equation.params["precision"] == (highest, highest)
    assert floats == {"float32"}
    assert matmuls >= 2 * 9


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(value, "eqns"):
                yield from _equations(getattr(value, "jaxpr", value))


def test_prefill_is_not_paced_by_decode(world):
    """8 prompts in 2 steps of a second: TTFT 1 s and 2 s, however slow decode is."""
    engine = world.engine("prefill:tp1,decode:tp1")
    requests = [make_request(i, 3, 5) for i in range(8)]

    def ttft_s(decode_s):
        def timing(work, parts_s):
            decodes = isinstance(work, Step) and work.instance == 1
            return as_measured(work, [decode_s if decodes else 1.0])

        timelines = serve_virtual(engine, requests, timing)
        assert_reference(world, CONFIG, timelines)
        return [timelines[i].token_s[0] for i in range(8)]

    assert ttft_s(0.001) == ttft_s(1.0) == ttft_s(1000.0) == [1.0] * 4 + [2.0] * 4


def test_a_transfer_moves_the_prompt_and_not_the_context(world):
    """Blocks of 4 tokens, k and v, 2 layers of 4 kv heads of 8 floats of 4 bytes."""
    engine = world.engine(
        "prefill:tp1,decode:tp1",
        buckets=dataclasses.replace(BUCKETS, transfer_blocks=(2, 16)),
    )
    requests = [make_request(0, 5, 3), make_request(1, 8, 3), make_request(2, 9, 3)]
    timelines = serve_virtual(engine, requests)
    block = 4 * 2 * 2 * 4 * 8 * 4
    assert [timelines[i].transfer_bytes for i in range(3)] == [
        2 * block,
        2 * block,
        16 * block,  # 3 blocks; the next size that is listed
    ]


def test_the_first_token_comes_from_prefill(world):
    """One prompt token is computed once: decode starts with the second token."""
    engine = world.engine("prefill:tp1,decode:tp1")
    works = []

    def record(work, parts_s):
        works.append(work)
        return one_second(work, parts_s)

    timelines = serve_virtual(engine, [make_request(0, 5, 3)], record)
    prefill, transfer, first, second = works
    assert isinstance(transfer, Transfer) and transfer.context == 5
    assert prefill.slices[0].tokens == timelines[0].request.prompt
    assert [step.slices[0].tokens for step in (first, second)] == [
        (token,) for token in timelines[0].tokens[:2]
    ]
    assert np.allclose(timelines[0].token_s, [1.0, 3.0, 4.0])
