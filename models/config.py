"""The shape of a decoder-only transformer: numbers only, no JAX."""

from __future__ import annotations

import dataclasses
from typing import Literal

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama-style model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Raises:
      ValueError: if a size is not positive, `head_dim` is odd (rotary embedding pairs
        its halves), query heads do not divide into the kv heads, or the dtype is
        unknown.
    """

    name: str  # what a report calls it
    vocab_size: int  # tokens that have an embedding and a logit
    layers: int  # transformer blocks
    embed: int  # width of the residual stream
    q_heads: int  # query heads; a multiple of kv_heads
    kv_heads: int  # key and value heads; each serves q_heads / kv_heads query heads
    head_dim: int  # width of one head; even
    mlp: int  # hidden width of the SwiGLU MLP
    rope_theta: float  # base of the rotary frequencies
    norm_eps: float  # added to the mean square in RMSNorm
    tie_embeddings: bool  # whether the embedding also serves as the unembedding
    max_length: int  # context length in tokens: prompt and generated together
    dtype: Literal["float32", "bfloat16"]  # of weights, activations and KV cache

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "dtype", "tie_embeddings") and not value > 0:
                raise ValueError(f"{field.name}: expected > 0, got {value}")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads: expected a multiple of kv_heads={self.kv_heads}, "
                f"got {self.q_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.dtype not in _DTYPE_BYTES:
            raise ValueError(
                f"dtype: expected one of {sorted(_DTYPE_BYTES)}, got {self.dtype!r}"
            )

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight, activation or cache element."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in the cache, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def num_params(self) -> int:
        """Weights of the whole model; a tied embedding counts once."""
        attention = 2 * self.embed * (self.q_heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.embed * self.mlp + 2 * self.embed
        tables = 1 if self.tie_embeddings else 2
        return self.layers * layer + tables * self.vocab_size * self.embed + self.embed


PRESETS = {
    # Random weights. 264 = 256 bytes + 8 specials, see `ByteTokenizer`. Every width
    # divides by 4, so that it can be sharded 2 and 4 ways in tests.
    "tiny": ModelConfig(
        name="tiny",
        vocab_size=264,
        layers=2,
        embed=128,
        q_heads=8,
        kv_heads=4,
        head_dim=16,
        mlp=256,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        max_length=1024,
        dtype="float32",
    ),
    # Random weights. Large enough that a step's time on a CPU is work, not overhead.
    "m32": ModelConfig(
        name="m32",
        vocab_size=264,
        layers=4,
        embed=256,
        q_heads=8,
        kv_heads=8,
        head_dim=32,
        mlp=1024,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_length=512,
        dtype="float32",
    ),
    # Hugging Face HuggingFaceTB/SmolLM2-135M-Instruct, config.json. float32, because
    # bfloat16 is about 6 times slower on a CPU.
    "smollm2-135m": ModelConfig(
        name="smollm2-135m",
        vocab_size=49_152,
        layers=30,
        embed=576,
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_length=8192,
        dtype="float32",
    ),
    # Hugging Face meta-llama/Meta-Llama-3-8B, config.json.
    "llama-3-8b": ModelConfig(
        name="llama-3-8b",
        vocab_size=128_256,
        layers=32,
        embed=4096,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        max_length=8192,
        dtype="bfloat16",
    ),
}


def get_config(name: str) -> ModelConfig:
    """The preset called `name`.

    Raises:
      ValueError: naming the known presets, if there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"model: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
