"""Decode as written for one device: a plain cache, no blocks, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from disagg_jax.engine import Engine, sampling
from experiments.benchmarks.timing import timed_s
from models import transformer
from models.config import ModelConfig
from models.layers import einsum

DenseCache: TypeAlias = list[tuple[Array, Array]]  # k, v [B, K, S, H] of each layer


def dense_step(
    config: ModelConfig,
    params: transformer.Params,
    cache: DenseCache,
    token_B: Array,
    position_B: Array,
) -> tuple[DenseCache, Array]:
    """Return the likeliest next token of each row; its context is all S positions."""
    rows = jnp.arange(token_B.shape[0])
    seen_BS = jnp.arange(cache[0][0].shape[2])[None, :] <= position_B[:, None]

    def attend(
        layer: int, q_BNH: Array, k_BKH: Array, v_BKH: Array, cache: DenseCache
    ) -> tuple[Array, DenseCache]:
        k_BKSH, v_BKSH = (
            part.at[rows, :, position_B].set(new, mode="promise_in_bounds")
            for part, new in zip(cache[layer], (k_BKH, v_BKH), strict=True)
        )
        B, N, H = q_BNH.shape
        q_BKGH = q_BNH.reshape(B, k_BKSH.shape[1], -1, H)
        scores = einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, jnp.float32) * H**-0.5
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(seen_BS[:, None, None], scores, lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
        out = einsum("BKGS,BKSH->BKGH", weights, v_BKSH).reshape(B, N, H)
        return out, [*cache[:layer], (k_BKSH, v_BKSH), *cache[layer + 1 :]]

    x = transformer.embed(params, token_B, position_B)
    x, cache = transformer.run_layers(
        config, params["layers"], x, position_B, attend, cache
    )
    logits = transformer.unembed(config, params, x)
    return cache, sampling.greedy(logits)


def dense_step_s(
    engine: Engine, batch: int, context: int, steps: int
) -> Callable[[], float]:
    """Compile `dense_step`; return a timer of its mean seconds in a tight loop.

    The cache is donated.

    Args:
      engine: its only instance, on one device, has the weights.
    """
    config = engine.config
    (params,) = engine.instances[0].model.params
    shape = (batch, config.kv_heads, context, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    cache = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))] * config.layers
    cache = jax.tree.map(jnp.copy, cache)  # to be donated: each an array of its own
    inputs = jnp.zeros(batch, jnp.int32), jnp.full(batch, context - 1, jnp.int32)
    program: Any = jax.jit(dense_step, static_argnums=0, donate_argnums=2)

    def loop() -> None:
        nonlocal cache
        for _ in range(steps):
            cache, tokens = program(config, params, cache, *inputs)
            jax.block_until_ready((cache, tokens))

    return lambda: timed_s(loop) / steps
