"""Bytes of quantised weights and KV, worked out by hand for each method."""

from __future__ import annotations

from typing import Any

import pytest

from models.config import get_config
from models.hf_blocks import read_layers
from models.model_config import Widths
from models.quantization import at_precision, kv_bytes, read_widths, unknown_keys

# A block has 16 + 8 + 8 + 16 = 48 weights of attention and 3 x 4 x 16 = 192 of MLP.
SETTINGS = {
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 12,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}


def widths(**settings: Any) -> Widths:
    settings = {**SETTINGS, **settings}
    return read_widths(settings, read_layers(settings))


def width(dtype: str = "bfloat16", **fields: Any) -> float:
    return widths(torch_dtype=dtype, quantization_config=fields).weight


def group(targets: list[str] | None = None, **weights: Any) -> dict[str, Any]:
    return {"targets": targets or ["Linear"], "weights": weights or None}


def compressed(*groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
        "ignore": ["lm_head"],
        **fields,
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


@pytest.mark.parametrize(
    "fields, bits",
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8),
        # A float32 for each block of weights.
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "fp8", "weight_block_size": [1, 64]}, 8 + 32 / 64),
        ({"quant_method": "fbgemm_fp8"}, 8),
        # A 16-bit scale and a 4-bit zero point for each group.
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 4 + 20 / 32),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, 8 + 24 / 128),
        ({"quant_method": "gptq", "bits": 3}, 3 + 19 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4),
        ({"quant_method": "gptq", "bits": 2, "group_size": 1024}, 2 + 18 / 1024),
        # Under 0.1 % from here on, as those of whole rows.
        ({"quant_method": "gptq", "bits": 2, "group_size": 1025}, 2),
        ({"quant_method": "gptq", "bits": 4, "group_size": 2048}, 4),
        ({"quant_method": "modelopt", "quant_algo": "MXFP4"}, 4 + 8 / 32),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, 4 + 16 / 128),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, 8),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            8,
        ),
        (
            {
                "quant_method": "modelopt_fp4",
                "quant_algo": "NVFP4",
                "group_size": 32,
            },
            4 + 8 / 32,
        ),
        (
            compressed(
                group(num_bits=4, type="float", strategy="group", group_size=32)
            ),
            4 + 8 / 32,
        ),
        (
            compressed(group(num_bits=8, type="float", group_size=128)),
            8 + 16 / 128,
        ),
        (compressed(group(**FP8)), 8),
        (compressed(group(**INT4)), 4 + 16 / 128),
        (compressed(group(**INT4, symmetric=False)), 4 + 20 / 128),
        (compressed(group(**NVFP4), format="nvfp4-pack-quantized"), 4 + 8 / 16),
        (compressed(group(num_bits=8, type="int", strategy="channel")), 8),
        (compressed(group()), 16),  # activations only
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4 + 8 / 16),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, 4 + 8 / 16),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, 4 + 16 / 128),
        ({"quant_method": "nvfp4"}, 4 + 8 / 16),
        ({"quant_method": "mxfp4"}, 4 + 8 / 32),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4 + 32 / 64),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_use_double_quant": True,
            },
            4 + (8 + 32 / 256) / 64,
        ),
        ({}, 16),
    ],
)
def test_bits_of_a_weight(fields: dict[str, Any], bits: float) -> None:
    assert width(**fields) == pytest.approx(bits / 8, rel=1e-12)
    assert unknown_keys({"quantization_config": fields}) == []


ATTENTION, GATES = 48 / 240, 64 / 240  # shares of a block's weights


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}, ATTENTION),
        ({"quant_method": "fp8", "ignored_layers": ["model.layers.1"]}, 1 / 12),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1", "lm"]},
            1 / 12,  # and not also layers 10 and 11
        ),
        (
            {
                "quant_method": "fp8",
                "modules_to_not_convert": ["model.layers.0.mlp.gate_proj", "mlp.gate"],
            },
            GATES / 12,
        ),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
            0,
        ),
        (
            {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn"],
            },
            ATTENTION,
        ),
        (
            {
                "quantization": {
                    "quant_algo": "FP8",
                    "exclude_modules": ["lm_head", "model.layers.11*"],
                }
            },
            1 / 12,
        ),
        (
            compressed(group(**FP8), ignore=["lm_head", r"re:.*\.mlp\.gate_proj$"]),
            GATES,
        ),
        (compressed(group(["re:.*mlp.*"], **FP8)), ATTENTION),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_8bit": True,
                "llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            ATTENTION,
        ),
    ],
)
def test_matrices_that_are_left_alone(fields: dict[str, Any], kept: float) -> None:
    bits = 4.25 if fields.get("quant_method") == "mxfp4" else 8
    want = kept * 2 + (1 - kept) * bits / 8
    assert width(**fields) == pytest.approx(want, rel=1e-12)
    wide = kept * 4 + (1 - kept) * bits / 8
    assert width("float32", **fields) == pytest.approx(wide, rel=1e-12)


def test_a_regular_expression_is_matched_from_the_beginning() -> None:
    fields = {"quant_method": "fp8", "modules_to_not_convert": ["re:mlp.*"]}
    assert width(**fields) == 1
    fields = {"quant_method": "fp8", "modules_to_not_convert": ["re:model.layers.1."]}
    kept = 3 / 12  # layers 1, 10 and 11
    assert width(**fields) == pytest.approx(kept * 2 + (1 - kept), rel=1e-12)


def test_a_tied_head_is_no_matrix_of_its_own() -> None:
    fields = compressed(group(**FP8), ignore=[])
    found = widths(tie_word_embeddings=True, quantization_config=fields)
    assert found.weight == 1


def test_of_two_groups_the_first_that_names_a_matrix_counts() -> None:
    fields = compressed(group(**FP8), group(["re:.*self_attn.*"], **INT4))
    assert width(**fields) == 1


def test_two_groups_of_widths() -> None:
    fields = compressed(group(["re:.*self_attn.*"], **FP8), group(**INT4))
    want = ATTENTION * 1 + (1 - ATTENTION) * (4 + 16 / 128) / 8
    assert width(**fields) == pytest.approx(want, rel=1e-12)


def test_the_matrices_of_opt() -> None:
    sizes = {"ffn_dim": 16, "tie_word_embeddings": True}
    fields = {"quant_method": "gptq", "bits": 8, "group_size": -1}
    fields["modules_to_not_convert"] = ["fc1"]
    got = widths(
        **sizes, model_type="opt", num_key_value_heads=2, quantization_config=fields
    )
    # 4 x 16 of attention and 2 x 64 of the MLP.
    assert got.weight == pytest.approx((64 * 2 + 128) / 192, rel=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"quant_method": "aqlm"}, "quant_method: expected one of .*, got 'aqlm'"),
        ({"bits": 4}, "quant_method: expected one of .*, got ''"),
        ({"quant_method": "awq"}, "bits: expected a whole number, got None"),
        ({"quant_method": "gptq", "bits": 5}, "bits: expected 2, 3, 4 or 8, got 5"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm": {}}},
            "dynamic: expected no widths by module",
        ),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, "a quantised lm_head"),
        (compressed(group(**FP8), ignore=[]), "a quantised lm_head is not modelled"),
        (compressed(), "config_groups: expected objects with targets and weights"),
        (
            compressed(group(**FP8), sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config: expected dense weights, got 'sparse-24-bitmask'",
        ),
        (compressed(group(**FP8), format="marlin-24"), "expected dense weights"),
        ({"quant_method": "gptq", "bits": 6}, "bits: expected 2, 3, 4 or 8, got 6"),
        ({"quant_method": "gptq", "bits": True}, "bits: expected a whole number"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 0},
            "group_size: expected a whole number, got 0",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": 1, "load_in_8bit": 1},
            "load_in_4bit, load_in_8bit: expected one",
        ),
        (
            compressed(group(**FP8), transform_config={"config_groups": {"u": {}}}),
            "transform_config: expected none",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
            "quant_algo: expected one of .*, got 'MIXED_PRECISION'",
        ),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit, load_in_8bit: expected one"),
        (
            {"quant_method": "fp8", "weight_block_size": 128},
            "weight_block_size: expected two whole numbers, got 128",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 0]},
            "weight_block_size: expected two whole numbers, got",
        ),
    ],
)
def test_other_methods_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config: .*{message}"):
        width(**fields)


def test_quantization_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization_config: expected an object"):
        widths(quantization_config="fp8")


def test_its_older_name_and_unknown_fields() -> None:
    fields = {"quant_method": "fp8", "surprise": 1}
    settings = {"compression_config": fields}
    assert widths(**settings).weight == 1
    assert unknown_keys(settings) == ["quantization_config.surprise"]


@pytest.mark.parametrize(
    "settings, size",
    [
        ({}, 2),
        ({"torch_dtype": "float32"}, 4),
        ({"torch_dtype": None}, 2),
        ({"torch_dtype": "float16"}, 2),
        ({"torch_dtype": "float32", "kv_cache_dtype": "int8"}, 1),
        ({"kv_cache_dtype": "float32"}, 4),
        ({"kv_cache_dtype": "FP8_E5M2"}, 1),
        ({"kv_cache_dtype": "auto"}, 2),
        ({"kv_cache_dtype": "fp8_e4m3"}, 1),
        ({"quantization_config": {"kv_cache_scheme": None}}, 2),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, 1),
        (
            {
                "quantization_config": {
                    "kv_cache_scheme": {"num_bits": 8, "type": "int"}
                }
            },
            1,
        ),
        ({"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}}, 1),
        ({"quantization_config": {"kv_cache_quant_algo": None}}, 2),
        ({"quantization_config": {"kv_cache_dtype": "bfloat16"}}, 2),
    ],
)
def test_bytes_of_the_cache(settings: dict[str, Any], size: int) -> None:
    assert kv_bytes({**SETTINGS, **settings}) == size


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kv_cache_dtype": "turbo3"}, "kv_cache_dtype: expected one of .*'turbo3'"),
        (
            {"quantization_config": {"kv_cache_quant_algo": "NVFP4"}},
            "kv_cache_quant_algo: expected one of .*, got 'NVFP4'",
        ),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 4}}},
            "kv_cache_scheme: expected one of .*, got 'float4'",
        ),
        (
            {
                "kv_cache_dtype": "bfloat16",
                "quantization_config": {"kv_cache_quant_algo": "FP8"},
            },
            "KV cache: expected one width, got",
        ),
    ],
)
def test_other_caches_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_bytes({**SETTINGS, **settings})


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    "settings, scaled",
    [
        ({}, False),
        ({"quantization_config": {"quant_method": "fp8"}}, False),
        ({"quantization_config": BLOCKS}, True),
        ({"quantization_config": {"quant_method": "mxfp4"}}, False),
    ],
)
def test_activations_are_scaled_by_blocks_as_weights_are(
    settings: dict[str, Any], scaled: bool
) -> None:
    assert widths(**settings).block_scaled == scaled


@pytest.mark.parametrize(
    "precisions, scaled",
    [
        ({}, False),
        ({"gemm": "fp8", "experts": "fp8"}, False),
        ({"gemm": "fp8_block", "experts": "fp8_block"}, True),
        ({"gemm": "bf16", "experts": "fp8_block"}, True),
        ({"gemm": "fp8_block", "experts": "nvfp4"}, True),
    ],
)
def test_a_precision_says_whether_activations_are_scaled(
    precisions: dict[str, str], scaled: bool
) -> None:
    model = get_config("mixtral-8x7b")
    assert at_precision(model, **precisions).stored.block_scaled == scaled


def test_a_matmul_of_other_precisions_has_no_scales_of_the_file() -> None:
    model = get_config("deepseek-r1")
    assert model.stored.block_scaled
    assert not at_precision(model, gemm="bf16", experts="nvfp4").stored.block_scaled
    # Of its blocks of weights some are left.
    for other in ({"kv": "fp8"}, {"gemm": "bf16"}, {"experts": "nvfp4"}):
        assert at_precision(model, **other).stored.block_scaled


def test_matmuls_compute_as_those_of_most_weights_do() -> None:
    kept = {"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}
    assert widths(quantization_config=kept).matmul_bits == 8  # 192 of 240 weights
    kept = {"quant_method": "fp8", "modules_to_not_convert": ["mlp"]}
    assert widths(quantization_config=kept).matmul_bits == 16
