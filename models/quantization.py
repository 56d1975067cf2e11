"""Bytes of the weights and of the KV cache of quantised Hugging Face models. No JAX.

A method sets the width of a weight and the matrices it leaves out. Scales and zero
points are counted if at most 1,024 weights share them. Those of whole rows, matrices
and blocks of 128 x 128 are under 0.1 % of the weights, as norms are. Embeddings and
unembeddings stay as wide as activations.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from models.hf_config import DTYPE_BYTES, Settings, Sizes, read_dtype
from models.model_config import ModelConfig

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
_KNOWN = {*_READ.split(), *_HARMLESS.split(), *_KEPT}

Bits = Callable[[str], float | None]  # name of a matrix -> bits of a weight; None: kept


_BLOCK_FP8 = 8 + 32 / 128**2  # a float32 scale for a block of 128 x 128 weights
# By name: bits of a weight with its part of the scales, and bits that a matmul computes
# in. MXFP4 and INT4 are of weights alone: activations stay at 16 bits.
PRECISIONS: Mapping[str, tuple[float, int]] = {
    "bf16": (16, 16),
    "fp8": (8, 8),
    "fp8_block": (_BLOCK_FP8, 8),
    "nvfp4": (4 + 8 / 16, 4),  # an 8-bit scale for 16 weights
    "mxfp4": (4 + 8 / 32, 16),  # an 8-bit scale for 32 weights
    "int4_wo": (4 + 16 / 32, 16),  # a 16-bit scale for 32 weights
}


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
    if kv not in (None, "bf16", "fp8"):
        raise ValueError(f"kv: expected bf16 or fp8, got {kv!r}")
    widths = dataclasses.replace(
        had,
        weight=weight,
        matmul_bits=bits,
        expert_weight=expert_weight,
        expert_matmul_bits=expert_bits,
        kv=had.kv if kv is None else {"bf16": 2, "fp8": 1}[kv],
    )
    return dataclasses.replace(model, widths=widths)


def _precision(part: str, name: str) -> tuple[float, int]:
    if name not in PRECISIONS:
        raise ValueError(f"{part}: expected one of {[*PRECISIONS]}, got {name!r}")
    bits, matmul_bits = PRECISIONS[name]
    return bits / 8, matmul_bits


def unknown_keys(settings: Settings) -> list[str]:
    """Return the keys of `quantization_config` that are on no list."""
    unknown = set(_fields(settings)) - _KNOWN
    return sorted(f"quantization_config.{key}" for key in unknown)


def activation_bytes(settings: Settings) -> int:
    """Return the bytes of an activation or an unquantised weight, by default 2."""
    return DTYPE_BYTES[read_dtype(settings) or "bfloat16"]


def weight_bytes(settings: Settings, sizes: Sizes) -> float:
    """Return the mean bytes of a weight in the blocks' matrices, scales included.

    Raises:
      ValueError: naming the feature that is unknown or not modelled.
    """
    fields, wide = _fields(settings), activation_bytes(settings)
    if not fields:
        return wide
    kept = [pattern for key in _KEPT for pattern in fields.get(key) or ()]
    bits_of = _bits_of(fields)
    head = None if _matches("lm_head", kept) else bits_of("lm_head")
    if head is not None and not sizes.tie_embeddings:
        raise ValueError("quantization_config: a quantised lm_head is not modelled")
    total, weights = 0.0, 0
    for name, size in _matrices(settings, sizes):
        bits = None if _matches(name, kept) else bits_of(name)
        total += size * (wide if bits is None else bits / 8)
        weights += size
    return total / weights


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


def _matrices(settings: Settings, sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Yield the name of every matrix in a block, and its number of weights."""
    opt = settings["model_type"] == "opt"
    query = sizes.embed * sizes.q_heads * sizes.head_dim
    kv, mlp = query // sizes.q_heads * sizes.kv_heads, sizes.embed * sizes.mlp
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out = "self_attn.out_proj" if opt else "self_attn.o_proj"
    gated = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = (*attention, out, *(("fc1", "fc2") if opt else gated))
    for layer in range(sizes.layers):
        at = f"model.{'decoder.' if opt else ''}layers.{layer}"
        for name, size in zip(
            names, (query, kv, kv, query, mlp, mlp, mlp), strict=False
        ):
            yield f"{at}.{name}", size


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


def _bits_of(fields: Mapping[str, Any]) -> Bits:
    method = fields.get("quant_method") or (
        "modelopt" if "quant_algo" in fields else ""
    )
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    if method not in _METHODS:
        known = sorted((*_METHODS, "compressed-tensors"))
        raise _refusal("quant_method", f"one of {known}", method)
    bits = _METHODS[method](fields)
    has_head = bool(fields.get("lm_head"))
    return lambda name: None if name == "lm_head" and not has_head else bits


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


def _gptq(fields: Mapping[str, Any]) -> float:
    """Return GPTQ's and AWQ's bits: each group has a 16-bit scale and a zero point."""
    bits = _integer(fields, "bits")
    if bits not in (2, 3, 4, 8):
        raise _refusal("bits", "2, 3, 4 or 8", bits)
    if fields.get("dynamic"):
        raise _refusal("dynamic", "no widths by module", fields["dynamic"])
    return _grouped(bits, 16 + bits, _integer(fields, "group_size", 128))


def _bitsandbytes(fields: Mapping[str, Any]) -> float:
    four, eight = (bool(fields.get(key)) for key in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise _refusal("load_in_4bit, load_in_8bit", "one of them", (four, eight))
    # A float32 scale for 64 weights, or 8 bits of one and a float32 for 256 scales.
    double = fields.get("bnb_4bit_use_double_quant")
    return 8 if eight else _grouped(4, 8 + 32 / 256 if double else 32, 64)


def _modelopt(fields: Mapping[str, Any]) -> float:
    algorithm = fields.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise _refusal("quant_algo", f"one of {sorted(_ALGORITHMS)}", algorithm)
    bits, shared, group = _ALGORITHMS[algorithm]
    return _grouped(bits, shared, _integer(fields, "group_size", group))


def _compressed_tensors(fields: Mapping[str, Any]) -> Bits:
    sparse = (fields.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or "24" in str(fields.get("format")):
        raise _refusal("sparsity_config", "dense weights", sparse)
    if fields.get("transform_config"):
        raise _refusal("transform_config", "none", fields["transform_config"])
    groups = fields.get("config_groups") or {}
    if not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refusal("config_groups", "objects with targets and weights", groups)
    rules = [
        (group.get("targets") or ("Linear",), _scheme_bits(group.get("weights")))
        for group in groups.values()
    ]

    def bits_of(name: str) -> float | None:
        for targets, bits in rules:
            if "Linear" in targets or _matches(name, targets):
                return bits
        return None

    return bits_of


def _scheme_bits(scheme: Mapping[str, Any] | None) -> float | None:
    """Return the bits of a weight by compressed-tensors; None: it is not quantised."""
    if not scheme:
        return None
    bits = _integer(scheme, "num_bits")
    # The scales of NVFP4 and MXFP4 have 8 bits.
    shared = 8 if scheme.get("type") == "float" and bits == 4 else 16
    if scheme.get("symmetric") is False:
        shared += bits
    return _grouped(bits, shared, scheme.get("group_size"))


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "fp8": lambda _: 8,
    "fbgemm_fp8": lambda _: 8,
    "mxfp4": lambda _: _grouped(4, 8, 32),
    "nvfp4": lambda _: _grouped(4, 8, 16),
    "awq": _gptq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
# Model Optimizer: bits of a weight, bits of a group's scale, weights of a group.
_ALGORITHMS = {
    "FP8": (8, 0, -1),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, 0, -1),
    "FP8_PB_WO": (8, 0, -1),
    "W8A8_SQ_PER_CHANNEL": (8, 0, -1),
    "NVFP4": (4, 8, 16),
    "MXFP4": (4, 8, 32),
    "W4A16_AWQ": (4, 16, 128),
    "W4A8_AWQ": (4, 16, 128),
}
_KV_BYTES = {
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "float8", "int8"), 1),
    **DTYPE_BYTES,
}
