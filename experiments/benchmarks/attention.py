"""Decode attention of one layer, beside one read of the KV that it attends to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kernel import AttentionKernel
from experiments.benchmarks.timing import Figure, interleaved, timed_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Rows of equal context in float32, their blocks anywhere in the pool."""

    rows: int = 256
    tokens: Sequence[int] = (16_384, 49_152)  # that all rows attend to together
    block_tokens: int = 64
    # Those of Llama-3-8B.
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


def attention_figure(
    shape: AttentionShape, kernel: AttentionKernel, tokens: int, repeats: int
) -> Figure:
    """Measure attention to `tokens` tokens of KV, and a sum over that KV."""
    rng = np.random.default_rng(0)
    each = -(-tokens // shape.rows // shape.block_tokens)
    blocks = shape.rows * each
    block_shape = (shape.kv_heads, shape.block_tokens, shape.head_dim)
    pool = rng.standard_normal((blocks, *block_shape), np.float32)
    layer = jnp.array(pool), jnp.array(pool)
    heads = (shape.rows, shape.q_heads, shape.head_dim)
    q_BNH = jnp.array(rng.standard_normal(heads, np.float32))
    entries = Entries(
        jnp.array(rng.permutation(blocks)),
        jnp.array(np.repeat(np.arange(shape.rows), each)),
        jnp.array(np.tile(np.arange(each) * shape.block_tokens, shape.rows)),
    )
    position_B = jnp.full(shape.rows, tokens // shape.rows - 1)

    @jax.jit
    def attend(entries: Entries, q_BNH: Array, layer: tuple[Array, Array]) -> Array:
        return kernel.decodes(q_BNH, layer, position_B, entries)

    @jax.jit
    def read(layer: tuple[Array, Array]) -> Array:
        return sum(map(jnp.sum, layer), start=jnp.zeros(()))

    runs: dict[str, Callable[[], Array]] = {
        "attend": lambda: attend(entries, q_BNH, layer),
        "read": lambda: read(layer),
    }
    found_s = interleaved(
        repeats,
        {
            name: lambda run=run: timed_s(lambda: run().block_until_ready())
            for name, run in runs.items()
        },
    )
    return Figure(
        part="attention",
        name=f"B{shape.rows} over {tokens} tokens",
        measured=found_s["attend"] * 1e3,
        bound=found_s["read"] * 1e3,
        unit="ms",
        bound_name="its KV read once",
        better="less",
        aim=5.0,
    )
