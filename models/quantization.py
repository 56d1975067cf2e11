"""Bytes of the weights and of the KV cache of quantised models. No JAX.

A method sets the width of a weight, the bits that a matmul with it computes in, and the
matrices it leaves out. Scales and zero points are counted if blocks or at most 1,024
weights share them. Those of whole rows and matrices are under 0.1 % of the weights, as
norms are. Embeddings and unembeddings stay as wide as activations.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from models.blocks import Attention, ExpertMLP, LatentAttention
from models.hf_blocks import Layer
from models.hf_config import DTYPE_BYTES, Settings, read_dtype
from models.model_config import ModelConfig, Widths

QUANTIZATION = "hf_quant_config.json"  # where NVIDIA's Model Optimizer writes it

_KEPT = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "exclude_modules",
    "llm_int8_skip_modules",
)
_READ = """
    quant_method bits group_size lm_head config_groups format sparsity_config
    transform_config quant_algo kv_cache_scheme kv_cache_quant_algo kv_cache_dtype
    load_in_8bit load_in_4bit bnb_4bit_use_double_quant dynamic quantization
    weight_block_size
"""
# Calibration of a method and treatment of activations: no byte of a weight.
_HARMLESS = """
    activation_scheme fmt scale_fmt version zero_point sym desc_act true_sequential
    static_groups damp_percent dataset tokenizer model_seqlen block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id use_exllama
    exllama_config max_input_length use_cuda_fp16 cache_block_outputs
    modules_in_block_to_quantize checkpoint_format meta quantizer pack_dtype
    model_name_or_path model_file_base_name is_marlin_format backend do_fuse
    modules_to_fuse fuse_max_seq_len activation_scale_ub quantization_status
    global_compression_ratio producer modelopt_version dequantize
    bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_quant_storage
    llm_int8_threshold llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
    _load_in_8bit _load_in_4bit has_zero_point pre_quant_scale
"""
_GATED = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
_KNOWN = {*_READ.split(), *_HARMLESS.split(), *_KEPT}

# Of published files; copies of them may lack the list.
_KEPT_BY_FAMILY = {
    "gpt_oss": ("self_attn", "mlp.router", "lm_head"),
    "kimi_k2": (
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ),
}


class Precision(NamedTuple):
    """The precision of a matrix."""

    bits: float  # of a weight, with its part of the scales
    matmul_bits: int = 16  # that a matmul computes in: 16, 8 or 4


_BLOCK_FP8 = 8 + 32 / 128**2  # a float32 scale for a block of 128 x 128 weights
# INT4 is of weights alone: activations stay at 16 bits.
PRECISIONS: Mapping[str, Precision] = {
    "bf16": Precision(16),
    "fp8": Precision(8, 8),
    "fp8_block": Precision(_BLOCK_FP8, 8),
    "nvfp4": Precision(4 + 8 / 16, 4),  # an 8-bit scale for 16 weights
    "mxfp4": Precision(4 + 8 / 32, 4),  # an 8-bit scale for 32 weights
    "int4_wo": Precision(4 + 16 / 32),  # a 16-bit scale for 32 weights
}

Rule = Callable[[str], Precision | None]  # of a matrix by its name; None: kept


def at_precision(
    model: ModelConfig,
    *,
    gemm: str | None = None,
    experts: str | None = None,
    kv: str | None = None,
) -> ModelConfig:
    """Return the model with other precisions; tables and activations keep theirs.

    Args:
      model: one whose widths hold where nothing else is given.
      gemm: of the layers' weights but experts: a key of `PRECISIONS`.
      experts: of the weights of experts that a router chooses from, likewise.
      kv: of cached keys and values: bf16 or fp8.

    Raises:
      ValueError: naming the precisions, if there is no such one.
    """
    had = model.stored
    weight, bits = had.weight, had.matmul_bits
    expert_weight, expert_bits = had.experts, had.expert_matmul_bits
    if gemm is not None:
        weight, bits = _precision("gemm", gemm)
    if experts is not None:
        expert_weight, expert_bits = _precision("experts", experts)
    routed = any(block.mlp.routed_params for block in model.blocks)
    kept = gemm is None or (experts is None and routed)  # a precision that it had
    if kv not in (None, "bf16", "fp8"):
        raise ValueError(f"kv: expected bf16 or fp8, got {kv!r}")
    widths = dataclasses.replace(
        had,
        weight=weight,
        matmul_bits=bits,
        expert_weight=expert_weight,
        expert_matmul_bits=expert_bits,
        block_scaled="fp8_block" in (gemm, experts) or (had.block_scaled and kept),
        kv=had.kv if kv is None else {"bf16": 2, "fp8": 1}[kv],
    )
    return dataclasses.replace(model, widths=widths)


def _precision(part: str, name: str) -> tuple[float, int]:
    if name not in PRECISIONS:
        raise ValueError(f"{part}: expected one of {[*PRECISIONS]}, got {name!r}")
    found = PRECISIONS[name]
    return found.bits / 8, found.matmul_bits


def unknown_keys(settings: Settings) -> list[str]:
    """Return the keys of `quantization_config` that are on no list."""
    unknown = set(_fields(settings)) - _KNOWN
    return sorted(f"quantization_config.{key}" for key in unknown)


def activation_bytes(settings: Settings) -> int:
    """Return the bytes of an activation or an unquantised weight, by default 2."""
    return DTYPE_BYTES[read_dtype(settings) or "bfloat16"]


def read_widths(settings: Settings, layers: Sequence[Layer]) -> Widths:
    """Read the mean bytes of a weight, scales included, and the bytes of the rest.

    Raises:
      ValueError: naming the feature that is unknown or not modelled.
    """
    wide, kv = activation_bytes(settings), kv_bytes(settings)
    fields = _fields(settings)
    if not fields:
        return Widths(weight=wide, table=wide, kv=kv, activation=wide)
    kept, rule = _kept(settings, fields), _rule(fields)
    head = None if _matches("lm_head", kept) else rule("lm_head")
    tied = settings.get("tie_word_embeddings", settings["model_type"] == "opt")
    if head is not None and not tied:
        raise ValueError("quantization_config: a quantised lm_head is not modelled")
    # Weights at each precision: of experts behind a router, and of the others.
    counts = {True: collections.Counter(), False: collections.Counter()}
    for name, size, routed in _matrices(settings, layers):
        found = None if _matches(name, kept) else rule(name)
        counts[routed][found or Precision(8 * wide)] += size
    weight, bits = _mean(counts[False])
    widths = Widths(
        weight=weight,
        table=wide,
        kv=kv,
        activation=wide,
        matmul_bits=bits,
        block_scaled="weight_block_size" in fields,
    )
    if not counts[True]:
        return widths
    weight, bits = _mean(counts[True])
    return dataclasses.replace(widths, expert_weight=weight, expert_matmul_bits=bits)


def _mean(counts: Mapping[Precision, int]) -> tuple[float, int]:
    """Return the mean bytes of a weight, and the bits that most compute in."""
    bits = sum(found.bits * size for found, size in counts.items())
    most = max(counts, key=lambda found: counts[found])
    return bits / 8 / sum(counts.values()), most.matmul_bits


def _kept(settings: Settings, fields: Mapping[str, Any]) -> list[str]:
    """Return the patterns of the matrices that are not quantised."""
    if not any(key in fields for key in _KEPT):
        return [*_KEPT_BY_FAMILY.get(settings["model_type"], ())]
    kept = [pattern for key in _KEPT for pattern in fields.get(key) or ()]
    # The part for text of a model of text and images.
    return [pattern.replace("language_model.", "") for pattern in kept]


def kv_bytes(settings: Settings) -> int:
    """Return the bytes of one cached key or value element.

    Raises:
      ValueError: if there are two widths, or the width is not modelled.
    """
    fields = _fields(settings)
    given = {
        key: value
        for key, value in {
            "kv_cache_scheme": fields.get("kv_cache_scheme"),
            "kv_cache_quant_algo": fields.get("kv_cache_quant_algo"),
            "quantization_config.kv_cache_dtype": fields.get("kv_cache_dtype"),
            "kv_cache_dtype": settings.get("kv_cache_dtype"),
        }.items()
        if value not in (None, "auto")
    }
    widths = {_kv_width(key, value) for key, value in given.items()}
    if len(widths) > 1:
        raise ValueError(f"KV cache: expected one width, got {given}")
    return widths.pop() if widths else activation_bytes(settings)


def _kv_width(key: str, value: Any) -> int:
    if isinstance(value, Mapping):
        value = f"{value.get('type', 'float')}{value.get('num_bits')}"
    width = _KV_BYTES.get(str(value).lower())
    if width is None:
        raise ValueError(f"{key}: expected one of {sorted(_KV_BYTES)}, got {value!r}")
    return width


def _fields(settings: Settings) -> dict[str, Any]:
    """Return `quantization_config` by either name; NVIDIA nests it once more."""
    found = [settings.get(key) for key in ("quantization_config", "compression_config")]
    fields = next((value for value in found if value), {})
    if not isinstance(fields, Mapping):
        raise ValueError(f"quantization_config: expected an object, got {fields!r}")
    return {**fields, **(fields.get("quantization") or {})}


def _matrices(
    settings: Settings, layers: Sequence[Layer]
) -> Iterator[tuple[str, int, bool]]:
    """Yield each matrix: its name, its weights, and whether a router chooses it.

    All experts of a layer come as the first. Routers are left out: they are under 1 %
    of a layer's other weights.
    """
    family = settings["model_type"]
    for i, layer in enumerate(layers):
        at = f"model.{'decoder.' if family == 'opt' else ''}layers.{i}"
        for name, size in (*_attention(family, layer), *_mlp(family, layer)):
            yield f"{at}.{name}", size, ".experts." in name


def _attention(family: str, layer: Layer) -> Iterator[tuple[str, int]]:
    of, _ = layer
    if isinstance(of, Attention):
        head = of.embed * of.head_dim
        yield "self_attn.q_proj", head * of.q_heads * (2 if of.gated else 1)
        yield "self_attn.k_proj", head * of.kv_heads
        yield "self_attn.v_proj", head * of.kv_heads
        out = "out_proj" if family == "opt" else "o_proj"
        yield f"self_attn.{out}", head * of.q_heads
    elif isinstance(of, LatentAttention):
        query = of.heads * (of.nope_dim + of.rope_dim)
        if of.q_rank is None:
            yield "self_attn.q_proj", of.embed * query
        else:
            yield "self_attn.q_a_proj", of.embed * of.q_rank
            yield "self_attn.q_b_proj", of.q_rank * query
        yield "self_attn.kv_a_proj_with_mqa", of.embed * of.kv_values_per_token
        expanded = of.heads * (of.nope_dim + of.value_dim)
        yield "self_attn.kv_b_proj", of.kv_rank * expanded
        yield "self_attn.o_proj", of.heads * of.value_dim * of.embed
    else:
        keys, values = of.key_heads * of.key_dim, of.value_heads * of.value_dim
        yield "linear_attn.in_proj_qkv", of.embed * (2 * keys + values)
        yield "linear_attn.in_proj_z", of.embed * values
        yield "linear_attn.in_proj_b", of.embed * of.value_heads
        yield "linear_attn.in_proj_a", of.embed * of.value_heads
        yield "linear_attn.out_proj", values * of.embed


def _mlp(family: str, layer: Layer) -> Iterator[tuple[str, int]]:
    _, of = layer
    if not isinstance(of, ExpertMLP):
        names = ("fc1", "fc2") if family == "opt" else [f"mlp.{n}" for n in _GATED]
        for name in names:
            yield name, of.embed * of.width
        return
    mixtral = family in ("mixtral", "minimax_m2")  # in both by the names of the former
    block, names = ("block_sparse_moe", _MIXTRAL) if mixtral else ("mlp", _GATED)
    for name in names:
        yield f"{block}.experts.0.{name}", of.routed_params // of.matrices
        if of.shared_width:
            shared = "shared_expert" if family.startswith("qwen") else "shared_experts"
            yield f"{block}.{shared}.{name}", of.shared_params // of.matrices


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern means a module or a parent of it.

    Patterns are regular expressions after `re:`, shell patterns, or parts of a name.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif "*" in pattern:
            if any(fnmatch.fnmatchcase(name, p) for p in (pattern, f"{pattern}.*")):
                return True
        elif f".{pattern}." in f".{name}.":
            return True
    return False


# -- methods --------------------------------------------------------------------------


def _rule(fields: Mapping[str, Any]) -> Rule:
    method = fields.get("quant_method") or (
        "modelopt" if "quant_algo" in fields else ""
    )
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    if method not in _METHODS:
        known = sorted((*_METHODS, "compressed-tensors"))
        raise _refusal("quant_method", f"one of {known}", method)
    found = _METHODS[method](fields)
    has_head = bool(fields.get("lm_head"))
    return lambda name: None if name == "lm_head" and not has_head else found


def _refusal(key: str, expected: str, got: object) -> ValueError:
    return ValueError(f"quantization_config: {key}: expected {expected}, got {got!r}")


def _grouped(bits: float, shared_bits: float, group: int | None) -> float:
    """Return `bits` of a weight plus its part of the bits that a group shares."""
    return bits + (shared_bits / group if group and 0 < group <= 1024 else 0)


def _integer(fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = fields.get(key)
    value = default if value is None else value
    if type(value) is not int or value == 0:
        raise _refusal(key, "a whole number", value)
    return value


def _fp8(fields: Mapping[str, Any]) -> Precision:
    """Return FP8: with a float32 scale for each block, or for whole matrices."""
    block = fields.get("weight_block_size")
    if block is None:
        return PRECISIONS["fp8"]
    whole = isinstance(block, Sequence) and all(type(n) is int and n > 0 for n in block)
    if not whole or len(block) != 2:
        raise _refusal("weight_block_size", "two whole numbers", block)
    return Precision(8 + 32 / (block[0] * block[1]), 8)


def _gptq(fields: Mapping[str, Any]) -> Precision:
    """Return GPTQ and AWQ: each group has a 16-bit scale and a zero point."""
    bits = _integer(fields, "bits")
    if bits not in (2, 3, 4, 8):
        raise _refusal("bits", "2, 3, 4 or 8", bits)
    if fields.get("dynamic"):
        raise _refusal("dynamic", "no widths by module", fields["dynamic"])
    return Precision(_grouped(bits, 16 + bits, _integer(fields, "group_size", 128)))


def _bitsandbytes(fields: Mapping[str, Any]) -> Precision:
    four, eight = (bool(fields.get(key)) for key in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise _refusal("load_in_4bit, load_in_8bit", "one of them", (four, eight))
    # A float32 scale for 64 weights, or 8 bits of one and a float32 for 256 scales.
    double = fields.get("bnb_4bit_use_double_quant")
    if eight:
        return Precision(8, 8)
    return Precision(_grouped(4, 8 + 32 / 256 if double else 32, 64))


def _modelopt(fields: Mapping[str, Any]) -> Precision:
    algorithm = fields.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise _refusal("quant_algo", f"one of {sorted(_ALGORITHMS)}", algorithm)
    bits, shared, group, matmul_bits = _ALGORITHMS[algorithm]
    mean = _grouped(bits, shared, _integer(fields, "group_size", group))
    return Precision(mean, matmul_bits)


def _compressed_tensors(fields: Mapping[str, Any]) -> Rule:
    sparse = (fields.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or "24" in str(fields.get("format")):
        raise _refusal("sparsity_config", "dense weights", sparse)
    if fields.get("transform_config"):
        raise _refusal("transform_config", "none", fields["transform_config"])
    groups = fields.get("config_groups") or {}
    if not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refusal("config_groups", "objects with targets and weights", groups)
    rules = [
        (group.get("targets") or ("Linear",), _scheme(group))
        for group in groups.values()
    ]

    def rule(name: str) -> Precision | None:
        for targets, found in rules:
            if "Linear" in targets or _matches(name, targets):
                return found
        return None

    return rule


def _scheme(group: Mapping[str, Any]) -> Precision | None:
    """Return the precision by compressed-tensors; None: weights are not quantised."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if not weights:
        return None
    bits = _integer(weights, "num_bits")
    # The scales of NVFP4 and MXFP4 have 8 bits.
    shared = 8 if weights.get("type") == "float" and bits == 4 else 16
    if weights.get("symmetric") is False:
        shared += bits
    matmul_bits = _integer(activations, "num_bits") if activations else 16
    mean = _grouped(bits, shared, weights.get("group_size"))
    return Precision(mean, max(matmul_bits, bits))


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Precision]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda _: PRECISIONS["fp8"],
    "mxfp4": lambda _: PRECISIONS["mxfp4"],
    "nvfp4": lambda _: PRECISIONS["nvfp4"],
    "awq": _gptq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
# Model Optimizer: bits of a weight, bits of a group's scale, weights of a group, and
# bits that a matmul computes in ("A16": activations are not quantised).
_ALGORITHMS = {
    "FP8": (8, 0, -1, 8),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, 0, -1, 8),
    "FP8_PB_WO": (8, 0, -1, 8),
    "W8A8_SQ_PER_CHANNEL": (8, 0, -1, 8),
    "NVFP4": (4, 8, 16, 4),
    "MXFP4": (4, 8, 32, 16),
    "W4A16_AWQ": (4, 16, 128, 16),
    "W4A8_AWQ": (4, 16, 128, 8),
}
_KV_BYTES = {
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "float8", "int8"), 1),
    **DTYPE_BYTES,
}
