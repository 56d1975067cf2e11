"""Weights, KV and FLOPs of blocks against figures worked out by hand from configs."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from models.blocks import (
    Attention,
    Block,
    DenseMLP,
    ExpertMLP,
    LatentAttention,
    LinearAttention,
)

# Qwen/Qwen3-235B-A22B: 64 query and 4 KV heads of 128 on a stream of 4096.
QWEN3 = Attention(embed=4096, q_heads=64, kv_heads=4, head_dim=128)
# deepseek-ai/DeepSeek-V3.
LATENT = LatentAttention(
    embed=7168,
    heads=128,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
)
# Qwen/Qwen3.5-397B-A17B.
LINEAR = LinearAttention(
    embed=4096, key_heads=16, value_heads=64, key_dim=128, value_dim=128, kernel=4
)
V3_EXPERTS = ExpertMLP(embed=7168, width=2048, experts=256, active=8, shared_width=2048)
MLP = DenseMLP(embed=7168, width=18_432)


def test_attention_to_all_tokens() -> None:
    # Query and output 4096 x 8192, key and value 4096 x 512.
    assert QWEN3.params == 2 * 33_554_432 + 2 * 2_097_152
    assert QWEN3.kv_values_per_token == 2 * 4 * 128
    # Scores and values: a multiplication and an addition in each of 8192 places.
    assert QWEN3.prefill_pair_flops == QWEN3.decode_pair_flops == 2 * 2 * 8192
    assert (QWEN3.window, QWEN3.state_values) == (None, 0)


def test_a_gate_on_the_output_is_one_query_more() -> None:
    gated = dataclasses.replace(QWEN3, gated=True)
    assert gated.params - QWEN3.params == 4096 * 8192
    assert gated.prefill_pair_flops == QWEN3.prefill_pair_flops


def test_latent_attention_keeps_576_values_of_a_token() -> None:
    assert LATENT.kv_values_per_token == 576
    down, up = 7168 * 1536, 1536 * 128 * (128 + 64)
    latent, expansion = 7168 * 576, 512 * 128 * (128 + 128)
    output = 128 * 128 * 7168
    assert LATENT.params == down + up + latent + expansion + output == 187_105_280
    at_once = dataclasses.replace(LATENT, q_rank=None)
    assert at_once.params - LATENT.params == 7168 * 128 * 192 - down - up


def test_latent_attention_computes_expanded_or_absorbed() -> None:
    # Scores over 192, values over 128; or scores over 576 and sums over 512.
    assert LATENT.prefill_pair_flops == 2 * 128 * 192 + 2 * 128 * 128 == 81_920
    assert LATENT.decode_pair_flops == 2 * 128 * 576 + 2 * 128 * 512 == 278_528


def test_linear_attention_keeps_a_state_and_no_tokens() -> None:
    # 64 matrices of 128 x 128, and 3 inputs of 2 x 2048 + 8192 places.
    assert LINEAR.state_values == 1_048_576 + 3 * 12_288
    assert LINEAR.kv_values_per_token == 0
    assert LINEAR.prefill_pair_flops == LINEAR.decode_pair_flops == 0
    # Queries, keys, values and gate; two numbers for each head; output; convolution.
    into = 4096 * (2048 + 2048 + 8192 + 8192)
    assert LINEAR.params == into + 4096 * 2 * 64 + 8192 * 4096 + 12_288 * 4


@pytest.mark.parametrize("tp, shards", [(1, 1), (2, 2), (4, 4), (8, 4), (16, 4)])
def test_devices_that_share_the_kv_of_a_token(tp: int, shards: int) -> None:
    assert QWEN3.kv_shards(tp) == shards
    assert LATENT.kv_shards(tp) == 1
    assert LINEAR.kv_shards(tp) == tp


@pytest.mark.parametrize(
    "attention, divisors",
    [
        (QWEN3, [1, 2, 4, 8, 16]),
        (dataclasses.replace(QWEN3, q_heads=60, kv_heads=20), [1, 2, 4, 5, 10, 20]),
        (LATENT, [1, 2, 4, 8, 16]),
        (LINEAR, [1, 2, 4, 8, 16]),
        (dataclasses.replace(LINEAR, key_heads=8), [1, 2, 4, 8]),
    ],
)
def test_heads_divide_over_devices(attention: Any, divisors: list[int]) -> None:
    assert [tp for tp in range(1, 21) if attention.splits(tp)] == divisors


def test_an_mlp_has_two_or_three_matrices() -> None:
    assert MLP.params == MLP.active_params == 3 * 7168 * 18_432
    assert dataclasses.replace(MLP, matrices=2).params == 2 * 7168 * 18_432
    assert MLP.routed_params == 0


def test_weights_of_a_mixture_of_experts() -> None:
    expert = 3 * 7168 * 2048
    assert V3_EXPERTS.expert_params == V3_EXPERTS.shared_params == expert
    assert V3_EXPERTS.routed_params == 256 * expert
    assert V3_EXPERTS.params == 257 * expert + 7168 * 256
    assert V3_EXPERTS.active_params == 9 * expert + 7168 * 256
    alone = dataclasses.replace(V3_EXPERTS, shared_width=0)
    assert V3_EXPERTS.params - alone.params == expert


def test_experts_that_a_batch_touches() -> None:
    assert V3_EXPERTS.touched(0) == 0
    assert V3_EXPERTS.touched(1) == pytest.approx(8, rel=1e-12)
    # Of the second token's 8, one in 32 is the first's.
    assert V3_EXPERTS.touched(2) == pytest.approx(8 + 8 * 31 / 32, rel=1e-12)
    assert V3_EXPERTS.touched(64) == pytest.approx(256 * (1 - (31 / 32) ** 64))
    assert V3_EXPERTS.touched(10_000) == pytest.approx(256)
    every = dataclasses.replace(V3_EXPERTS, active=256)
    assert every.touched(1) == 256


def test_a_block_is_attention_and_mlp() -> None:
    block = Block(count=58, attention=LATENT, mlp=V3_EXPERTS)
    assert block.params == LATENT.params + V3_EXPERTS.params
    assert block.active_params == LATENT.params + V3_EXPERTS.active_params
    # The router and the experts of all tokens, but none that is chosen.
    experts = 3 * 7168 * 2048
    assert block.dense_params == LATENT.params + 7168 * 256 + experts
    assert block.params - block.dense_params == 256 * experts


@pytest.mark.parametrize(
    "of, change, message",
    [
        (QWEN3, {"kv_heads": 5}, "q_heads: expected a multiple of kv_heads=5, got 64"),
        (QWEN3, {"window": 0}, "Attention.window: expected >= 1, got 0"),
        (LATENT, {"q_rank": 0}, "LatentAttention.q_rank: expected >= 1, got 0"),
        (LATENT, {"kv_rank": -1}, "LatentAttention.kv_rank: expected >= 1, got -1"),
        (LINEAR, {"key_heads": 48}, "expected a multiple of key_heads=48, got 64"),
        (LINEAR, {"kernel": 0}, "LinearAttention.kernel: expected >= 1, got 0"),
        (MLP, {"width": 0}, "DenseMLP.width: expected >= 1, got 0"),
        (V3_EXPERTS, {"active": 257}, "active: expected at most 256 experts, got 257"),
        (V3_EXPERTS, {"active": 0}, "ExpertMLP.active: expected >= 1, got 0"),
        (V3_EXPERTS, {"shared_width": -1}, "shared_width: expected >= 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused(
    of: Any, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(of, **change)


def test_impossible_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="Block.count: expected >= 1, got 0"):
        Block(count=0, attention=LATENT, mlp=MLP)
    with pytest.raises(ValueError, match="embed: expected 4096 as in att.*, got 7168"):
        Block(count=1, attention=QWEN3, mlp=MLP)
