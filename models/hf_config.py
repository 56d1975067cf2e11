"""The keys of Hugging Face's config.json, of which every one is accounted for.

The simulator and the engine check a model's keys here and nowhere else, so that neither
misses one that changes its sizes. Every key is read (`_READ`), without effect on a
dense decoder's sizes and results (`_HARMLESS`), refused where it has an effect
(`_REFUSED`), unless the caller reads it (`models.hf_blocks`, for cost models), or
unknown and named in a warning. No JAX.
"""

from __future__ import annotations

import functools
import multiprocessing
import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

Settings = Mapping[str, Any]  # of config.json

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_READ = """
    model_type vocab_size hidden_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim intermediate_size ffn_dim word_embed_proj_dim
    max_position_embeddings tie_word_embeddings dtype torch_dtype
    rms_norm_eps rope_theta rope_scaling rope_parameters
    hidden_act activation_function attention_bias mlp_bias enable_bias
    do_layer_norm_before layer_norm_elementwise_affine _remove_final_layer_norm
    sliding_window use_sliding_window max_window_layers layer_types
    decoder_sparse_step moe_layer_freq
    quantization_config compression_config kv_cache_dtype
    bos_token_id eos_token_id pad_token_id
"""
# Of training, of sampling, of files, or of parts that `_REFUSED` already names.
_HARMLESS = """
    _name_or_path architectures auto_map transformers_version torchscript
    _attn_implementation attn_implementation _attn_implementation_autoset
    _commit_hash unsloth_version unsloth_fixed
    use_cache use_bfloat16 tf_legacy_loss return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores chunk_size_feed_forward
    attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob
    activation_dropout dropout resid_pdrop embd_pdrop attn_pdrop layerdrop
    initializer_range init_std pretraining_tp gradient_checkpointing
    sep_token_id decoder_start_token_id image_token_id video_token_id
    vision_start_token_id vision_end_token_id media_placeholder_token_id
    video_placeholder ignore_index bos_token eos_token tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task id2label label2id num_labels
    task_specific_params problem_type is_decoder tie_encoder_decoder
    max_sequence_length initial_context_length original_max_position_embeddings
    norm_topk_prob output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux
    scoring_func topk_method topk_group n_group ep_size routed_scaling_factor
    use_routing_bias
    mamba_ssm_dtype indexer_rope_interleave
    mtp_use_dedicated_embeddings qk_norm_type use_unified_vision_chunk
"""
_REFUSED = {
    "a mixture of experts": """
        num_experts num_local_experts n_routed_experts n_shared_experts
        num_shared_experts moe_num_experts num_experts_per_tok experts_per_token
        num_experts_per_token moe_intermediate_size shared_intermediate_size
        shared_expert_intermediate_size expert_intermediate_size
        first_k_dense_replace mlp_only_layers ffn_config interleave_moe_layer_step
        moe moe_topk n_experts num_moe_experts expert_layer_period
        """,
    "latent attention": """
        kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim
        v_head_dim
        """,
    "sparse attention": "index_topk index_n_heads index_head_dim sparse_attention",
    "linear attention or a state-space layer": """
        linear_conv_kernel_dim linear_num_key_heads linear_num_value_heads
        linear_key_head_dim linear_value_head_dim linear_attn_config
        full_attention_interval attn_type_list state_size ssm_cfg mamba_d_state
        mamba_d_conv mamba_expand mamba_n_heads mamba_d_head mamba_num_heads
        mamba_head_dim ssm_state_size conv_kernel attn_layer_period
        hybrid_override_pattern layers_block_type attn_layer_indices
        """,
    "cross attention": """
        add_cross_attention cross_attention_hidden_size cross_attention_layers
        cross_attention_freq
        """,
    "an encoder or another part beside the decoder": """
        is_encoder_decoder encoder_layers encoder_attention_heads encoder_ffn_dim
        text_config vision_config audio_config speech_config video_config
        thinker_config talker_config language_config llm_config
        """,
    "multi-token prediction": """
        num_nextn_predict_layers use_mtp num_mtp_modules mtp_num_hidden_layers
        mtp_transformer_layers
        """,
    "a limit on logits or activations": """
        attn_logit_softcapping final_logit_softcapping logits_soft_cap
        attn_logit_softcap final_logit_softcap clip_qkv
        swiglu_limit
        """,
    "a window of attention": """
        attention_chunk_size sliding_window_pattern interleaved_sliding_window
        attention_window_size global_attn_every_n_layers
        """,
    "a rotation of a part of each head": "rotary_dim",
    "a gate on attention": "attn_output_gate",
    "a norm of queries and keys (but in qwen3)": "use_qk_norm qk_layernorm",
    "other positions": """
        alibi no_rope_layers no_rope_layer_interval use_mrope rope_interleave
        """,
    "a different block in each layer or parallel parts of one": """
        block_configs num_heads_per_layer parallel_attn use_parallel_residual
        pruned_heads hidden_size_per_layer_input
        """,
    "keys and values shared by layers": "num_kv_shared_layers use_cla",
}
# Refused unless 1.
_FACTORS = {
    "a rotation of a part of each head": """
        partial_rotary_factor rotary_pct rotary_percent
        """,
    "a factor on activations": """
        embedding_multiplier residual_multiplier logits_scaling attention_multiplier
        logit_scale scale_emb scale_depth
        """,
}
_WITHOUT_EFFECT = (None, False, 0, "", [], {})


def _by_key(reasons: Mapping[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


_REASONS, _FACTOR_REASONS = _by_key(_REFUSED), _by_key(_FACTORS)
_KNOWN = {*_READ.split(), *_HARMLESS.split(), *_REASONS, *_FACTOR_REASONS}


class Sizes(NamedTuple):
    """The sizes of a dense decoder, by this project's names."""

    layers: int
    embed: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab_size: int
    tie_embeddings: bool


def expect_known(
    settings: Settings, families: Collection[str], *, read: Collection[str] = ()
) -> list[str]:
    """Return the unknown keys, after checking that a dense decoder can have the others.

    Args:
      families: the values of `model_type` that the caller reads.
      read: keys that the caller reads although a dense decoder cannot have them.

    Raises:
      ValueError: naming all keys that it cannot have, and the feature of each.
    """
    keys: dict[str, list[str]] = {}
    for key, reason in _refused(settings):
        if key in read:
            continue
        keys.setdefault(reason, []).append(f"{key}={reprlib.repr(settings[key])}")
    wrong = [f"{', '.join(of)}: {why} is not modelled" for why, of in keys.items()]
    family = settings.get("model_type")
    if family not in families:
        expected = f"model_type: expected one of {sorted(families)}, got {family!r}"
        wrong = [expected, *wrong]
    if wrong:
        raise ValueError("; ".join(wrong))
    return sorted(set(settings) - _KNOWN)


@functools.cache  # some filters of Python's repeat a warning, and files are read again
def warn_of_unknown(where: str, keys: tuple[str, ...]) -> None:
    """Warn of unknown keys, once in a process and never in a child process."""
    if keys and multiprocessing.parent_process() is None:
        warnings.warn(f"{where}: ignores the unknown keys {[*keys]}", stacklevel=2)


def _refused(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the keys of features that a dense decoder lacks, with their names."""
    for key, value in settings.items():
        if key in _REASONS and value not in _WITHOUT_EFFECT:
            yield key, _REASONS[key]
        if key in _FACTOR_REASONS and value not in (None, 1):
            yield key, _FACTOR_REASONS[key]
    if has_window(settings):
        key = "sliding_window" if "sliding_window" in settings else "use_sliding_window"
        yield key, "a window of attention"
    for kind in sorted(set(settings.get("layer_types") or ()) - {"full_attention"}):
        if kind != "sliding_attention" or not exceeds_context(settings):
            yield "layer_types", kind


def has_window(settings: Settings) -> bool:
    """Return whether a layer's window of attention is shorter than the context."""
    used, layers = settings.get("use_sliding_window"), settings.get("num_hidden_layers")
    window = settings.get("sliding_window", used)  # Qwen has a default
    if used is None:  # Qwen's configs keep a window without using it
        used = not str(settings.get("model_type")).startswith("qwen")
    if not window or not used or exceeds_context(settings):
        return False
    # In Qwen only layers from `max_window_layers` on have a window.
    return (settings.get("max_window_layers") or 0) < (layers or 1)


def exceeds_context(settings: Settings) -> bool:
    """Return whether the window is at least as long as the context."""
    window, context = (
        settings.get(key) for key in ("sliding_window", "max_position_embeddings")
    )
    return isinstance(window, int) and isinstance(context, int) and window >= context


def read_sizes(settings: Settings) -> Sizes:
    """Read the sizes in config.json.

    Raises:
      ValueError: naming a key that is missing or no size.
    """
    opt = settings["model_type"] == "opt"
    embed = read_size(settings, "hidden_size")
    heads = read_size(settings, "num_attention_heads")
    projected = read_size(settings, "word_embed_proj_dim", embed)
    if projected != embed:  # opt-350m's
        expected = f"word_embed_proj_dim: expected hidden_size={embed}"
        raise ValueError(f"{expected}, got {projected}")
    return Sizes(
        layers=read_size(settings, "num_hidden_layers"),
        embed=embed,
        q_heads=heads,
        kv_heads=read_size(settings, "num_key_value_heads", heads),
        head_dim=read_size(settings, "head_dim", embed // heads),
        mlp=read_size(settings, "ffn_dim" if opt else "intermediate_size"),
        vocab_size=read_size(settings, "vocab_size"),
        tie_embeddings=bool(settings.get("tie_word_embeddings", opt)),
    )


def read_size(settings: Settings, key: str, default: int | None = None) -> int:
    """Read the size at `key`, by default `default`.

    Raises:
      ValueError: naming the key, if it is missing or no size.
    """
    value = settings.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}: expected a whole number >= 1, got {value!r}")
    return value


def read_dtype(settings: Settings) -> str | None:
    """Read the dtype of weights and activations, None if config.json has none.

    Raises:
      ValueError: if it is unknown, or `dtype` and `torch_dtype` differ.
    """
    given = {
        key: settings[key] for key in ("dtype", "torch_dtype") if settings.get(key)
    }
    for key, dtype in given.items():
        if dtype not in DTYPE_BYTES:
            expected = f"{key}: expected one of {sorted(DTYPE_BYTES)}"
            raise ValueError(f"{expected}, got {dtype!r}")
    if len(set(given.values())) > 1:
        raise ValueError(f"dtype and torch_dtype: expected the same, got {given}")
    return next(iter(given.values()), None)


def read_rope(settings: Settings) -> dict[str, Any]:
    """Gather the fields of the rotary embedding from all their places.

    transformers 5 moved the base of the frequencies into `rope_parameters`, formerly
    `rope_scaling`.

    Raises:
      ValueError: if two places contradict each other.
    """
    fields: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = settings.get(key) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{key}: expected an object, got {given!r}")
        _merge(fields, given)
    theta = settings.get("rope_theta")
    _merge(fields, {} if theta is None else {"rope_theta": theta})
    return {"rope_theta": 10_000.0, **fields}


def _merge(fields: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if fields.setdefault(key, value) != value:
            expected = f"{key}: expected the same wherever it is"
            raise ValueError(f"{expected}, got {fields[key]!r} and {value!r}")
