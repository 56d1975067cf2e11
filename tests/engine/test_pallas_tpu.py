"""The TPU kernels in interpret mode, against plain attention; and what they move.

How they compile for TPUs is in tests/experiments/compiled/.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disagg_jax.engine.attention import pallas_tpu
from disagg_jax.engine.attention.pallas_tpu import decode_attention
from disagg_jax.engine.attention.paged import UNSEEN, Entries
from tests.engine.test_attention import DTYPES, Decodes, double


class KernelDecodes(Decodes):
    """The same for the kernel, with `chunk` entries in a step."""

    def attend(self, chunk: int | None, layer=None) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_tpu, "_MOST_ENTRIES", chunk)
            attend = decode_attention(self.position_B, self.entries, interpret=True)
            got = jax.jit(attend)(self.q_BNH, layer or self.layer)
        assert got.dtype == self.q_BNH.dtype and got.shape == self.q_BNH.shape
        return double(got)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 5), (2, 1)])
def test_each_row_attends_to_its_own_context(padding, shared):
    """Although NaN is wherever no row looks."""
    KernelDecodes([9, 1, 8, 17, 4], padding=padding, shared=shared).check(3)


@pytest.mark.parametrize("entries", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_blocks_of_any_size(block_tokens, dtype, entries):
    """A token alone, one short of a block, a full one, one more, and many."""
    n = block_tokens
    contexts = [1, max(1, n - 1), n, n + 1, 5 * n - 1]
    decodes = KernelDecodes(contexts, block_tokens=n, dtype=dtype, padding=(2, 3))
    decodes.check(entries)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "group, head_dim", [(1, 64), (2, 128), (3, 64), (4, 128), (8, 256)]
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


# -- what a kernel moves ---------------------------------------------------------------


class Call:
    """A call of `pallas_call`, which is not run: what it reads, writes and states."""

    def __init__(self, patch: pytest.MonkeyPatch, kernels, run):
        patch.setattr(kernels.pl, "pallas_call", self._record)
        run()

    def _record(self, kernel, *, out_shape, grid_spec, cost_estimate, **_):
        self.grid, self.stated = grid_spec.grid, cost_estimate

        def call(*operands):
            n = grid_spec.num_scalar_prefetch
            self.scalars = [np.asarray(x) for x in operands[:n]]
            self.arrays = [*operands[n:], out_shape]
            self.specs = [*grid_spec.in_specs, grid_spec.out_specs]
            return jnp.zeros(out_shape.shape, out_shape.dtype)

        return call

    def moved_bytes(self) -> int:
        """Blocks that are not those of the step before, as Pallas's pipeline does."""
        total = 0
        for array, spec in zip(self.arrays, self.specs, strict=True):
            shape = [size for size in spec.block_shape if size is not None]
            size_bytes = math.prod(shape) * array.dtype.itemsize
            steps = itertools.product(*map(range, self.grid))
            indices = [
                tuple(map(int, spec.index_map(*step, *self.scalars))) for step in steps
            ]
            changes = [x != y for x, y in itertools.pairwise(indices)]
            total += size_bytes * (1 + sum(changes))
        return total


def decode_call(patch, used: int, *, P=64, B=8, K=2, head_dim=128) -> Call:
    """A call with so many entries that are no padding."""
    block = np.where(np.arange(P) < used, np.arange(P), P)
    owner = np.minimum(np.arange(P), used - 1) * B // P
    start = np.where(np.arange(P) < used, 0, UNSEEN)
    entries = Entries(*(jnp.array(x, jnp.int32) for x in (block, owner, start)))
    layer = (jnp.zeros((P + 1, K, 128, head_dim), jnp.bfloat16),) * 2
    q = jnp.zeros((B, 4 * K, head_dim), jnp.bfloat16)
    attend = decode_attention(jnp.zeros(B, jnp.int32), entries, interpret=True)
    return Call(patch, pallas_tpu, lambda: attend(q, layer))


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_decodes_state_what_they_move(monkeypatch, kv_heads):
    call = decode_call(monkeypatch, 64, K=kv_heads)
    assert call.stated.bytes_accessed == call.moved_bytes()
    block_bytes = 2 * kv_heads * 128 * 128 * 2
    rows_bytes = 2 * 8 * 4 * kv_heads * 128 * 2
    assert call.moved_bytes() == 64 * block_bytes + rows_bytes


@pytest.mark.parametrize("used", [1, 13, 32])
def test_padding_is_hardly_read(monkeypatch, used):
    """Of each step's places, one scratch block at most, and one of an entry before."""
    call = decode_call(monkeypatch, used)
    places = len(call.scalars[0]) // call.grid[0]
    block_bytes = 2 * 2 * 128 * 128 * 2
    rows_bytes = 2 * 8 * 8 * 128 * 2
    assert call.moved_bytes() <= (used + places) * block_bytes + rows_bytes
