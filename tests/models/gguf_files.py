"""Small GGUF files with any metadata."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

# A Llama of 2 layers, and what the keys of its sizes are.
SIZES = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def write_gguf(
    path: pathlib.Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None = None,
) -> pathlib.Path:
    """Writes the keys that have a value; an int becomes uint32, a float float32."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_tensors(
    *, vocab: int, head_dim: int = 16, kv_heads: int = 1
) -> dict[str, np.ndarray]:
    """Those of `SIZES`, random."""
    rng, E, F, N = np.random.default_rng(0), 32, 48, 2
    blocks = {
        "attn_norm": (E,),
        "attn_q": (N * head_dim, E),
        "attn_k": (kv_heads * head_dim, E),
        "attn_v": (kv_heads * head_dim, E),
        "attn_output": (E, N * head_dim),
        "ffn_norm": (E,),
        "ffn_gate": (F, E),
        "ffn_up": (F, E),
        "ffn_down": (E, F),
    }
    shapes = {
        f"blk.{i}.{name}": shape for i in (0, 1) for name, shape in blocks.items()
    }
    shapes |= {"token_embd": (vocab, E), "output_norm": (E,)}
    return {
        f"{name}.weight": rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
