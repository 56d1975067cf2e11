"""Keys of config.json: read, without effect, refused, or named in a warning."""

from __future__ import annotations

from typing import Any

import pytest

from models import hf_config
from models.hf_config import expect_known, read_dtype, read_rope, read_sizes

# As in the config.json of meta-llama/Llama-2-7b-hf.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}


def unknown(**settings: Any) -> list[str]:
    return expect_known({**LLAMA, **settings}, ["llama", "mistral", "qwen2", "qwen3"])


def test_no_key_is_on_two_lists() -> None:
    lists = [hf_config._READ, hf_config._HARMLESS]
    lists += [*hf_config._REFUSED.values(), *hf_config._FACTORS.values()]
    keys = [key for of in lists for key in of.split()]
    assert sorted(keys) == sorted(set(keys))


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"num_experts": 128}, "a mixture of experts"),
        ({"n_routed_experts": 256}, "a mixture of experts"),
        ({"moe_intermediate_size": 768}, "a mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"qk_nope_head_dim": 128}, "latent attention"),
        ({"index_topk": 2048}, "sparse attention"),
        ({"linear_num_key_heads": 16}, "linear attention or a state-space layer"),
        ({"mamba_d_state": 128}, "linear attention or a state-space layer"),
        ({"add_cross_attention": True}, "cross attention"),
        ({"is_encoder_decoder": True}, "an encoder or another part"),
        ({"vision_config": {"hidden_size": 1}}, "an encoder or another part"),
        ({"text_config": {"hidden_size": 1}}, "an encoder or another part"),
        ({"num_nextn_predict_layers": 1}, "multi-token prediction"),
        ({"final_logit_softcapping": 30.0}, "a limit on logits"),
        ({"attn_logit_softcapping": 50.0}, "a limit on logits"),
        ({"partial_rotary_factor": 0.5}, "a rotation of a part of each head"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"attention_chunk_size": 8192}, "a window of attention"),
        ({"num_kv_shared_layers": 10}, "keys and values shared by layers"),
        ({"logits_scaling": 8.0}, "a factor on activations"),
        ({"pruned_heads": {"0": [1]}}, "a different block in each layer"),
        ({"use_qk_norm": True}, "a norm of queries and keys"),
    ],
)
def test_what_is_not_modelled_is_refused_by_its_key(
    settings: dict[str, Any], why: str
) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key}=.*: {why}.* is not modelled$"):
        unknown(**settings)


def test_all_refusals_are_in_one_message() -> None:
    message = (
        r"model_type: expected one of .*, got 'deepseek_v3'; "
        r"kv_lora_rank=512, q_lora_rank=1536: latent attention is not modelled; "
        r"n_routed_experts=256: a mixture of experts is not modelled"
    )
    with pytest.raises(ValueError, match=message):
        unknown(
            model_type="deepseek_v3",
            kv_lora_rank=512,
            q_lora_rank=1536,
            n_routed_experts=256,
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_local_experts": 0, "kv_lora_rank": None, "mlp_only_layers": []},
        {"is_encoder_decoder": False, "pruned_heads": {}, "vision_config": None},
        {"num_nextn_predict_layers": 0, "attn_logit_softcapping": None},
        {"partial_rotary_factor": 1.0, "logits_scaling": 1},
        {"layer_types": ["full_attention"] * 32},
        {"use_cache": True, "temperature": 0.6, "id2label": {"0": "LABEL_0"}},
        {"quantization_config": None, "attention_bias": False, "mlp_bias": False},
    ],
)
def test_what_has_no_effect_is_let_through(settings: dict[str, Any]) -> None:
    assert unknown(**settings) == []


@pytest.mark.parametrize(
    "settings, effective",
    [
        # mistralai/Mistral-7B-v0.1's, and v0.2's.
        ({"model_type": "mistral", "sliding_window": 4095}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "mistral", "sliding_window": 4096}, False),
        ({"sliding_window": 1024}, True),
        # Qwen/Qwen2.5-7B-Instruct's.
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": False,
                "sliding_window": 131_072,
                "max_window_layers": 28,
            },
            False,
        ),
        ({"model_type": "qwen2", "sliding_window": 1024}, False),  # its default: unused
        ({"use_sliding_window": False, "sliding_window": 1024}, False),
        ({"use_sliding_window": True, "sliding_window": 1024}, True),
        ({"use_sliding_window": True, "sliding_window": 8192}, False),
        ({"use_sliding_window": True, "sliding_window": None}, False),
        ({"model_type": "qwen3", "use_sliding_window": True}, True),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 1024,
                "max_window_layers": 31,
            },
            True,
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 1024,
                "max_window_layers": 32,
            },
            False,
        ),
        ({"sliding_window": 4096, "layer_types": ["sliding_attention"]}, False),
    ],
)
def test_a_window_counts_where_it_is_used_and_ends(
    settings: dict[str, Any], effective: bool
) -> None:
    if not effective:
        assert unknown(**settings) == []
        return
    with pytest.raises(ValueError, match="a window of attention is not modelled"):
        unknown(**settings)


def test_unknown_keys_come_back_sorted() -> None:
    assert unknown(zeta=1, alpha_beta=None, use_cache=True) == ["alpha_beta", "zeta"]
    many = [f"key_{letter}" for letter in "abcdefghij"]
    assert unknown(**dict.fromkeys(many, 1)) == many


@pytest.mark.parametrize(
    "settings, dtype",
    [
        ({}, None),
        ({"torch_dtype": None}, None),
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "float16"}, "float16"),
    ],
)
def test_the_dtype(settings: dict[str, Any], dtype: str | None) -> None:
    assert read_dtype(settings) == dtype


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"torch_dtype": "float64"}, "torch_dtype: expected one of .*, got 'float64'"),
        ({"dtype": "auto"}, "dtype: expected one of .*, got 'auto'"),
        (
            {"dtype": "float32", "torch_dtype": "float16"},
            "dtype and torch_dtype: expected the same, got",
        ),
    ],
)
def test_other_dtypes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dtype(settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_size": None}, "hidden_size: expected a whole number >= 1, got None"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers: expected .*, got '32'"),
        ({"num_key_value_heads": [4, 8]}, "num_key_value_heads: expected .*, got"),
        ({"vocab_size": 32_000.5}, "vocab_size: expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected .* got 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected .*, got True"),
        ({"intermediate_size": -1}, "intermediate_size: expected .*, got -1"),
        (
            {"word_embed_proj_dim": 8192},
            "word_embed_proj_dim: expected hidden_size=4096, got 8192",
        ),
        (
            {"word_embed_proj_dim": 512},
            "word_embed_proj_dim: expected hidden_size=4096",
        ),
    ],
)
def test_bad_sizes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sizes({**LLAMA, **settings})


def test_sizes_that_are_left_out_follow_from_others() -> None:
    settings = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    sizes = read_sizes({**settings, "head_dim": None})
    assert (sizes.kv_heads, sizes.head_dim, sizes.tie_embeddings) == (32, 128, False)
    assert read_sizes({**LLAMA, "head_dim": 64}).head_dim == 64


def test_opt_has_names_and_a_default_of_its_own() -> None:
    sizes = {**LLAMA, "model_type": "opt", "ffn_dim": 7, "word_embed_proj_dim": 4096}
    found = read_sizes(sizes)
    assert (found.mlp, found.tie_embeddings) == (7, True)
    assert not read_sizes({**sizes, "tie_word_embeddings": False}).tie_embeddings
    assert read_sizes({**LLAMA, "tie_word_embeddings": True}).tie_embeddings


def test_every_size_is_read_from_its_own_key() -> None:
    settings = {
        "model_type": "llama",
        "hidden_size": 60,
        "intermediate_size": 7,
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "num_key_value_heads": 3,
        "vocab_size": 11,
    }
    assert read_sizes(settings)._asdict() == {
        **{"layers": 5, "embed": 60, "q_heads": 6, "kv_heads": 3, "head_dim": 10},
        **{"mlp": 7, "vocab_size": 11, "tie_embeddings": False},
    }


def test_the_base_of_rotary_frequencies() -> None:
    assert read_rope({}) == {"rope_theta": 10_000.0}
    assert read_rope({"rope_theta": 5e5, "rope_scaling": None})["rope_theta"] == 5e5
