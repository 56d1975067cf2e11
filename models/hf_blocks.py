"""The layers that a Hugging Face config.json describes, for cost models. No JAX.

Dense families may have windows of attention. Mixtures of experts may also have latent
or linear attention. Left out of them: layers of multi-token prediction (a draft's, not
run by a plain decode), limits on activations, biases and norms.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
from typing import TypeAlias

from models import hf_config
from models.blocks import (
    AnyAttention,
    AnyMLP,
    Attention,
    Block,
    DenseMLP,
    ExpertMLP,
    LatentAttention,
    LinearAttention,
)
from models.hf_config import Settings, read_size

Layer: TypeAlias = tuple[AnyAttention, AnyMLP]

_DENSE = ("llama", "mistral", "qwen2", "qwen3", "opt")
_MIXTURES = (
    *("mixtral", "qwen3_moe", "gpt_oss", "minimax_m2", "deepseek_v3", "kimi_k2"),
    "qwen3_5_moe_text",
)
# Models of text and images; the part for text is within.
_WRAPPERS = ("kimi_k25", "qwen3_5_moe")
_WRAPPER_READ = ("text_config", "vision_config")
# Keys that are refused elsewhere.
_DENSE_READ = ("sliding_window", "use_sliding_window", "layer_types")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MIXTURE_READ = (
    *_DENSE_READ,
    *_EXPERTS,
    *"""
    n_shared_experts num_experts_per_tok experts_per_token moe_intermediate_size
    shared_intermediate_size shared_expert_intermediate_size first_k_dense_replace
    mlp_only_layers
    kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim
    linear_conv_kernel_dim linear_num_key_heads linear_num_value_heads
    linear_key_head_dim linear_value_head_dim full_attention_interval attn_type_list
    attn_output_gate
    """.split(),
    # Without effect on the time of a step.
    *"""
    num_nextn_predict_layers use_mtp num_mtp_modules mtp_num_hidden_layers
    mtp_transformer_layers swiglu_limit rotary_dim partial_rotary_factor use_qk_norm
    rope_interleave
    """.split(),
)


def text_settings(settings: Settings) -> tuple[Settings, list[str]]:
    """Return the settings of the part for text, and all keys that are unknown.

    Raises:
      ValueError: naming all features that no cost model knows.
    """
    unknown: list[str] = []
    if settings.get("model_type") in _WRAPPERS:
        text = settings.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"text_config: expected an object, got {text!r}")
        unknown = hf_config.expect_known(settings, _WRAPPERS, read=_WRAPPER_READ)
        outer = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
        settings = {key: settings[key] for key in outer if key in settings} | {**text}
    dense = settings.get("model_type") in _DENSE
    read = _DENSE_READ if dense else _MIXTURE_READ
    unknown += hf_config.expect_known(
        settings, (*_DENSE, *_MIXTURES, *_WRAPPERS), read=read
    )
    return settings, unknown


def read_layers(settings: Settings) -> list[Layer]:
    """Read attention and MLP of each layer, from first to last.

    Raises:
      ValueError: naming a key that is missing, no size or not modelled.
    """
    layers = range(read_size(settings, "num_hidden_layers"))
    kinds = _kinds(settings, len(layers))
    attention = {kind: _attention(settings, kind) for kind in sorted({*kinds})}
    dense = _dense_layers(settings, layers)
    mlp = {
        is_dense: _mlp(settings, is_dense) for is_dense in {i in dense for i in layers}
    }
    return [(attention[kinds[i]], mlp[i in dense]) for i in layers]


def is_dense(kinds: Collection[Block]) -> bool:
    """Return whether the fields of a dense `ModelConfig` say all of the blocks."""
    if len(kinds) > 1:
        return False
    (block,) = kinds
    plain = isinstance(block.attention, Attention) and not block.attention.gated
    dense = isinstance(block.mlp, DenseMLP)
    return plain and dense and block.attention.window is None


def blocks(layers: Collection[Layer]) -> tuple[Block, ...]:
    """Return the kinds of `layers`, each with its number."""
    counts = collections.Counter(layers)
    return tuple(
        Block(count=count, attention=attention, mlp=mlp)
        for (attention, mlp), count in counts.items()
    )


def _kinds(settings: Settings, layers: int) -> list[str]:
    """Return the kind of attention of each layer, by the names of `layer_types`."""
    kinds = settings.get("layer_types")
    if kinds is None:
        interval = settings.get("full_attention_interval") or 1
        linear = "linear_attention" if interval > 1 else "full_attention"
        window = hf_config.has_window(settings)
        first = settings.get("max_window_layers") or 0
        whole = [
            "sliding_attention" if window and i >= first else "full_attention"
            for i in range(layers)
        ]
        return [whole[i] if (i + 1) % interval == 0 else linear for i in range(layers)]
    known = {"full_attention", "sliding_attention", "linear_attention"}
    if len(kinds) != layers or not {*kinds} <= known:
        expected = f"layer_types: expected {layers} of {sorted(known)}"
        raise ValueError(f"{expected}, got {len(kinds)} of {sorted({*kinds})}")
    return list(kinds)


def _attention(settings: Settings, kind: str) -> AnyAttention:
    embed = read_size(settings, "hidden_size")
    if kind == "linear_attention":
        return LinearAttention(
            embed=embed,
            key_heads=read_size(settings, "linear_num_key_heads"),
            value_heads=read_size(settings, "linear_num_value_heads"),
            key_dim=read_size(settings, "linear_key_head_dim"),
            value_dim=read_size(settings, "linear_value_head_dim"),
            kernel=read_size(settings, "linear_conv_kernel_dim"),
        )
    if {*(settings.get("attn_type_list") or ())} - {1}:
        raise ValueError("attn_type_list: expected 1, attention to all tokens, alone")
    heads = read_size(settings, "num_attention_heads")
    window = None
    if kind == "sliding_attention" and not hf_config.exceeds_context(settings):
        window = read_size(settings, "sliding_window")
    if settings.get("kv_lora_rank") is None:
        return Attention(
            embed=embed,
            q_heads=heads,
            kv_heads=read_size(settings, "num_key_value_heads", heads),
            head_dim=read_size(settings, "head_dim", embed // heads),
            window=window,
            gated=bool(settings.get("attn_output_gate")),
        )
    if window:
        raise ValueError("sliding_window: a window of latent attention is not modelled")
    has_rank = settings.get("q_lora_rank") is not None
    return LatentAttention(
        embed=embed,
        heads=heads,
        q_rank=read_size(settings, "q_lora_rank") if has_rank else None,
        kv_rank=read_size(settings, "kv_lora_rank"),
        nope_dim=read_size(settings, "qk_nope_head_dim"),
        rope_dim=read_size(settings, "qk_rope_head_dim"),
        value_dim=read_size(settings, "v_head_dim"),
    )


def _dense_layers(settings: Settings, layers: range) -> Collection[int]:
    """Return the layers whose MLP has no experts."""
    if settings["model_type"] in _DENSE:
        return layers
    for key in ("moe_layer_freq", "decoder_sparse_step"):
        if settings.get(key, 1) != 1:
            raise ValueError(f"{key}: expected 1, got {settings[key]!r}")
    first = settings.get("first_k_dense_replace") or 0
    return {*range(first), *(settings.get("mlp_only_layers") or ())}


def _mlp(settings: Settings, is_dense: bool) -> AnyMLP:
    embed, opt = read_size(settings, "hidden_size"), settings["model_type"] == "opt"
    if is_dense:
        width = read_size(settings, "ffn_dim" if opt else "intermediate_size")
        return DenseMLP(embed=embed, width=width, matrices=2 if opt else 3)
    key = next((key for key in _EXPERTS if key in settings), _EXPERTS[0])
    has_width = settings.get("moe_intermediate_size") is not None
    width = read_size(
        settings, "moe_intermediate_size" if has_width else "intermediate_size"
    )
    return ExpertMLP(
        embed=embed,
        width=width,
        experts=read_size(settings, key),
        active=read_size(settings, "num_experts_per_tok"),
        shared_width=_shared_width(settings, width),
    )


def _shared_width(settings: Settings, width: int) -> int:
    """Return the width of the experts of all tokens together."""
    if settings.get("n_shared_experts"):
        return width * read_size(settings, "n_shared_experts")
    keys = ("shared_expert_intermediate_size", "shared_intermediate_size")
    return next((read_size(settings, key) for key in keys if settings.get(key)), 0)
