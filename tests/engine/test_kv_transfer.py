"""The hand-off of KV: what moves, where to, and by which way."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from disagg_jax.engine.executor import run_alone
from disagg_jax.engine.kv_transfer import segments
from disagg_jax.engine.kv_transfer.piece_plan import piece_plan
from disagg_jax.work import Transfer
from sharding.heads import head_layout
from sharding.mesh import make_mesh
from tests.engine.harness import (
    BUCKETS,
    MODELS,
    POOL,
    make_config,
    make_request,
)

TPS = st.sampled_from([1, 2, 4, 8])


@given(kv_heads=st.integers(1, 9), group=st.integers(1, 8), src_tp=TPS, dst_tp=TPS)
def test_every_head_arrives_where_the_plan_says(kv_heads, group, src_tp, dst_tp):
    """Pieces are followed as arrays that hold the name of their head."""
    src = head_layout(kv_heads * group, kv_heads, src_tp).kv
    dst = head_layout(kv_heads * group, kv_heads, dst_tp).kv
    plan = piece_plan(src, src_tp, dst, dst_tp)
    shards = np.array([-1 if head is None else head for head in src])
    shards = shards.reshape(src_tp, plan.pieces_per_source, plan.piece_heads)
    assert len(plan.sources) == dst_tp
    moved = [[shards[s, piece] for s, piece in sources] for sources in plan.sources]
    arrived = np.concatenate([np.concatenate(pieces) for pieces in moved])
    assert len(arrived) == len(dst)
    for have, want in zip(arrived, dst, strict=True):
        assert want is None or have == want


@given(kv_heads=st.integers(1, 9), group=st.integers(1, 8), src_tp=TPS, dst_tp=TPS)
def test_pieces_are_as_large_as_they_can_be(kv_heads, group, src_tp, dst_tp):
    """Where heads are only divided, a piece is a whole shard of the finer side."""
    if kv_heads % src_tp or kv_heads % dst_tp:
        return
    heads = tuple(range(kv_heads))
    plan = piece_plan(heads, src_tp, heads, dst_tp)
    assert plan.piece_heads == kv_heads // max(src_tp, dst_tp)


def test_repeated_heads_share_the_load():
    """Two sources have each head; four destinations take from all four."""
    repeated = (0, 0, 1, 1)
    plan = piece_plan(repeated, 4, repeated, 4)
    assert sorted(src for ((src, _),) in plan.sources) == [0, 1, 2, 3]


def test_a_head_that_is_nowhere_is_an_error():
    with pytest.raises(ValueError, match=r"\(0, 1, 2\) cannot be made from \(0, 1\)"):
        piece_plan((0, 1), 1, (0, 1, 2), 1)


# Transfers, and no steps.
ONLY = dataclasses.replace(BUCKETS, prefill=(), decode_rows=(), pool_blocks=())
PAIRS = list(itertools.product([1, 2, 4], repeat=2))


def fill(instance, seed: int) -> list[np.ndarray]:
    """Random KV in the whole pool; returns what was put in, part by part.

    Slots of the same head hold the same, as they do in serving.
    """
    rng = np.random.default_rng(seed)
    slots = instance.programs.layout.kv
    first = [slots.index(head) for head in slots]
    values = []

    def put(part):
        values.append(rng.normal(size=part.shape).astype(part.dtype)[:, first])
        return jax.device_put(values[-1], part.sharding)

    instance.cache[:] = jax.tree.map(put, instance.cache)
    return values


def contents(instance) -> list[np.ndarray]:
    return [np.asarray(part) for part in jax.tree.leaves(instance.cache)]


def make_transfer(src_blocks, dst_blocks, context: int) -> Transfer:
    return Transfer(
        id=1,
        request=make_request(0, context, 1),
        src=0,
        dst=1,
        src_blocks=src_blocks,
        dst_blocks=dst_blocks,
        context=context,
    )


SOME = make_transfer((3, 0, 15), (7, 15, 2), 11)


@pytest.mark.parametrize("prefill, decode", PAIRS)
@pytest.mark.parametrize("model", MODELS)
def test_only_the_blocks_of_the_request_change(world, model, prefill, decode):
    """Its heads are in the destination's slots, and all else is as it was."""
    config = MODELS[model]
    engine = world.engine(f"prefill:tp{prefill},decode:tp{decode}", config, ONLY)
    assert_moved(engine, config.head_dim)


@pytest.mark.parametrize("prefill, decode", PAIRS)
@pytest.mark.parametrize("model", MODELS)
def test_blocks_that_move_as_they_are(tiled_world, model, prefill, decode):
    """Not as rows, and in heads of a TPU's size."""
    deployment = f"prefill:tp{prefill},decode:tp{decode}"
    engine = tiled_world.engine(deployment, MODELS[model], ONLY)
    assert_moved(engine, head_dim=128)
    for array in next(engine.start(SOME)).arrays:
        assert array.shape[2:] == (POOL.block_tokens, 128)


def assert_moved(engine, head_dim: int) -> None:
    """Moves some blocks and looks at everything."""
    src, dst = engine.instances
    sent, before = fill(src, 1), fill(dst, 2)
    _, (tokens, size) = run_alone(engine, SOME)
    assert tokens == ()
    slots = list(dst.programs.layout.kv)
    src_blocks, dst_blocks = list(SOME.src_blocks), list(SOME.dst_blocks)
    others = sorted(set(range(POOL.num_blocks)) - set(dst_blocks))
    for source, old, part in zip(sent, before, contents(dst), strict=True):
        np.testing.assert_array_equal(part[others], old[others])
        for slot, head in enumerate(slots):
            if head is not None:
                np.testing.assert_array_equal(
                    part[dst_blocks, slot],
                    source[src_blocks, src.programs.layout.kv.index(head)],
                )
    for source, part in zip(sent, contents(src), strict=True):
        np.testing.assert_array_equal(part, source)
    bucket = src.buckets.transfer_blocks[0]
    token = 2 * engine.config.layers * len(slots) * head_dim * 4
    assert size == bucket * POOL.block_tokens * token


def test_bytes_follow_the_blocks_and_not_the_pool(world):
    sizes = dataclasses.replace(ONLY, transfer_blocks=(2, 16))
    engine = world.engine("prefill:tp1,decode:tp1", buckets=sizes)

    def sent_bytes(n):
        blocks = tuple(range(n))
        return run_alone(engine, make_transfer(blocks, blocks, 4 * n))[1][1]

    assert sent_bytes(1) == sent_bytes(2)
    assert sent_bytes(3) == sent_bytes(16) == 8 * sent_bytes(2)


@pytest.mark.parametrize(
    "prefill, decode", [("tp1", "tp1"), ("tp2", "tp2"), ("tp2", "tp1"), ("tp1", "tp2")]
)
@pytest.mark.parametrize("model", ["divided", "padded"])
def test_the_bytes_that_are_said_are_those_that_arrive(world, model, prefill, decode):
    """What is told without running it; in the destination's heads, padding included."""
    config = MODELS[model]
    engine = world.engine(f"prefill:{prefill},decode:{decode}", config, ONLY)
    transfer = make_transfer((3, 0, 15), (7, 15, 2), 11)
    heads = len(engine.instances[1].programs.layout.kv)
    blocks = engine.instances[0].buckets.transfer_size(3)
    block_bytes = 2 * config.layers * heads * POOL.block_tokens * config.head_dim * 4
    assert engine.transfer_bytes(transfer) == blocks * block_bytes
    assert engine.part_bytes(transfer) == [blocks * block_bytes]
    moved = []
    for pause in engine.start(transfer):
        moved.append(sum(array.nbytes for array in pause.arrays))
    assert moved[1] == blocks * block_bytes  # gathered, moved, inserted
    assert run_alone(engine, transfer)[1][1] == engine.transfer_bytes(transfer)


@pytest.mark.parametrize("prefill, decode", PAIRS)
@pytest.mark.parametrize("model", MODELS)
def test_kv_never_passes_through_the_host(world, model, prefill, decode):
    """Between gather and the end nothing may be copied from host to device."""
    deployment = f"prefill:tp{prefill},decode:tp{decode}"
    engine = world.engine(deployment, MODELS[model], ONLY)
    running = engine.start(make_transfer((0, 1), (1, 0), 8))
    next(running)  # the block ids went to the devices, KV was gathered
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        stages = 1
        for pause in running:
            jax.block_until_ready(pause.arrays)
            stages += 1
    assert stages == 3


def test_a_transfer_has_as_many_blocks_on_both_sides(world):
    engine = world.engine("prefill:tp1,decode:tp1", buckets=ONLY)
    with pytest.raises(RuntimeError, match="equally many blocks .* got 2 and 1"):
        next(engine.start(make_transfer((0, 1), (1,), 8)))


def test_the_guard_catches_device_put_between_unequal_shardings():
    """Otherwise the test above would show nothing."""
    source, target = make_mesh(jax.devices()[:4]), make_mesh(jax.devices()[4:6])
    sharded = NamedSharding(source, PartitionSpec("tensor"))
    array = jax.block_until_ready(jax.device_put(np.ones((4, 3)), sharded))
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jax.block_until_ready(
                jax.device_put(array, NamedSharding(target, PartitionSpec("tensor")))
            )


def test_a_small_payload_is_one_array_with_heads_over_the_mesh(world):
    """k and v of 2 layers, each 16 blocks of 4 heads of 4 tokens."""
    engine = world.engine("prefill:tp2,decode:tp1", buckets=ONLY)
    (array,) = next(engine.start(make_transfer((0, 1), (1, 0), 8))).arrays
    head_dim = MODELS["divided"].head_dim
    assert array.shape == (2 * 2 * 16, 4 * 4 * head_dim)
    assert array.addressable_shards[0].data.shape == (2 * 2 * 16, 2 * 4 * head_dim)


@pytest.mark.parametrize("room, arrays", [(1, [1] * 6), (4, [4, 2]), (6, [6])])
def test_a_larger_payload_is_several_arrays(world, monkeypatch, room, arrays):
    """k and v of 3 layers are 6 parts, of which an array has room for so many."""
    config = make_config(f"room for {room}", kv_heads=2, layers=3)
    part_bytes = 16 * POOL.block_tokens * config.head_dim * 4  # of one head
    monkeypatch.setattr(segments, "_ARRAY_BYTES", room * part_bytes + part_bytes // 2)
    engine = world.engine("prefill:tp1,decode:tp2", config, ONLY)
    src, dst = engine.instances
    sent, _ = fill(src, 1), fill(dst, 2)
    transfer = make_transfer((3, 0), (7, 15), 8)
    pieces = next(engine.start(transfer)).arrays
    assert [array.shape[0] for array in pieces] == 2 * [16 * n for n in arrays]
    run_alone(engine, transfer)
    for source, part in zip(sent, contents(dst), strict=True):
        np.testing.assert_array_equal(part[[7, 15]], source[[3, 0]])
