"""Bounds are those worked out by hand."""

import dataclasses

import pytest

from disagg_jax.sim.hardware import HARDWARE
from disagg_jax.work import StepLoad
from experiments.compiled.bounds import ProgramBound, step_bound, transfer_bound
from models.config import ModelConfig, get_config

# 2 layers of 4 * (2 * 2 + 2 * 1) * 2 + 3 * 4 * 8 = 144 weights, a table of 4 * 10; KV
# of 2 * 1 * 2 * 4 = 16 bytes a layer and token.
SHAPE = ModelConfig(
    name="hand",
    layers=2,
    embed=4,
    q_heads=2,
    kv_heads=1,
    head_dim=2,
    mlp=8,
    vocab_size=10,
    tie_embeddings=True,
    norm_eps=1e-5,
    max_length=64,
    dtype="float32",
)


def test_a_decode_step_reads_weights_and_context_and_writes_its_tokens():
    """3 requests with 50 tokens together.

    FLOPs: 2 for each of 328 weights and request, and 4 * 2 * 2 for each of 50 tokens in
    2 layers.
    """
    bound = step_bound(SHAPE, StepLoad((), 3, 50), tp=1)
    assert bound.size_bytes == 328 * 4 + 50 * 2 * 16 + 3 * 2 * 16
    assert bound.flops == 2 * 328 * 3 + 50 * 2 * 16


def test_a_prompt_computes_one_row_of_logits_and_half_of_the_pairs():
    """8 tokens: 4 * 2 * 2 FLOPs for each of 8 * 4 pairs in 2 layers."""
    bound = step_bound(SHAPE, StepLoad(((0, 8),), 0, 0), tp=1)
    assert bound.size_bytes == 328 * 4 + 8 * 2 * 16
    assert bound.flops == 2 * 288 * 8 + 2 * 40 + 32 * 2 * 16


def test_a_chunk_reads_the_kv_before_it():
    for tp in (1, 2):  # there is one kv head: each device reads it
        alone = step_bound(SHAPE, StepLoad(((0, 8),), 0, 0), tp=tp)
        chunk = step_bound(SHAPE, StepLoad(((16, 8),), 0, 0), tp=tp)
        assert chunk.size_bytes - alone.size_bytes == 16 * 2 * 16


def test_work_is_spread_over_the_devices_and_kv_over_its_heads():
    load = StepLoad((), 3, 50)
    one, two = (step_bound(SHAPE, load, tp=tp) for tp in (1, 2))
    assert two.flops == one.flops / 2
    # There is one kv head: each device reads it.
    assert two.size_bytes == 328 * 4 / 2 + 50 * 2 * 16 + 3 * 2 * 16
    wide = dataclasses.replace(SHAPE, kv_heads=2)
    one, two = (step_bound(wide, load, tp=tp) for tp in (1, 2))
    assert two.size_bytes == one.size_bytes / 2


def test_stages_add_up():
    three = dataclasses.replace(SHAPE, layers=3)
    load = StepLoad(((16, 8), (0, 4)), 3, 50)
    first, last = (step_bound(three, load, tp=1, pp=2, stage=i) for i in range(2))
    whole = step_bound(three, load, tp=1)
    assert first.size_bytes + last.size_bytes == whole.size_bytes
    assert first.flops + last.flops == whole.flops
    table_bytes = 4 * 10 * 4
    assert first.size_bytes == pytest.approx(2 * (last.size_bytes - table_bytes))


def test_a_transfer_reads_and_writes_its_kv():
    assert transfer_bound(SHAPE, 5, layers=2, tp=1).size_bytes == 2 * 5 * 2 * 16
    assert transfer_bound(SHAPE, 5, layers=2, tp=2).size_bytes == 2 * 5 * 2 * 16
    eight = get_config("llama-3-8b")
    whole = transfer_bound(eight, 2048, layers=32, tp=1)
    assert transfer_bound(eight, 2048, layers=32, tp=4).size_bytes == (
        whole.size_bytes / 4
    )
    assert whole.size_bytes == 2 * 256 * 2**20


def test_the_longer_of_moving_and_computing_counts():
    h100 = HARDWARE["h100"]
    moves = ProgramBound(size_bytes=3.35e9, flops=0)
    computes = ProgramBound(size_bytes=3.35e9, flops=989e12)
    assert moves.seconds(h100) == pytest.approx(1e-3)
    assert computes.seconds(h100) == pytest.approx(1)


def test_llama_3_8b_on_a_v6e_has_the_bound_of_the_notes():
    """64 decodes over 64k tokens: 15 GB of weights and 8.6 GB of KV, in 14.4 ms."""
    bound = step_bound(get_config("llama-3-8b"), StepLoad((), 64, 65536), tp=1)
    assert bound.seconds(HARDWARE["tpu-v6e"]) == pytest.approx(14.4e-3, rel=0.01)
    assert bound.flops == pytest.approx(995e9, rel=0.01)
