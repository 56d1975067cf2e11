"""The TPU kernels in interpret mode, against plain attention; and what they move.

How they compile for TPUs is in tests/experiments/compiled/.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from disagg_jax.engine.attention import pallas_tpu_decodes, pallas_tpu_prompts
from disagg_jax.engine.attention.entries import UNSEEN, Entries
from disagg_jax.engine.attention.pallas_tpu import PallasTpuAttention
from disagg_jax.engine.attention.pallas_tpu_decodes import decode_attention
from disagg_jax.engine.attention.pallas_tpu_prompts import (
    chunk_attention,
    prompt_attention,
)
from experiments.benchmarks.attention import STEPS, step_error
from models.config import get_config
from tests.engine.test_attention import (
    DTYPES,
    ERROR,
    Decodes,
    double,
    plain_attention,
    want,
)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


class KernelDecodes(Decodes):
    """The same for the kernel, with `chunk` entries in a step."""

    def attend(self, chunk: int | None, layer=None) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_tpu_decodes, "_MOST_ENTRIES", chunk)
            attend = jax.jit(functools.partial(decode_attention, interpret=True))
            layer = layer or self.layer
            got = attend(self.q_BNH, layer, self.position_B, self.entries)
        assert got.dtype == self.q_BNH.dtype and got.shape == self.q_BNH.shape
        return double(got)


@pytest.mark.parametrize(
    "padding, shared",
    [
        ((0, 0), True),
        ((2, 1), False),
        slow((3, 0), True),
        slow((0, 5), False),
        slow((2, 1), True),
    ],
)
def test_each_row_attends_to_its_own_context(padding, shared):
    """Although NaN is wherever no row looks."""
    KernelDecodes([9, 1, 8, 17, 4], padding=padding, shared=shared).check(3)


@pytest.mark.parametrize(
    "block_tokens, dtype, entries",
    [
        (1, "float32", 5),
        (16, "bfloat16", 2),
        slow(16, "float32", 1),
        slow(1, "bfloat16", 2),
        slow(16, "float32", 5),
    ],
)
def test_blocks_of_any_size(block_tokens, dtype, entries):
    """A token alone, one short of a block, a full one, one more, and many."""
    n = block_tokens
    contexts = [1, max(1, n - 1), n, n + 1, 5 * n - 1]
    decodes = KernelDecodes(contexts, block_tokens=n, dtype=dtype, padding=(2, 3))
    decodes.check(entries)


@pytest.mark.parametrize(
    "group, head_dim, dtype",
    [
        (1, 64, "float32"),
        (4, 128, "bfloat16"),
        (8, 256, "float32"),
        slow(1, 64, "bfloat16"),
        slow(2, 128, "bfloat16"),
        slow(3, 64, "bfloat16"),
        slow(4, 128, "float32"),
        slow(8, 256, "bfloat16"),
    ],
)
def test_heads(group, head_dim, dtype):
    KernelDecodes([9, 1, 6], group=group, head_dim=head_dim, dtype=dtype).check(2)


def test_a_head_dim_that_is_padded_in_the_cache():
    """As on a TPU; scores are scaled by the model's head_dim."""
    decodes = KernelDecodes([9, 1, 6], head_dim=64)
    padding = [(0, 0), (0, 0), (0, 0), (0, 64)]
    layer = tuple(jnp.pad(part, padding) for part in decodes.layer)
    got = decodes.attend(2, layer)
    np.testing.assert_allclose(got, decodes.attend(2), atol=1e-6, rtol=1e-6)
    decodes.check(2)


@pytest.mark.parametrize("context", [1, 4, 17])
def test_one_row(context):
    KernelDecodes([context]).check(2)


def test_no_decodes():
    """A mixed step may have chunks only."""
    KernelDecodes([], padding=(4, 5)).check(2)


@pytest.mark.parametrize("part", [0, 1])
def test_a_row_with_nan_does_not_harm_the_others(part):
    """Of keys or values that the row sees; it shows the NaN itself."""
    decodes = KernelDecodes([9, 7, 5, 3])
    layer = list(decodes.layer)
    layer[part] = layer[part].at[decodes.tables[1][0]].set(np.nan)
    got, expected = decodes.attend(3, tuple(layer)), decodes.attend(3)
    assert np.isnan(got[1]).all()
    for row in (0, 2, 3):
        np.testing.assert_array_equal(got[row], expected[row])


def test_large_scores_do_not_overflow():
    decodes = KernelDecodes([9, 30])
    decodes.q_BNH *= 1000
    decodes.check(2)


# -- prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, tokens, kv_heads, group, head_dim, dtype",
    [
        ([9, 1, 20], 40, 1, 3, 16, "float32"),
        ([100, 156], 256, 2, 4, 128, "bfloat16"),
        ([600, 513], 1200, 1, 2, 128, "float32"),  # over the edges of tiles
        slow([5], 5, 2, 1, 64, "bfloat16"),
        slow([130, 1, 200], 400, 1, 8, 256, "float32"),
        slow([130, 1, 200], 400, 1, 8, 256, "bfloat16"),
        slow([600, 513], 1200, 1, 2, 128, "bfloat16"),
    ],
)
def test_prompts(lengths, tokens, kv_heads, group, head_dim, dtype):
    """Packed one after the other; nothing comes from another, or from later."""
    rng, used = np.random.default_rng(0), sum(lengths)
    row_T = np.repeat(np.arange(len(lengths)), lengths)
    row_T = jnp.array([*row_T, *[-1] * (tokens - used)], jnp.int32)
    q, k, v = (
        jnp.asarray(rng.normal(size=(tokens, heads, head_dim)), dtype)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    attend = jax.jit(functools.partial(prompt_attention, interpret=True))
    got = attend(q, k, v, row_T)
    assert got.dtype == dtype and np.isfinite(double(got)).all()
    first = 0
    for length in lengths:
        for token in {first, first + length // 2, first + length - 1}:
            seen = slice(first, token + 1)
            expected = plain_attention(*map(double, (q[token], k[seen], v[seen])))
            error = ERROR[dtype]
            np.testing.assert_allclose(
                double(got[token]), expected, atol=error, rtol=error
            )
        first += length


# -- chunks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks, block_tokens, group, head_dim, cache_dim, dtype",
    [
        ([(0, 5), (7, 6), (33, 1)], 4, 2, 16, 16, "float32"),
        ([(100, 28), (0, 130)], 16, 1, 64, 128, "bfloat16"),  # a pool as on a TPU
        # Over the edges of tiles.
        slow([(1000, 120), (40, 24), (0, 5)], 64, 4, 128, 128, "float32"),
        slow([(1000, 120), (40, 24), (0, 5)], 64, 4, 128, 128, "bfloat16"),
        slow([(130, 140)], 128, 8, 256, 256, "float32"),
        slow([(130, 140)], 128, 8, 256, 256, "bfloat16"),
    ],
)
def test_chunks(chunks, block_tokens, group, head_dim, cache_dim, dtype):
    """(start, count) of each; although NaN is wherever none of its tokens looks."""
    rng, K = np.random.default_rng(0), 2
    ends = [start + count for start, count in chunks]
    counts = [-(-end // block_tokens) for end in ends]
    pool, C = sum(counts) + 2, sum(counts) + 3
    ids = rng.permutation(pool - 1).tolist()
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    k, v = (rng.normal(size=(pool, K, block_tokens, cache_dim)) for _ in "kv")
    seen = np.zeros((pool, block_tokens), bool)
    for table, end in zip(tables, ends, strict=True):
        for i, block in enumerate(table):
            seen[block, : end - i * block_tokens] = True
    for part in (k, v):
        part[..., head_dim:] = 0
        part[np.broadcast_to(~seen[:, None, :, None], part.shape)] = np.nan
    layer = jnp.asarray(k, dtype), jnp.asarray(v, dtype)
    # Two decodes first, and padding.
    row = [-1, -1, *np.repeat(np.arange(len(chunks)), [n for _, n in chunks]), -1]
    spans = [range(start, start + count) for start, count in chunks]
    position = [50, 3, *itertools.chain(*spans), 0]
    q = jnp.asarray(rng.normal(size=(len(row), K * group, head_dim)), dtype)
    starts = [i * block_tokens for count in counts for i in range(count)]
    owners = np.repeat(np.arange(len(chunks)), counts).tolist()
    blocks = Entries(
        jnp.array([*sum(tables, []), *[pool - 1] * (C - sum(counts))], jnp.int32),
        jnp.array([*owners, *[-1] * (C - sum(counts))], jnp.int32),
        jnp.array([*starts, *[0] * (C - sum(counts))], jnp.int32),
    )
    attend = jax.jit(functools.partial(chunk_attention, interpret=True))
    got = attend(q, layer, jnp.array(row), jnp.array(position), blocks)
    assert got.dtype == dtype and np.isfinite(double(got)).all()
    cut = [part[..., :head_dim] for part in layer]
    for token in {2, *range(3, len(row) - 1, 7), len(row) - 2}:
        expected = want(q[token], cut, tables[row[token]], position[token])
        np.testing.assert_allclose(
            double(got[token]), expected, atol=ERROR[dtype], rtol=ERROR[dtype]
        )


# -- what a kernel moves ---------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """A call of `pallas_call` that was not run: what it reads, writes and states."""

    grid: tuple[int, ...]
    stated: pl.CostEstimate
    scalars: list[np.ndarray]
    arrays: list[Any]  # operands, and the output
    specs: list[pl.BlockSpec]

    @classmethod
    def of(cls, kernels: ModuleType, run: Callable[[], Any]) -> Self:
        """Return the call of a module's kernel that `run` makes."""
        calls: list[Self] = []

        def pallas_call(_, *, out_shape, grid_spec, cost_estimate, **options):
            def record(*operands):
                n = grid_spec.num_scalar_prefetch
                call = cls(
                    grid=grid_spec.grid,
                    stated=cost_estimate,
                    scalars=[np.asarray(x) for x in operands[:n]],
                    arrays=[*operands[n:], out_shape],
                    specs=[*grid_spec.in_specs, grid_spec.out_specs],
                )
                calls.append(call)
                return jnp.zeros(out_shape.shape, out_shape.dtype)

            return record

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.pl, "pallas_call", pallas_call)
            run()
        (call,) = calls
        return call

    def moved_bytes(self) -> int:
        """Blocks that are not those of the step before, as Pallas's pipeline does."""
        total = 0
        for array, spec in zip(self.arrays, self.specs, strict=True):
            assert spec.block_shape and spec.index_map
            shape = [size for size in spec.block_shape if isinstance(size, int)]
            size_bytes = math.prod(shape) * array.dtype.itemsize
            steps = itertools.product(*map(range, self.grid))
            indices = [
                [int(i) for i in spec.index_map(*step, *self.scalars)] for step in steps
            ]
            changes = [x != y for x, y in itertools.pairwise(indices)]
            total += size_bytes * (1 + sum(changes))
        return total


def decode_call(used: int, *, P=64, B=8, K=2, head_dim=128) -> Call:
    """A call with so many entries that are no padding."""
    block = np.where(np.arange(P) < used, np.arange(P), P)
    owner = np.minimum(np.arange(P), used - 1) * B // P
    start = np.where(np.arange(P) < used, 0, UNSEEN)
    entries = Entries(*(jnp.array(x, jnp.int32) for x in (block, owner, start)))
    part = jnp.zeros((P + 1, K, 128, head_dim), jnp.bfloat16)
    q, position = jnp.zeros((B, 4 * K, head_dim), part.dtype), jnp.zeros(B, jnp.int32)
    run = functools.partial(decode_attention, interpret=True)
    return Call.of(pallas_tpu_decodes, lambda: run(q, (part, part), position, entries))


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_decodes_state_what_they_move(kv_heads):
    call = decode_call(64, K=kv_heads)
    block_bytes = 2 * kv_heads * 128 * 128 * 2
    rows_bytes = 2 * 8 * 4 * kv_heads * 128 * 2
    assert call.moved_bytes() == 64 * block_bytes + rows_bytes
    assert call.stated.bytes_accessed == call.moved_bytes()


@pytest.mark.parametrize("used", [1, 13, 32])
def test_padding_is_hardly_read(used):
    """No more than a step's blocks, however much of it there is."""
    call = decode_call(used)
    places = len(call.scalars[0]) // call.grid[0]
    block_bytes = 2 * 2 * 128 * 128 * 2
    rows_bytes = 2 * 8 * 8 * 128 * 2
    assert call.moved_bytes() <= (used + places) * block_bytes + rows_bytes


@pytest.mark.parametrize("tokens", [100, 700, 2048])
def test_a_prompt_states_what_it_moves(tokens):
    """If it is one for all tokens, which is the most."""
    T, N, K, H = tokens, 4, 1, 128
    q, k = (jnp.zeros((T, n, H), jnp.bfloat16) for n in (N, K))
    run = functools.partial(prompt_attention, interpret=True)
    one = Call.of(pallas_tpu_prompts, lambda: run(q, k, k, jnp.zeros(T)))
    assert one.moved_bytes() == one.stated.bytes_accessed
    rows = jnp.arange(T) // 64
    many = Call.of(pallas_tpu_prompts, lambda: run(q, k, k, rows))
    assert many.stated == one.stated
    assert many.moved_bytes() <= one.moved_bytes()
    if T == 2048:  # tiles of 512 queries and 512 keys: 10 pairs, one of which has what
        # is there already; and 4 with 64 tokens a prompt
        tile_bytes = 2 * 512 * H * 2
        assert one.moved_bytes() - many.moved_bytes() == K * tile_bytes * (9 - 4)


@pytest.mark.parametrize("tokens, blocks", [(128, 3), (512, 14), (576, 4)])
def test_a_chunk_states_what_it_moves(tokens, blocks):
    """If it is one whose every token sees all blocks, which is the most."""
    T, C, N, K, H = tokens, blocks, 4, 1, 128
    q, part = jnp.zeros((T, N, H), jnp.bfloat16), jnp.zeros((C, K, 128, H), "bfloat16")
    table = Entries(jnp.arange(C), jnp.zeros(C, jnp.int32), jnp.arange(C) * 128)
    call = Call.of(
        pallas_tpu_prompts,
        lambda: chunk_attention(
            *(q, (part, part), jnp.zeros(T), jnp.full(T, C * 128 - 1), table),
            interpret=True,
        ),
    )
    padding = -C % 4 if C > 4 else 0
    assert call.grid[2] * min(C, 4) == C + padding
    assert call.moved_bytes() == call.stated.bytes_accessed


# -- on a TPU --------------------------------------------------------------------------


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_on_a_tpu(step, dtype):
    """Each kind of attention, after a step's own writes, against float64."""
    if jax.default_backend() != "tpu":
        pytest.skip(f"needs a TPU, this is a {jax.default_backend()}")
    config = dataclasses.replace(get_config("llama-3-8b"), dtype=dtype)
    error = step_error(PallasTpuAttention("tpu"), config, step)
    assert error <= ERROR[dtype]
