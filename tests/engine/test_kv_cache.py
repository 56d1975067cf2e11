"""Decode attention in pool order against plain attention, one row at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from disagg_jax.engine import kv_cache
from models.layers import attention

# Rows 0 and 1 own blocks in any order, row 2 is padding, blocks 1 and 4 are free.
BLOCK, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 3, 8
OWNER = [1, -1, 0, 0, -1]
START = [0, 0, 4, 0, 0]
POSITION = [6, 2, 0]
SLOT = [2 * BLOCK + 2, 2, 5 * BLOCK]  # block 5 is scratch


def random(rng, *shape, dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("free", [1.0, np.inf, np.nan])
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_decode_attends_to_its_own_context_only(dtype, error, free):
    """Whatever free blocks hold; bfloat16 rounds weights and values to 3 digits."""
    rng = np.random.default_rng(0)
    pool = (6, KV_HEADS, BLOCK, HEAD_DIM)
    k, v = (random(rng, *pool, dtype=dtype).at[1].set(free) for _ in "kv")
    k, v = (part.at[4].set(free) for part in (k, v))
    q_BNH = random(rng, 3, HEADS, HEAD_DIM, dtype=dtype)
    new_k, new_v = (random(rng, 3, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in "kv")
    position, slot, owner, start = map(jnp.array, (POSITION, SLOT, OWNER, START))
    attend = kv_cache.decode_attend(position, slot, owner, start, BLOCK)
    got, [(k, v)] = attend(0, q_BNH, new_k, new_v, [(k, v)])
    for row, blocks in enumerate(([3, 2], [0])):
        context = POSITION[row] + 1
        keys, values = (
            part[jnp.array(blocks)].swapaxes(1, 2).reshape(-1, KV_HEADS, HEAD_DIM)
            for part in (k, v)
        )
        np.testing.assert_array_equal(keys[context - 1], new_k[row])
        mask = jnp.ones((1, context), bool)
        want = attention(q_BNH[row, None], keys[:context], values[:context], mask)[0]
        np.testing.assert_allclose(got[row], want, atol=error, rtol=error)
    np.testing.assert_array_equal(got[2], 0)
