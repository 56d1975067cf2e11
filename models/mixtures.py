"""Presets that are not dense: mixtures of experts, latent and linear attention. No JAX.

Each has the figures of the Hugging Face config.json that its comment names, and the
precision of its published weights. Layers of multi-token prediction are left out.
"""

from __future__ import annotations

import dataclasses

from models.blocks import (
    AnyAttention,
    Attention,
    Block,
    DenseMLP,
    ExpertMLP,
    LatentAttention,
    LinearAttention,
)
from models.model_config import ModelConfig, of_blocks
from models.quantization import at_precision


def _deepseek(
    name: str,
    *,
    dense_layers: int,
    heads: int,
    experts: int,
    vocab_size: int,
    max_length: int,
) -> ModelConfig:
    """Describe a model of DeepSeek-V3's form and widths (arXiv 2412.19437)."""
    embed, layers = 7168, 61
    attention = LatentAttention(
        embed=embed,
        heads=heads,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
    )
    dense = DenseMLP(embed=embed, width=18_432)
    mixture = ExpertMLP(
        embed=embed, width=2048, experts=experts, active=8, shared_width=2048
    )
    blocks = (
        Block(count=dense_layers, attention=attention, mlp=dense),
        Block(count=layers - dense_layers, attention=attention, mlp=mixture),
    )
    return of_blocks(name, blocks, vocab_size=vocab_size, max_length=max_length)


def _gpt_oss(name: str, layers: int, experts: int) -> ModelConfig:
    """Describe openai/gpt-oss-*: every second layer has a window of 128 tokens.

    Left out: the sinks of attention (a value for each head), and biases.
    """
    mlp = ExpertMLP(embed=2880, width=2880, experts=experts, active=4)
    whole = Attention(embed=2880, q_heads=64, kv_heads=8, head_dim=64)
    window = dataclasses.replace(whole, window=128)
    blocks = [
        Block(count=layers // 2, attention=attention, mlp=mlp)
        for attention in (window, whole)
    ]
    model = of_blocks(name, blocks, vocab_size=201_088, max_length=131_072)
    return at_precision(model, experts="mxfp4")


def _equal_blocks(
    name: str,
    layers: int,
    attention: AnyAttention,
    mlp: ExpertMLP,
    vocab_size: int,
    max_length: int,
) -> ModelConfig:
    blocks = (Block(count=layers, attention=attention, mlp=mlp),)
    return of_blocks(name, blocks, vocab_size=vocab_size, max_length=max_length)


def _qwen3_5() -> ModelConfig:
    """Describe Qwen/Qwen3.5-397B-A17B: every fourth layer attends to all tokens."""
    mlp = ExpertMLP(embed=4096, width=1024, experts=512, active=10, shared_width=1024)
    linear = LinearAttention(
        embed=4096, key_heads=16, value_heads=64, key_dim=128, value_dim=128, kernel=4
    )
    whole = Attention(embed=4096, q_heads=32, kv_heads=2, head_dim=256, gated=True)
    blocks = (
        Block(count=45, attention=linear, mlp=mlp),
        Block(count=15, attention=whole, mlp=mlp),
    )
    return of_blocks(
        "qwen3.5-397b-a17b", blocks, vocab_size=248_320, max_length=262_144
    )


# Hugging Face deepseek-ai/DeepSeek-V3; DeepSeek-R1 is the same, trained further.
_V3 = at_precision(
    _deepseek(
        "deepseek-v3",
        dense_layers=3,
        heads=128,
        experts=256,
        vocab_size=129_280,
        max_length=163_840,
    ),
    gemm="fp8_block",
    experts="fp8_block",
)

MIXTURES: tuple[ModelConfig, ...] = (
    _V3,
    dataclasses.replace(_V3, name="deepseek-r1"),
    # Hugging Face moonshotai/Kimi-K2.5, its part for text; only experts have 4 bits.
    at_precision(
        _deepseek(
            "kimi-k2.5",
            dense_layers=1,
            heads=64,
            experts=384,
            vocab_size=163_840,
            max_length=262_144,
        ),
        experts="int4_wo",
    ),
    _gpt_oss("gpt-oss-20b", 24, 32),
    _gpt_oss("gpt-oss-120b", 36, 128),
    # Hugging Face mistralai/Mixtral-8x7B-v0.1.
    _equal_blocks(
        "mixtral-8x7b",
        32,
        Attention(embed=4096, q_heads=32, kv_heads=8, head_dim=128),
        ExpertMLP(embed=4096, width=14_336, experts=8, active=2),
        vocab_size=32_000,
        max_length=32_768,
    ),
    # Hugging Face Qwen/Qwen3-235B-A22B.
    _equal_blocks(
        "qwen3-235b-a22b",
        94,
        Attention(embed=4096, q_heads=64, kv_heads=4, head_dim=128),
        ExpertMLP(embed=4096, width=1536, experts=128, active=8),
        vocab_size=151_936,
        max_length=40_960,
    ),
    # Hugging Face MiniMaxAI/MiniMax-M2.5.
    at_precision(
        _equal_blocks(
            "minimax-m2.5",
            62,
            Attention(embed=3072, q_heads=48, kv_heads=8, head_dim=128),
            ExpertMLP(embed=3072, width=1536, experts=256, active=8),
            vocab_size=200_064,
            max_length=196_608,
        ),
        gemm="fp8_block",
        experts="fp8_block",
    ),
    _qwen3_5(),
)
