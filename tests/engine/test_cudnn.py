"""cuDNN's attention without cuDNN: its mask, by the same call in plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disagg_jax.engine.attention import gathered
from disagg_jax.engine.attention.cudnn import CudnnAttention, prompt_attention
from models.config import get_config
from tests.engine.harness import (
    MODELS,
    assert_reference,
    mixed_requests,
    serve_virtual,
)
from tests.engine.test_attention import double


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cudnn", marks=pytest.mark.gpu)]
)
def test_each_token_attends_to_its_prompt_up_to_itself(implementation):
    """Of packed prompts, and padding behind them."""
    row_T = jnp.array([0] * 5 + [1] + [2] * 8 + [-1] * 2)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(len(row_T), n, 64)), "bfloat16") for n in (6, 2, 2)
    )
    got = jax.jit(prompt_attention, static_argnums=4)(q, k, v, row_T, implementation)
    assert got.dtype == q.dtype and np.isfinite(double(got)).all()
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    expected = double(gathered.prompt_attention(row_T, *exact))
    # bfloat16 rounds weights and outputs to 3 digits.
    np.testing.assert_allclose(double(got)[:-2], expected[:-2], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "platform, changes, message",
    [
        ("gpu", {}, ""),
        ("cpu", {}, "expected a GPU"),
        ("gpu", {"dtype": "float32"}, "expected bfloat16"),
        ("gpu", {"head_dim": 256}, "up to 128, got 256"),
    ],
)
def test_says_what_it_is_not_for(platform, changes, message):
    config = dataclasses.replace(get_config("llama-3-8b"), dtype="bfloat16")
    problem = CudnnAttention(platform).problem(
        dataclasses.replace(config, **changes), block_tokens=64
    )
    assert message in problem and bool(message) == bool(problem)


class OnCpu(CudnnAttention):
    """The same call in plain XLA."""

    name = "cudnn_on_cpu"

    def problem(self, config, block_tokens):
        return ""

    def prompts(self, *args):
        return prompt_attention(*args, "xla")


@pytest.mark.parametrize(
    "model, deployment",
    [
        ("divided", "prefill:tp2,decode:tp1"),
        pytest.param("padded", "prefill:tp4,decode:tp2", marks=pytest.mark.slow),
        pytest.param("repeated", "colocated:tp4", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_reference(world, model, deployment):
    config = MODELS[model]
    engine = world.engine(deployment, config, attention=f"{__name__}:OnCpu")
    timelines = serve_virtual(engine, mixed_requests(world, config))
    assert_reference(world, config, timelines)
