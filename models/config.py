"""The shape of a decoder-only transformer: numbers only, no JAX."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_KINDS = {
    "dtype": _DTYPE_BYTES,
    "norm": ("rms", "layer"),
    "positions": ("rotary", "learned"),
    "mlp_kind": ("swiglu", "relu"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder; what is left out makes it a Llama.

    OPT (Zhang et al. 2022): norm="layer", positions="learned", mlp_kind="relu", biases.
    Qwen3 (arXiv 2505.09388): qk_norm.

    Raises:
      ValueError: if a size is not positive, `head_dim` is odd (rotary embedding pairs
        its halves), query heads do not divide into the kv heads, a kind is unknown, or
        there is not one positive divisor for each rotary frequency.
    """

    name: str  # what a report calls it
    vocab_size: int  # tokens that have an embedding and a logit
    layers: int  # transformer blocks
    embed: int  # width of the residual stream
    q_heads: int  # query heads; a multiple of kv_heads
    kv_heads: int  # key and value heads; each serves q_heads / kv_heads query heads
    head_dim: int  # width of one head; even
    mlp: int  # hidden width of the MLP
    norm_eps: float  # added to the mean square, or to the variance, in a norm
    tie_embeddings: bool  # whether the embedding also serves as the unembedding
    max_length: int  # context length in tokens: prompt and generated together
    dtype: Literal["float32", "bfloat16"]  # of weights, activations and KV cache
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm, or LayerNorm with a bias
    positions: Literal["rotary", "learned"] = "rotary"  # of q and k, or added at first
    rope_theta: float = 10_000.0  # base of the rotary frequencies; else without effect
    rope_divisors: tuple[float, ...] | None = None  # of each frequency (see rope.py)
    rope_attention_factor: float = 1.0  # of every rotary sine and cosine
    mlp_kind: Literal["swiglu", "relu"] = "swiglu"  # three matrices, or two and a ReLU
    biases: bool = False  # whether every linear layer but the unembedding has one
    qk_norm: bool = False  # RMSNorm of each query and key head, before the rotation

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool | str | tuple | None) and not value > 0:
                raise ValueError(f"{field.name}: expected > 0, got {value}")
            if field.name in _KINDS and value not in _KINDS[field.name]:
                raise ValueError(
                    f"{field.name}: expected one of {sorted(_KINDS[field.name])}, "
                    f"got {value!r}"
                )
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads: expected a multiple of kv_heads={self.kv_heads}, "
                f"got {self.q_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        divisors, pairs = self.rope_divisors, self.head_dim // 2
        if divisors is not None and (len(divisors) != pairs or not min(divisors) > 0):
            raise ValueError(f"rope_divisors: expected {pairs} > 0, got {divisors}")

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
        E, F, H = self.embed, self.mlp, self.head_dim
        heads = self.q_heads + self.kv_heads
        matrices = 3 if self.mlp_kind == "swiglu" else 2
        norm = E if self.norm == "rms" else 2 * E
        layer = 2 * E * heads * H + matrices * E * F + 2 * norm
        if self.biases:
            layer += (heads + self.kv_heads) * H + E + (matrices - 1) * F + E
        if self.qk_norm:
            layer += 2 * H
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size
        if self.positions == "learned":
            tables += self.max_length
        return self.layers * layer + tables * E + norm


def _opt(name: str, layers: int, embed: int, heads: int) -> ModelConfig:
    """Zhang et al. (arXiv 2205.01068), Table 1; the rest: facebook/opt-*, config.json.

    Published in float16; bfloat16 is our half precision.
    """
    return ModelConfig(
        name=name,
        vocab_size=50_272,
        layers=layers,
        embed=embed,
        q_heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=4 * embed,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_length=2048,
        dtype="bfloat16",
        norm="layer",
        positions="learned",
        mlp_kind="relu",
        biases=True,
    )


def _qwen3(
    name: str, layers: int, embed: int, q_heads: int, mlp: int, tie_embeddings: bool
) -> ModelConfig:
    """Hugging Face Qwen/Qwen3-*, config.json."""
    return ModelConfig(
        name=name,
        vocab_size=151_936,
        layers=layers,
        embed=embed,
        q_heads=q_heads,
        kv_heads=8,
        head_dim=128,
        mlp=mlp,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        tie_embeddings=tie_embeddings,
        max_length=40_960,
        dtype="bfloat16",
        qk_norm=True,
    )


# Random weights. 264 = 256 bytes + 8 specials, see `ByteTokenizer`. Every width
# divides by 4, so that it can be sharded 2 and 4 ways in tests.
_TINY = ModelConfig(
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
)

_ALL = (
    _TINY,
    # The other families at the same sizes, for tests.
    dataclasses.replace(
        _TINY,
        name="tiny-opt",
        kv_heads=8,
        tie_embeddings=True,
        norm="layer",
        positions="learned",
        mlp_kind="relu",
        biases=True,
    ),
    # Qwen3's heads are wider than embed / q_heads.
    dataclasses.replace(_TINY, name="tiny-qwen3", head_dim=32, qk_norm=True),
    # Random weights. Large enough that a step's time on a CPU is work, not overhead.
    ModelConfig(
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
    # Much KV for its weights: 32 KiB a token, as 8 layers of Llama-3-8B in bfloat16.
    ModelConfig(
        name="kv",
        vocab_size=512,
        layers=8,
        embed=256,
        q_heads=8,
        kv_heads=8,
        head_dim=64,
        mlp=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_length=4096,
        dtype="float32",
    ),
    # Hugging Face HuggingFaceTB/SmolLM2-135M-Instruct, config.json. float32, because
    # bfloat16 is about 6 times slower on a CPU.
    ModelConfig(
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
    ModelConfig(
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
    # 13b and 66b are DistServe's; it also has 175b, whose weights are not public.
    _opt("opt-125m", 12, 768, 12),
    _opt("opt-13b", 40, 5120, 40),
    _opt("opt-66b", 64, 9216, 72),
    _qwen3("qwen3-0.6b", 28, 1024, 16, 3072, tie_embeddings=True),
    _qwen3("qwen3-8b", 36, 4096, 32, 12_288, tie_embeddings=False),
)
PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType(
    {config.name: config for config in _ALL}
)


def get_config(name: str) -> ModelConfig:
    """The preset called `name`.

    Raises:
      ValueError: naming the known presets, if there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"model: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
