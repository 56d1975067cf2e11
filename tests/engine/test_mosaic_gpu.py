"""The Hopper kernels in JAX's interpreter of GPU kernels, on a CPU.

It runs the kernels' own code: their items, copies, barriers, masks and softmax, and
looks for races. Two products are plain ones here, since the interpreter of jax 0.10
knows wgmma neither with a transposed operand nor with one in registers.

`-m gpu` runs the same cases on a GPU, as they are.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention import gathered, mosaic_gpu_decodes, mosaic_gpu_prompts
from disagg_jax.engine.attention.entries import UNSEEN, Entries
from disagg_jax.engine.attention.mosaic_gpu import MosaicGpuAttention
from disagg_jax.engine.attention.mosaic_gpu_decodes import Grid, kernel_cost, split_rows
from disagg_jax.engine.attention.paged import paged_attention
from models.config import get_config
from tests.engine.harness import BUCKETS, make_config
from tests.engine.test_attention import Decodes, double
from tests.engine.test_bfloat16 import check, compare

ROWS, ENTRIES = 4, 12  # so that most cases are one program
INTERPRETED = "interpreted"
WHERE = [INTERPRETED, pytest.param("gpu", marks=pytest.mark.gpu)]


@functools.partial(jax.jit, static_argnames="where")
def attend(*args, where):
    del where  # programs of the interpreter are others
    return mosaic_gpu_decodes.decode_attention(*args)


@pytest.fixture
def on(request, monkeypatch):
    """Runs a test in the interpreter, or on a GPU."""
    monkeypatch.setattr(OnHopper, "where", request.param)
    if request.param != INTERPRETED:
        with jax.default_device(jax.devices("gpu")[0]):
            yield
        return

    def product(x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)

    patched = {
        "_scores": lambda q, k: product(q[...], k[...].T),
        "_add_values": lambda out, weights, v: out + product(weights, v[...]),
        "column": lambda values: values[...],
        "iota": functools.partial(lax.broadcasted_iota, jnp.int32),
        "full": functools.partial(jnp.full, dtype=jnp.float32),
        # Two buffers of a head_dim of 64, so that items of 4 blocks use them again.
        "_BUFFER_BYTES": 2**15,
    }
    for name, value in patched.items():
        monkeypatch.setattr(mosaic_gpu_decodes, name, value)
    params = InterpretGPUParams(detect_races=True)
    kernel = functools.partial(plgpu.kernel, interpret=params)
    monkeypatch.setattr(plgpu, "kernel", kernel)  # also of threads that compile
    yield
    interpreter.reset_gpu_interpret_mode_state()


class OnHopper(Decodes):
    """Rows and entries of one size, with what the kernel is for."""

    where = INTERPRETED

    def __init__(self, contexts, *, kv_heads=1, head_dim=64, **kwargs):
        blocks = sum(-(-context // 64) for context in contexts)
        super().__init__(
            contexts,
            block_tokens=64,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype="bfloat16",
            padding=(ROWS - len(contexts), ENTRIES - blocks),
            **kwargs,
        )

    def attend(self, chunk=None, layer=None) -> np.ndarray:
        args = self.q_BNH, layer or self.layer, self.position_B, self.entries
        got = jax.block_until_ready(attend(*args, where=self.where))
        assert got.dtype == self.q_BNH.dtype and got.shape == self.q_BNH.shape
        if self.where == INTERPRETED:
            assert not interpreter.get_races().races_found
        return double(got)


on_each = pytest.mark.parametrize("on", WHERE, indirect=True)


@on_each
@pytest.mark.parametrize(
    "contexts, shared",
    [
        ([1, 64, 65], False),  # and a row of padding
        ([700], False),  # 11 blocks, which are three items
        ([130, 127, 256, 190], False),  # no padding of either kind
        ([130, 63, 200], True),
        ([], False),
    ],
)
def test_each_row_attends_to_its_own_context(on, contexts, shared):
    """NaN is wherever no row looks: in free blocks, and after the ends of rows."""
    OnHopper(contexts, shared=shared).check(None)


@on_each
@pytest.mark.parametrize(
    "kv_heads, group, head_dim", [(2, 1, 128), (1, 8, 128), (1, 12, 64)]
)
def test_heads(on, kv_heads, group, head_dim):
    OnHopper([65, 300], kv_heads=kv_heads, group=group, head_dim=head_dim).check(None)


@on_each
def test_a_row_with_nan_does_not_harm_the_others(on):
    """Of keys, or values, that the row sees; it shows the NaN itself."""
    decodes = OnHopper([130, 70, 200, 3])
    expected = decodes.attend()
    for part in (0, 1):
        layer = list(decodes.layer)
        layer[part] = layer[part].at[decodes.tables[2][0]].set(np.nan)
        got = decodes.attend(layer=tuple(layer))
        assert np.isnan(got[2]).all()
        np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(expected, 2, 0))


@on_each
def test_large_scores_do_not_overflow(on):
    decodes = OnHopper([130, 700 - 192])
    decodes.q_BNH *= 1000
    decodes.check(None)


@on_each
def test_as_plain_attention_where_entries_have_any_order(on):
    """Entries without a token that is seen lie between others; a row has only such."""
    decodes = OnHopper([200, 300])
    order = jnp.array([2, 0, 3, 1, 8, 4, 9, 7, 5, 6, 10, 11])
    block, _, start = (x[order] for x in decodes.entries)
    owner = jnp.array([0] * 4 + [1] * 6 + [2] * 2)
    decodes.entries = Entries(block, owner, start)
    args = decodes.q_BNH, decodes.layer, decodes.position_B, decodes.entries
    plain = jax.jit(paged_attention, static_argnums=4)
    got, expected = decodes.attend(), double(plain(*args, None))
    # Weights are rounded to bfloat16 here, and not there.
    np.testing.assert_allclose(got, expected, atol=2e-2, rtol=2e-2)
    np.testing.assert_array_equal(got[2:], 0)


# -- whole prompts ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="where")
def attend_prompts(*args, where):
    del where
    return mosaic_gpu_prompts.prompt_attention(*args)


@on_each
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, head_dim",
    [
        ([70, 1, 57, 64], 2, 1, 64),  # rows begin in tiles, and at the edge of one
        ([5, 187], 2, 1, 64),  # three tiles of keys, through two buffers
        ([66], 2, 2, 128),
    ],
)
def test_each_token_attends_to_its_prompt_up_to_itself(
    on, lengths, heads, kv_heads, head_dim
):
    """Of packed prompts, and padding behind them."""
    padding = 5
    row_T = np.repeat([*range(len(lengths)), -1], [*lengths, padding])
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(len(row_T), n, head_dim)), "bfloat16")
        for n in (heads, kv_heads, kv_heads)
    )
    row_T = jnp.array(row_T)
    got = jax.block_until_ready(attend_prompts(q, k, v, row_T, where=OnHopper.where))
    if OnHopper.where == INTERPRETED:
        assert not interpreter.get_races().races_found
    assert got.dtype == q.dtype and np.isfinite(double(got)).all()
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    expected = double(gathered.prompt_attention(row_T, *exact))
    np.testing.assert_allclose(  # bfloat16 rounds weights and outputs to 3 digits
        double(got)[:-padding], expected[:-padding], atol=2e-2, rtol=2e-2
    )


# -- without the kernel ----------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, changes, block_tokens, message",
    [
        ("gpu", {}, 64, ""),
        ("cpu", {}, 64, "expected a GPU of Hopper"),
        ("gpu", {"dtype": "float32"}, 64, "expected bfloat16"),
        ("gpu", {}, 16, "expected blocks of 64 tokens, got 16"),
        ("gpu", {"head_dim": 80}, 64, "expected a head_dim of 64, 128 or 256, got 80"),
        ("gpu", {"kv_heads": 1, "q_heads": 65}, 64, "at most 64 query heads a kv head"),
    ],
)
def test_says_what_it_is_not_for(platform, changes, block_tokens, message):
    config = dataclasses.replace(get_config("llama-3-8b"), dtype="bfloat16")
    config = dataclasses.replace(config, **changes)
    problem = MosaicGpuAttention(platform).problem(config, block_tokens)
    assert message in problem and bool(message) == bool(problem)


@functools.partial(jax.jit, static_argnames="grid")
def items_of(position_B, owner_P, start_P, grid):
    return split_rows(position_B, Entries(start_P, owner_P, start_P), grid)


@given(
    st.lists(st.integers(1, 40), max_size=8).filter(lambda counts: sum(counts) <= 64),
    st.sampled_from(
        [Grid.of(8, 64, 1), Grid.of(8, 64, 64), Grid(entries=2, items=40, splits=3)]
    ),
)
def test_items_are_all_entries_once(counts, grid):
    """Whatever the rows, they are as many as the grid has, and no row has too many."""
    rows, entries = 8, 64
    owner = np.repeat(np.arange(len(counts)), counts)
    padding = entries - len(owner)
    owner = np.pad(owner, (0, padding), constant_values=max(len(counts) - 1, 0))
    start = [64 * i for count in counts for i in range(count)] + [UNSEEN] * padding
    position = [64 * count - 1 for count in counts] + [0] * (rows - len(counts))
    args = (jnp.array(x, jnp.int32) for x in (position, owner, start))
    row, first, count, items = map(np.asarray, items_of(*args, grid))
    used = count > 0
    assert used[: items.sum()].all() and not used[items.sum() :].any()
    assert items.max() <= grid.splits
    np.testing.assert_array_equal(np.bincount(row[used], minlength=rows), items)
    taken = [
        (row, first + i)
        for row, first, count in zip(row, first, count, strict=True)
        for i in range(count)
    ]
    assert taken == [(row, i) for i, row in enumerate(owner[: sum(counts)])]


def test_few_long_rows_fill_a_gpu():
    """A row of 64 Ki tokens of 8 kv heads, and of 2: most of what 132 SMs can hold."""
    assert Grid.of(rows=1, entries=1024, kv_heads=8).items * 8 > 264
    assert Grid.of(rows=1, entries=1024, kv_heads=2).items * 2 > 264


def kernel_calls(jaxpr) -> list:
    """The calls of Pallas kernels in a program."""
    calls = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("mpmd_map", "pallas_call"):
            calls.append(eqn)
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            calls += kernel_calls(inner) if inner is not None else []
    return calls


@pytest.mark.parametrize("group, queries", [(1, 8), (4, 8), (12, 16)])
@pytest.mark.parametrize("contexts", [[64] * 5, [64 * 5] * 5])
def test_cost_is_of_what_the_kernel_is_given(contexts, group, queries):
    """Each array once; but queries once for each item of their row."""
    kv_heads, head_dim, rows = 2, 128, len(contexts)
    decodes = Decodes(
        contexts,
        block_tokens=64,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype="bfloat16",
    )
    blocks = sum(contexts) // 64
    decodes.layer = tuple(part[:blocks] for part in decodes.layer)  # no free ones
    args = decodes.q_BNH, decodes.layer, decodes.position_B, decodes.entries
    program = jax.make_jaxpr(mosaic_gpu_decodes.decode_attention)(*args)
    (call,) = kernel_calls(program.jaxpr)
    avals = [var.aval for var in (*call.invars, *call.outvars)]
    size_bytes = sum(aval.size * aval.dtype.itemsize for aval in avals)
    items = call.outvars[0].aval.shape[0]
    assert items >= rows
    size_bytes += (items - rows) * kv_heads * queries * head_dim * 2
    got = kernel_cost(rows, blocks, kv_heads * group, kv_heads, head_dim)
    assert got.size_bytes == size_bytes


def test_cost_counts_all_64_queries_of_a_tensor_core():
    """As if each kv head had 64, whatever it has: two products with 64 keys a block."""
    for heads in (2, 128):
        cost = kernel_cost(3, 7, heads, kv_heads=2, head_dim=128)
        assert cost.flops == 2 * (2 * 7 * 64 * 128 * 128)


def test_cost_of_prompts_is_of_half_the_pairs_of_tiles():
    """Three tiles of queries see 1, 2 and 3 of keys: two products each."""
    cost = mosaic_gpu_prompts.kernel_cost(tokens=190, heads=4, kv_heads=2, head_dim=64)
    assert cost.flops == 4 * (1 + 2 + 3) * 2 * (2 * 64 * 64 * 64)
    q_and_out, kv = (2 * 192 * 64 * 2 * heads for heads in (4, 2))
    assert cost.size_bytes == q_and_out + kv + 4 * 192


# -- in the engine ---------------------------------------------------------------------


class OnCpu(MosaicGpuAttention):
    """The kernels in the interpreter, which has no GPU."""

    name = "mosaic_gpu_on_cpu"

    def problem(self, config, block_tokens):
        return MosaicGpuAttention("gpu").problem(config, block_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("on", [INTERPRETED], indirect=True)
def test_an_engine_attends_with_them(world, on, monkeypatch):
    """On one device each: with two, the interpreter waits for itself."""
    for guard in ("no_tracing", "transfer_guard"):  # it traces as it runs
        monkeypatch.setattr(jax, guard, lambda _: contextlib.nullcontext())
    found = compare(
        world,
        make_config("hopper", layers=1, kv_heads=4, head_dim=64),
        "prefill:tp1,decode:tp1",
        attention=f"{__name__}:OnCpu",
        pool=KVMemory(num_blocks=4, block_tokens=64, max_context=64),
        buckets=dataclasses.replace(BUCKETS, pool_blocks=(4,), transfer_blocks=(1,)),
    )
    check(found)
    assert not interpreter.get_races().races_found
