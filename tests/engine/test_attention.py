"""Attention over the pool against plain attention, one request at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention import gathered
from disagg_jax.engine.attention.packing import fields_of, pack
from disagg_jax.engine.attention.pool_order import step_attend
from disagg_jax.programs import StepShape
from disagg_jax.programs.shapes import split_decodes
from disagg_jax.work import Slice
from tests.engine.harness import make_request

# Rows 0 and 1 own blocks in any order, row 2 is padding, blocks 1 and 4 are free.
BLOCK, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 3, 8
OWNER = [1, -1, 0, 0, -1]
START = [0, 0, 4, 0, 0]
POSITION = [6, 2, 0]
SLOT = [2 * BLOCK + 2, 2, 5 * BLOCK]  # block 5 is scratch


def random(rng, *shape, dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)


def double(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def in_order(part, blocks: list[int], context: int) -> np.ndarray:
    """k or v of a request's first tokens, `[context, KV_HEADS, HEAD_DIM]`."""
    tokens = double(part)[blocks].swapaxes(1, 2)
    return tokens.reshape(-1, KV_HEADS, HEAD_DIM)[:context]


def plain_attention(q_NH, k_SKH, v_SKH) -> np.ndarray:
    """One query that sees all keys, in numpy."""
    k_SNH, v_SNH = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k_SKH, v_SKH))
    weights = np.exp(np.einsum("nh,snh->ns", q_NH, k_SNH) * HEAD_DIM**-0.5)
    return np.einsum("ns,snh->nh", weights / weights.sum(1, keepdims=True), v_SNH)


def attention_of(shape: StepShape, inputs, pool_blocks: int):
    inputs = {name: jnp.array(values) for name, values in inputs.items()}
    return step_attend(shape, inputs, pool_blocks, BLOCK)


@pytest.mark.parametrize("free", [1.0, np.nan])
def test_a_row_alone_attends_to_its_own_context_only(free):
    """A step of one row has a way of its own through attention."""
    rng = np.random.default_rng(0)
    pool = (6, KV_HEADS, BLOCK, HEAD_DIM)
    k, v = (random(rng, *pool, dtype="float32") for _ in "kv")
    k, v = (part.at[jnp.array([0, 1, 4])].set(free) for part in (k, v))
    q = random(rng, 1, HEADS, HEAD_DIM, dtype="float32")
    new_k, new_v = (random(rng, 1, KV_HEADS, HEAD_DIM, dtype="float32") for _ in "kv")
    owner = [0 if row == 0 else -1 for row in OWNER]
    inputs = {
        "position": POSITION[:1],
        "slot": SLOT[:1],
        "owner": owner,
        "start": START,
    }
    attend = attention_of(StepShape.decode(1, 5), inputs, pool_blocks=9)
    got, [(k, v)] = jax.jit(attend, static_argnums=0)(0, q, new_k, new_v, [(k, v)])
    keys, values = (in_order(part, [3, 2], POSITION[0] + 1) for part in (k, v))
    want = plain_attention(double(q[0]), keys, values)
    assert got.shape == (1, HEADS, HEAD_DIM)
    np.testing.assert_allclose(double(got[0]), want, atol=1e-5, rtol=1e-5)


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
    inputs = {"position": POSITION, "slot": SLOT, "owner": OWNER, "start": START}
    attend = attention_of(StepShape.decode(3, 5), inputs, pool_blocks=9)
    attend = jax.jit(attend, static_argnums=0)
    got, [(k, v)] = attend(0, q_BNH, new_k, new_v, [(k, v)])
    for row, blocks in enumerate(([3, 2], [0])):
        context = POSITION[row] + 1
        keys, values = (in_order(part, blocks, context) for part in (k, v))
        np.testing.assert_array_equal(keys[-1], double(new_k[row]))
        want = plain_attention(double(q_BNH[row]), keys, values)
        np.testing.assert_allclose(double(got[row]), want, atol=error, rtol=error)
    np.testing.assert_array_equal(got[2], 0)


# A mixed step: a decode, two chunks that share no block with it, and padding. Blocks 1
# and 6 are free, 8 is scratch.
MIXED_ROW = [-1, 0, 0, 0, 1, 1, -1, -1]
MIXED_POSITION = [6, 3, 4, 5, 0, 1, 0, 0]
MIXED_BLOCKS = {"decode": [2, 3], "chunk": [5, 0], "fresh": [4]}
MIXED_TOKENS = {"decode": [0], "chunk": [1, 2, 3], "fresh": [4, 5]}


@pytest.mark.parametrize("queries", [512, 3])
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_mixed_attends_to_its_own_context_only(monkeypatch, dtype, error, queries):
    """With all queries at a time, and 3; although free blocks hold NaN."""
    monkeypatch.setattr(gathered, "_QUERY_CHUNK", queries)
    rng = np.random.default_rng(0)
    k, v = (random(rng, 9, KV_HEADS, BLOCK, HEAD_DIM, dtype=dtype) for _ in "kv")
    k, v = (part.at[jnp.array([1, 6])].set(np.nan) for part in (k, v))
    # What is beyond the end of a chunk in its last block.
    k, v = (part.at[0, :, 2:].set(np.nan).at[4, :, 2:].set(np.nan) for part in (k, v))
    q = random(rng, 8, HEADS, HEAD_DIM, dtype=dtype)
    new_k, new_v = (random(rng, 8, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in "kv")
    inputs = {
        "position": MIXED_POSITION,
        "slot": [3 * BLOCK + 2, 8 * BLOCK],  # of the decode, and of a chunk's token
        "write_block": [5, 0, 4, 8],
        "write_token": [-1, -1, -1, 1, 2, 3, -1, -1, 4, 5, *[-1] * 6],
        "row": MIXED_ROW,
        "chunk_block": [5, 0, 4, 8],
        "chunk_owner": [0, 0, 1, -1],
        "chunk_start": [0, BLOCK, 0, 0],
        "owner": [-1, -1, 0, 0],
        "start": [0, 0, 0, BLOCK],
    }
    shape = StepShape.mixed(tokens=8, rows=3, context=4, decodes=2, blocks=4)
    attend = attention_of(shape, inputs, pool_blocks=9)
    attend = jax.jit(attend, static_argnums=0)
    got, [(k, v)] = attend(0, q, new_k, new_v, [(k, v)])
    assert got.dtype == dtype and np.isfinite(double(got)).all()
    for name, tokens in MIXED_TOKENS.items():
        for token in tokens:
            context = MIXED_POSITION[token] + 1
            keys, values = (
                in_order(part, MIXED_BLOCKS[name], context) for part in (k, v)
            )
            np.testing.assert_array_equal(keys[-1], double(new_k[token]))
            want = plain_attention(double(q[token]), keys, values)
            np.testing.assert_allclose(double(got[token]), want, atol=error, rtol=error)


# -- what a step writes ----------------------------------------------------------------

LONGEST = 65  # of a slice


def pool_of(block: int) -> KVMemory:
    """A pool for six slices of `parts`."""
    longest = 2 * block + 2 + LONGEST
    memory = KVMemory(num_blocks=1, block_tokens=block, max_context=longest)
    return dataclasses.replace(memory, num_blocks=6 * memory.blocks_for(longest))


def shape_of(kind: str, pool: int) -> StepShape:
    """A shape for any of `parts`, over a pool of so many blocks."""
    match kind:
        case "prefill":
            return StepShape.prefill(tokens=4 * LONGEST + 1, rows=4)
        case "decode":
            return StepShape.decode(rows=6, blocks=pool)
        case _:
            return StepShape.mixed(3 * LONGEST + 4, 6, pool // 2, 3, pool)


@functools.cache
def writer(shape: StepShape, memory: KVMemory):
    """A compiled step of one layer that returns the cache."""
    block = memory.block_tokens

    @jax.jit
    def step(packed, q, k, v, cache):
        inputs = fields_of(shape, block).split(packed)
        attend = step_attend(shape, inputs, memory.num_blocks + 1, block)
        return attend(0, q, k, v, cache)

    return step


@st.composite
def parts(draw, kind: str, block: int):
    """(start, count) of a step's slices: lengths and starts around block edges."""
    edges = [n * block + i for n in range(3) for i in (-1, 0, 1)]
    lengths = st.sampled_from([n for n in edges if 1 <= n <= LONGEST] + [2, LONGEST])
    starts = st.sampled_from([n for n in edges if n >= 0] + [2])
    chunk_starts = st.just(0) if kind == "prefill" else starts
    most = 4 if kind == "prefill" else 3
    chunks = st.lists(st.tuples(chunk_starts, lengths), min_size=1, max_size=most)
    decodes = st.lists(st.tuples(starts.map(lambda n: n + 1), st.just(1)), max_size=3)
    return [
        *(draw(chunks) if kind != "decode" else [(1, 1)]),
        *(draw(decodes) if kind != "prefill" else []),
    ]


@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", ["prefill", "decode", "mixed"])
@given(data=st.data())
def test_a_step_writes_its_tokens_and_nothing_else(kind, block, data):
    """Tokens cached before stay bit for bit, and so do the other requests' blocks.

    What is beyond the end of a whole prompt, in its last block, is nobody's: 0.
    """
    memory = pool_of(block)
    shape = shape_of(kind, memory.num_blocks)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    free, slices = rng.permutation(memory.num_blocks).tolist(), []
    for id, (start, count) in enumerate(data.draw(parts(kind, block))):
        n = memory.blocks_for(start + count)
        blocks, free = tuple(free[:n]), free[n:]
        request = make_request(id, 1, 1)
        slices.append(Slice(request, start, count, True, blocks, (0,) * count))
    T, pool = shape.tokens, (memory.num_blocks + 1, KV_HEADS, block, HEAD_DIM)
    x, before = (
        rng.normal(size=(2, *size)).astype("f4")
        for size in ((T, KV_HEADS, HEAD_DIM), pool)
    )
    q, packed = np.ones((T, HEADS, HEAD_DIM), "f4"), pack(shape, slices, memory)
    out, [cache] = writer(shape, memory)(packed, q, *x, [tuple(before)])
    want = before.copy()
    chunks, decodes = split_decodes(slices, shape.decodes)
    token = 0
    for part in [*decodes, *chunks]:
        if kind == "prefill":
            want[:, part.blocks[-1]] = 0
        for position in range(part.start, part.start + part.count):
            id, offset = divmod(position, block)
            want[:, part.blocks[id], :, offset] = x[:, token]
            token += 1
    assert np.isfinite(double(out)[:token]).all()
    for got, expected in zip(cache, want, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[:-1], expected[:-1])
