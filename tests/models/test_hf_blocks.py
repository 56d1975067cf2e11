"""Layers of config.json files: of each family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.blocks import (
    Attention,
    DenseMLP,
    ExpertMLP,
    LatentAttention,
    LinearAttention,
)
from models.hf_blocks import blocks, read_layers, text_settings
from models.lookup import find_model

# A dense model, and mixtures of each family, with sizes that are all unlike.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "intermediate_size": 50,
    "vocab_size": 70,
}
ATTENTION = Attention(embed=96, q_heads=6, kv_heads=3, head_dim=20)
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3 = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
GPT_OSS = {
    **MIXTRAL,
    "model_type": "gpt_oss",
    "experts_per_token": 2,
    "sliding_window": 5,
    "max_position_embeddings": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "swiglu_limit": 7.0,
    "attention_bias": True,
}
MINIMAX = {
    **MIXTRAL,
    "model_type": "minimax_m2",
    "shared_intermediate_size": 0,
    "rotary_dim": 10,
    "use_qk_norm": True,
    "use_mtp": True,
    "num_mtp_modules": 3,
    "attn_type_list": [1] * 4,
}
DEEPSEEK = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 14,
    "moe_layer_freq": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_nextn_predict_layers": 1,
}
LATENT = LatentAttention(
    embed=96, heads=6, q_rank=40, kv_rank=24, nope_dim=12, rope_dim=8, value_dim=10
)
KIMI = {
    "model_type": "kimi_k25",
    "text_config": {**DEEPSEEK, "model_type": "kimi_k2"},
    "vision_config": {"hidden_size": 1152},
    "tie_word_embeddings": True,
    "media_placeholder_token_id": 1,
}
LINEAR = LinearAttention(
    embed=96, key_heads=2, value_heads=4, key_dim=6, value_dim=7, kernel=3
)
QWEN3_5 = {
    "model_type": "qwen3_5_moe",
    "image_token_id": 9,
    "tie_word_embeddings": False,
    "text_config": {
        **{k: v for k, v in QWEN3.items() if k != "intermediate_size"},
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 11,
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 3,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 7,
        "full_attention_interval": 4,
        "mtp_num_hidden_layers": 1,
    },
}


def kinds(settings: dict[str, Any]) -> list[tuple[int, object, object]]:
    text, unknown = text_settings(settings)
    assert unknown == []
    found = blocks(read_layers(text))
    return [(block.count, block.attention, block.mlp) for block in found]


def experts(**fields: int) -> ExpertMLP:
    return ExpertMLP(embed=96, **fields)


WINDOW = Attention(embed=96, q_heads=6, kv_heads=3, head_dim=20, window=5)
GATED = Attention(embed=96, q_heads=6, kv_heads=3, head_dim=20, gated=True)


@pytest.mark.parametrize(
    "settings, found",
    [
        (LLAMA, [(4, ATTENTION, DenseMLP(embed=96, width=50))]),
        (MIXTRAL, [(4, ATTENTION, experts(width=50, experts=8, active=2))]),
        (MINIMAX, [(4, ATTENTION, experts(width=50, experts=8, active=2))]),
        (
            {**MINIMAX, "shared_intermediate_size": 9},
            [(4, ATTENTION, experts(width=50, experts=8, active=2, shared_width=9))],
        ),
        (QWEN3, [(4, ATTENTION, experts(width=14, experts=16, active=3))]),
        (
            {**QWEN3, "mlp_only_layers": [2]},
            [
                (3, ATTENTION, experts(width=14, experts=16, active=3)),
                (1, ATTENTION, DenseMLP(embed=96, width=50)),
            ],
        ),
        (
            GPT_OSS,
            [
                (2, WINDOW, experts(width=50, experts=8, active=2)),
                (2, ATTENTION, experts(width=50, experts=8, active=2)),
            ],
        ),
        (
            DEEPSEEK,
            [
                (1, LATENT, DenseMLP(embed=96, width=50)),
                (3, LATENT, experts(width=14, experts=32, active=4, shared_width=28)),
            ],
        ),
        (
            {**DEEPSEEK, "n_shared_experts": None, "first_k_dense_replace": 0},
            [(4, LATENT, experts(width=14, experts=32, active=4))],
        ),
        (
            QWEN3_5,
            [
                (3, LINEAR, experts(width=14, experts=16, active=3, shared_width=11)),
                (1, GATED, experts(width=14, experts=16, active=3, shared_width=11)),
            ],
        ),
    ],
)
def test_layers_of_each_family(
    settings: dict[str, Any], found: list[tuple[int, object, object]]
) -> None:
    assert kinds(settings) == found


def test_the_part_for_text_of_a_larger_model() -> None:
    assert kinds(KIMI) == kinds(DEEPSEEK)
    text, _ = text_settings(KIMI)
    assert text["tie_word_embeddings"]  # which only the outer file says
    inner = {**KIMI["text_config"], "tie_word_embeddings": False}
    text, _ = text_settings({**KIMI, "text_config": inner})
    assert not text["tie_word_embeddings"]


def test_queries_without_a_latent_of_their_own() -> None:
    (first, *_) = kinds({**DEEPSEEK, "q_lora_rank": None})
    attention = first[1]
    assert isinstance(attention, LatentAttention) and attention.q_rank is None


WINDOWS = {"sliding_window": 5, "max_position_embeddings": 100}


@pytest.mark.parametrize(
    "settings, windows",
    [
        ({**LLAMA, "model_type": "mistral", **WINDOWS}, [5, 5, 5, 5]),
        ({**LLAMA, "model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({**MIXTRAL, **WINDOWS}, [5, 5, 5, 5]),
        ({**MIXTRAL, **WINDOWS, "sliding_window": 100}, [None] * 4),
        ({**GPT_OSS, "sliding_window": 100}, [None] * 4),
        ({**QWEN3, **WINDOWS, "use_sliding_window": False}, [None] * 4),
        ({**QWEN3, **WINDOWS}, [None] * 4),  # Qwen's are unused unless it says so
        (
            {**QWEN3, **WINDOWS, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 5],
        ),
    ],
)
def test_windows_of_attention(
    settings: dict[str, Any], windows: list[int | None]
) -> None:
    text, _ = text_settings(settings)
    found = [attention.window for attention, _ in read_layers(text)]
    assert found == windows


def test_layer_types_come_before_an_interval() -> None:
    types = ["full_attention", *["linear_attention"] * 3]
    inner = {**QWEN3_5["text_config"], "layer_types": types}
    text, _ = text_settings({**QWEN3_5, "text_config": inner})
    found = [attention for attention, _ in read_layers(text)]
    assert found == [GATED, LINEAR, LINEAR, LINEAR]


def test_unknown_keys_of_both_parts() -> None:
    inner = {**KIMI["text_config"], "novel": 1}
    assert text_settings({**KIMI, "text_config": inner, "odd": 2})[1] == [
        "odd",
        "novel",
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts=8: a mixture of exp"),
        ({**LLAMA, "kv_lora_rank": 8}, "kv_lora_rank=8: latent attention is not"),
        ({**DEEPSEEK, "index_topk": 8}, "index_topk=8: sparse attention is not mod"),
        (
            {**DEEPSEEK, "model_type": "glm_moe_dsa", "index_topk": 8},
            "expected one of .*, got 'glm_moe_dsa'; index_topk=8: sparse attention is "
            "not modelled$",
        ),
        ({**MIXTRAL, "mamba_d_state": 16}, "mamba_d_state=16: linear attention or a"),
        ({**MIXTRAL, "text_config": {"a": 1}}, "text_config=.*: an encoder or another"),
        ({**KIMI, "audio_config": {"a": 1}}, "audio_config=.*: an encoder or another"),
        ({**KIMI, "text_config": None}, "text_config: expected an object, got None"),
        ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq: expected 1, got 2"),
        ({**QWEN3, "decoder_sparse_step": 2}, "decoder_sparse_step: expected 1, got 2"),
        ({**MINIMAX, "attn_type_list": [0, 1, 1, 1]}, "attn_type_list: expected 1"),
        (
            {**GPT_OSS, "layer_types": ["chunked_attention"] * 4},
            "layer_types: expected 4 of .*, got 4 of .'chunked_attention'.",
        ),
        (
            {**GPT_OSS, "layer_types": ["full_attention"]},
            "layer_types: expected 4 of .*, got 1 of",
        ),
        ({**GPT_OSS, "sliding_window": None}, "sliding_window: expected a whole num"),
        ({**DEEPSEEK, **WINDOWS}, "sliding_window: a window of latent attention is"),
        ({**MIXTRAL, "num_local_experts": None}, "num_local_experts: expected a whole"),
        (
            {k: v for k, v in MIXTRAL.items() if k != "num_local_experts"},
            "num_experts: expected a whole number >= 1, got None",
        ),
        ({**DEEPSEEK, "v_head_dim": None}, "v_head_dim: expected a whole number"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "expected at most 8 experts, got 9"),
    ],
)
def test_what_is_not_modelled_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text, _ = text_settings(settings)
        read_layers(text)


# -- as find_model gives them ---------------------------------------------------------


def model_of(folder: Path, settings: dict[str, Any]) -> Any:
    path = folder / "m.json"
    path.write_text(json.dumps(settings))
    return find_model(str(path))


def test_a_mixture_is_not_dense_and_a_llama_is(tmp_path: Path) -> None:
    assert model_of(tmp_path, LLAMA).is_dense
    for settings in (MIXTRAL, QWEN3, GPT_OSS, MINIMAX, DEEPSEEK, KIMI, QWEN3_5):
        model = model_of(tmp_path, settings)
        assert not model.is_dense
        assert (model.layers, model.embed, model.vocab_size) == (4, 96, 70)
    assert model_of(tmp_path, KIMI).tie_embeddings
    assert not model_of(tmp_path, QWEN3_5).tie_embeddings


def test_a_window_makes_a_model_one_that_the_engine_cannot_run(tmp_path: Path) -> None:
    model = model_of(tmp_path, {**LLAMA, "model_type": "mistral", **WINDOWS})
    assert not model.is_dense
    (block,) = model.blocks
    assert block.params == model_of(tmp_path, LLAMA).blocks[0].params


FP8 = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
INT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "group_size": 32},
        }
    },
}


@pytest.mark.parametrize(
    "settings, quantization, weight, experts, bits",
    [
        (MIXTRAL, FP8, 1, 1, (8, 8)),
        (DEEPSEEK, FP8, 1, 1, (8, 8)),
        (QWEN3_5, FP8, 1, 1, (8, 8)),
        # By the list of what is left alone, which also a text part's may have.
        (MIXTRAL, {**FP8, "ignore": ["re:.*experts.*"]}, 1, 2, (8, 16)),
        (MIXTRAL, {**FP8, "ignore": ["self_attn"]}, 2, 1, (16, 8)),
        (
            QWEN3_5,
            {**FP8, "ignore": ["model.language_model.layers.*.mlp.experts"]},
            *(1, 2, (8, 16)),
        ),
        # Without one, by the family: experts alone.
        (GPT_OSS, {"quant_method": "mxfp4"}, 2, 0.53125, (16, 4)),
        (KIMI, INT4, 2, 0.5625, (16, 16)),
        (KIMI, {**INT4, "ignore": ["lm_head"]}, 0.5625, 0.5625, (16, 16)),
    ],
)
def test_experts_may_have_a_precision_of_their_own(
    tmp_path: Path,
    settings: dict[str, Any],
    quantization: dict[str, Any],
    weight: float,
    experts: float,
    bits: tuple[int, int],
) -> None:
    stored = model_of(
        tmp_path, {**settings, "quantization_config": quantization}
    ).stored
    assert stored.weight == pytest.approx(weight, rel=1e-12)
    assert stored.experts == pytest.approx(experts, rel=1e-12)
    assert (stored.matmul_bits, stored.expert_matmul_bits) == bits


def test_every_matrix_of_a_layer_has_its_share(tmp_path: Path) -> None:
    """Of latent and linear attention, and of shared experts, by hand."""

    def weight(settings: dict[str, Any], *kept: str) -> float:
        fields = {**FP8, "ignore": [*kept]}
        return model_of(
            tmp_path, {**settings, "quantization_config": fields}
        ).stored.weight

    # 4 layers of 96 x 40 + 40 x 120 + 96 x 32 + 24 x 6 x 22 + 60 x 96; a dense MLP of
    # 3 x 96 x 50; three shared ones of 3 x 96 x 28.
    latent, shared = 4 * 20_640, 3 * 8064
    total = latent + 14_400 + shared
    assert weight(DEEPSEEK, "self_attn") == pytest.approx(1 + latent / total)
    assert weight(DEEPSEEK, "q_b_proj") == pytest.approx(1 + 4 * 4800 / total)
    assert weight(DEEPSEEK, "shared_experts") == pytest.approx(1 + shared / total)
    assert weight(DEEPSEEK, "model.layers.0.mlp") == pytest.approx(1 + 14_400 / total)
    # 3 layers of 96 x (52 + 28 + 4 + 4) + 28 x 96, a gated one of 96 x 20 x (18 + 6),
    # and 4 shared experts of 3 x 96 x 11.
    linear, whole, shared = 3 * 11_136, 46_080, 4 * 3168
    total = linear + whole + shared
    assert weight(QWEN3_5, "linear_attn") == pytest.approx(1 + linear / total)
    assert weight(QWEN3_5, "q_proj") == pytest.approx(1 + 1920 * 12 / total)
    assert weight(QWEN3_5, "shared_expert") == pytest.approx(1 + shared / total)


@pytest.mark.parametrize(
    "group, bits",
    [
        ({"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}, 8),
        ({"weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}, 4),
        ({"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}, 8),
        ({"weights": {"num_bits": 8}, "input_activations": {"num_bits": 4}}, 8),
        ({"weights": {"num_bits": 8}, "input_activations": None}, 16),
    ],
)
def test_a_matmul_is_as_wide_as_the_wider_of_its_inputs(
    tmp_path: Path, group: dict[str, Any], bits: int
) -> None:
    fields = {**INT4, "config_groups": {"g": group}, "ignore": ["lm_head"]}
    model = model_of(tmp_path, {**LLAMA, "quantization_config": fields})
    assert model.stored.matmul_bits == bits
