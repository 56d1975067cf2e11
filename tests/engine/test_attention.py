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
from disagg_jax.engine.attention import gathered, kv_cache
from disagg_jax.engine.attention.entries import UNSEEN, Entries
from disagg_jax.engine.attention.packing import fields_of, pack
from disagg_jax.engine.attention.paged import chunk_entries, paged_attention
from disagg_jax.engine.attention.pallas_tpu import PallasTpuAttention
from disagg_jax.engine.attention.step import step_attend
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.programs import StepShape
from disagg_jax.programs.shapes import split_decodes
from disagg_jax.work import Slice
from sharding import RULES, make_mesh, named_sharding
from tests.engine.harness import make_request

# bfloat16 rounds weights, values and outputs to 3 digits.
ERROR = {"float32": 1e-5, "bfloat16": 2e-2}
DTYPES = sorted(ERROR)
ONE_DEVICE = named_sharding(
    make_mesh(jax.devices()[:1]), kv_cache.AXES, RULES["colocated"]
)


def double(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def plain_attention(q_NH, k_SKH, v_SKH) -> np.ndarray:
    """One query that sees all keys, in numpy."""
    group = q_NH.shape[0] // k_SKH.shape[1]
    k_SNH, v_SNH = (np.repeat(x, group, axis=1) for x in (k_SKH, v_SKH))
    scores_NS = np.einsum("nh,snh->ns", q_NH, k_SNH) * q_NH.shape[-1] ** -0.5
    weights = np.exp(scores_NS - scores_NS.max(1, keepdims=True))
    return np.einsum("ns,snh->nh", weights / weights.sum(1, keepdims=True), v_SNH)


def in_order(part, blocks: list[int], context: int) -> np.ndarray:
    """k or v of a request's first tokens, `[context, K, H]`."""
    _, K, _, H = part.shape
    return double(part)[blocks].swapaxes(1, 2).reshape(-1, K, H)[:context]


def want(q_NH, layer, blocks: list[int], position: int) -> np.ndarray:
    """What a query at `position` gets."""
    keys, values = (in_order(part, blocks, position + 1) for part in layer)
    return plain_attention(double(q_NH), keys, values)


# -- decodes alone -------------------------------------------------------------------


class Decodes:
    """Random rows over a random pool, whose unseen places hold `unseen`.

    Args:
      contexts: tokens that each row attends to.
      padding: rows, and entries, beyond those.
    """

    def __init__(
        self,
        contexts,
        *,
        block_tokens=4,
        kv_heads=2,
        group=2,
        head_dim=16,
        dtype="float32",
        padding=(0, 0),
        shared=False,
        unseen=np.nan,
        pool=0,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        counts = [-(-context // block_tokens) for context in contexts]
        pool = pool or sum(counts) + 3  # free blocks, and the last one for scratch
        ids = rng.permutation(pool - 1).tolist()
        self.tables = [[ids.pop() for _ in range(count)] for count in counts]
        if shared:  # all rows begin with the same block
            self.tables = [[self.tables[0][0], *table[1:]] for table in self.tables]
        self.positions = [context - 1 for context in contexts]
        shape = pool, kv_heads, block_tokens, head_dim
        k, v = (rng.normal(size=shape) for _ in "kv")
        seen = np.zeros((pool, block_tokens), bool)
        for table, context in zip(self.tables, contexts, strict=True):
            for i, block in enumerate(table):
                seen[block, : context - i * block_tokens] = True
        for part in (k, v):
            part[np.broadcast_to(~seen[:, None, :, None], shape)] = unseen
        self.layer = tuple(jnp.asarray(part, dtype) for part in (k, v))
        rows, more = padding
        heads = kv_heads * group
        q = rng.normal(size=(len(contexts) + rows, heads, head_dim))
        self.q_BNH = jnp.asarray(q, dtype)
        self.position_B = jnp.array([*self.positions, *[0] * rows])
        start = [i * block_tokens for n in counts for i in range(n)]
        owner = np.repeat(np.arange(len(contexts)), counts).tolist()
        self.entries = Entries(
            jnp.array([*sum(self.tables, []), *[pool - 1] * more], jnp.int32),
            jnp.array([*owner, *[max(owner, default=0)] * more], jnp.int32),
            jnp.array([*start, *[UNSEEN] * more], jnp.int32),
        )

    def attend(self, chunk: int | None, layer=None) -> np.ndarray:
        attend = jax.jit(paged_attention, static_argnums=4)
        layer = layer or self.layer
        got = attend(self.q_BNH, layer, self.position_B, self.entries, chunk)
        assert got.dtype == self.q_BNH.dtype and got.shape == self.q_BNH.shape
        return double(got)

    def check(self, chunk: int | None) -> None:
        got, error = self.attend(chunk), ERROR[self.q_BNH.dtype.name]
        rows = zip(self.tables, self.positions, strict=True)
        for row, (table, position) in enumerate(rows):
            expected = want(self.q_BNH[row], self.layer, table, position)
            np.testing.assert_allclose(got[row], expected, atol=error, rtol=error)
        np.testing.assert_array_equal(got[len(self.tables) :], 0)


CHUNKS = [1, 3, 64, None]
ROWS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@given(ROWS, st.sampled_from([1, 2, 3, 5, 64, None]), st.booleans())
def test_each_row_attends_to_its_own_context(contexts, chunk, shared):
    """For any rows, padding and chunks, although NaN is wherever no row looks."""
    # One shape, so that a chunk is one program.
    entries = sum(-(-context // 4) for context in contexts)
    padding = 7 - len(contexts), 31 - entries
    Decodes(contexts, padding=padding, shared=shared, pool=36).check(chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("block_tokens", [1, 4, 16, 64])
def test_blocks_of_any_size(block_tokens, chunk):
    """A token alone, one short of a block, a full one, one more, and many."""
    n = block_tokens
    contexts = [1, max(1, n - 1), n, n + 1, 5 * n - 1]
    Decodes(contexts, block_tokens=n, padding=(2, 3)).check(chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group, head_dim", [(1, 128), (3, 64), (8, 16)])
def test_heads(group, head_dim, dtype, chunk):
    Decodes([9, 1, 6], group=group, head_dim=head_dim, dtype=dtype).check(chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("context", [1, 4, 17])
def test_one_row(context, chunk):
    Decodes([context]).check(chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_decodes(chunk):
    """A mixed step may have chunks only."""
    Decodes([], padding=(4, 5)).check(chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_row_with_nan_does_not_harm_the_others(part, chunk):
    """Of keys or values that the row sees; it shows the NaN itself."""
    decodes = Decodes([9, 7, 5, 3])
    layer = list(decodes.layer)
    layer[part] = layer[part].at[decodes.tables[1][0]].set(np.nan)
    got, expected = decodes.attend(chunk, tuple(layer)), decodes.attend(chunk)
    assert np.isnan(got[1]).all()
    for row in (0, 2, 3):
        np.testing.assert_array_equal(got[row], expected[row])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_large_scores_do_not_overflow(chunk):
    decodes = Decodes([9, 30])
    decodes.q_BNH *= 1000
    decodes.check(chunk)


def test_a_chunk_is_bound_by_its_bytes():
    """A GPU has none."""
    assert chunk_entries("cpu", 2**18) == 8
    assert chunk_entries("cpu", 2**30) == 1
    assert chunk_entries("tpu", 2**18) > 4
    assert chunk_entries("gpu", 2**18) is None


# -- in a step -----------------------------------------------------------------------

BLOCK, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 3, 8


def random(rng, *shape, dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)


@dataclasses.dataclass(frozen=True)
class Chunked(XlaAttention):
    """Plain XLA, with so many entries at a time."""

    chunk: int | None = None

    def decodes(self, *args):
        return paged_attention(*args, self.chunk)


KERNELS = [
    *(Chunked("cpu", chunk=chunk) for chunk in CHUNKS),
    PallasTpuAttention("cpu"),
]


def attention_of(shape: StepShape, inputs, kernel):
    inputs = {name: jnp.array(values) for name, values in inputs.items()}
    attend = step_attend(shape, inputs, kernel, ONE_DEVICE)
    return jax.jit(functools.partial(attend, 0))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_decode_attends_to_its_own_token_too(rows, kernel):
    """Rows 0 and 1 have blocks in any order, row 2 is padding; block 5 is scratch."""
    rng = np.random.default_rng(0)
    cache = tuple(random(rng, 6, KV_HEADS, BLOCK, HEAD_DIM, dtype="f4") for _ in "kv")
    q = random(rng, rows, HEADS, HEAD_DIM, dtype="f4")
    new = [random(rng, rows, KV_HEADS, HEAD_DIM, dtype="f4") for _ in "kv"]
    position, tables = [6, 2, 0][:rows], [[3, 2], [0]][:rows]
    inputs = {
        "position": position,
        "slot": [2 * BLOCK + 2, 2, 5 * BLOCK][:rows],
        "block": [3, 2, 0, 5, 5] if rows > 1 else [3, 2, 5, 5, 5],
        "owner": [0, 0, 1, 1, 1] if rows > 1 else [0] * 5,
        "start": [0, BLOCK, *([0] if rows > 1 else [UNSEEN]), UNSEEN, UNSEEN],
    }
    attend = attention_of(StepShape.decode(rows, 5), inputs, kernel)
    got, [layer] = attend(q, *new, [cache])
    for row, table in enumerate(tables):
        for part, token in zip(layer, new, strict=True):
            last = in_order(part, table, position[row] + 1)[-1]
            np.testing.assert_array_equal(last, double(token[row]))
        expected = want(q[row], layer, table, position[row])
        np.testing.assert_allclose(double(got[row]), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(got[len(tables) :], 0)


# A mixed step: a decode, two chunks that share no block with it, and padding. Blocks 1
# and 6 are free, 8 is scratch.
MIXED_ROW = [-1, 0, 0, 0, 1, 1, -1, -1]
MIXED_POSITION = [6, 3, 4, 5, 0, 1, 0, 0]
MIXED_BLOCKS = {"decode": [2, 3], "chunk": [5, 0], "fresh": [4]}
MIXED_TOKENS = {"decode": [0], "chunk": [1, 2, 3], "fresh": [4, 5]}


@pytest.mark.parametrize(
    "queries, kernel",
    [(512, KERNELS[0]), (3, KERNELS[-2]), (512, KERNELS[-1])],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_attends_to_its_own_context_only(monkeypatch, dtype, queries, kernel):
    """With all queries at a time, and 3; although free blocks hold NaN."""
    monkeypatch.setattr(gathered, "_QUERY_CHUNK", queries)
    rng = np.random.default_rng(0)
    k, v = (random(rng, 9, KV_HEADS, BLOCK, HEAD_DIM, dtype=dtype) for _ in "kv")
    k, v = (part.at[jnp.array([1, 6])].set(np.nan) for part in (k, v))
    # What is beyond the end of a chunk in its last block.
    k, v = (part.at[0, :, 2:].set(np.nan).at[4, :, 2:].set(np.nan) for part in (k, v))
    q = random(rng, 8, HEADS, HEAD_DIM, dtype=dtype)
    new = [random(rng, 8, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in "kv"]
    inputs = {
        "position": MIXED_POSITION,
        "slot": [3 * BLOCK + 2, 8 * BLOCK],  # of the decode, and of a chunk's token
        "write_block": [5, 0, 4, 8],
        "write_token": [-1, -1, -1, 1, 2, 3, -1, -1, 4, 5, *[-1] * 6],
        "row": MIXED_ROW,
        "chunk_block": [5, 0, 4, 8],
        "chunk_owner": [0, 0, 1, -1],
        "chunk_start": [0, BLOCK, 0, 0],
        "block": [2, 3, 8, 8],
        "owner": [0, 0, 0, 0],
        "start": [0, BLOCK, UNSEEN, UNSEEN],
    }
    shape = StepShape.mixed(tokens=8, rows=3, context=4, decodes=2, blocks=4)
    attend = attention_of(shape, inputs, kernel)
    got, [layer] = attend(q, *new, [(k, v)])
    assert got.dtype == dtype and np.isfinite(double(got)).all()
    error = ERROR[dtype]
    for name, tokens in MIXED_TOKENS.items():
        for token in tokens:
            blocks, position = MIXED_BLOCKS[name], MIXED_POSITION[token]
            for part, fresh in zip(layer, new, strict=True):
                last = in_order(part, blocks, position + 1)[-1]
                np.testing.assert_array_equal(last, double(fresh[token]))
            expected = want(q[token], layer, blocks, position)
            np.testing.assert_allclose(
                double(got[token]), expected, atol=error, rtol=error
            )


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
        attend = step_attend(shape, inputs, Chunked("cpu", chunk=4), ONE_DEVICE)
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
