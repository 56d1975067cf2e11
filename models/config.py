"""The one description of a model, for engine and cost models: numbers, no JAX."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

from models.named import find_named

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_KINDS = {
    "dtype": _DTYPE_BYTES,
    "norm": ("rms", "layer"),
    "positions": ("rotary", "learned"),
    "mlp_kind": ("swiglu", "relu"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Bytes of one element of the arrays that a step reads, keeps and sends.

    Raises:
      ValueError: if a width is not positive.
    """

    weight: float  # in the layers: 2 is float16 or bfloat16, 1 is int8
    table: float  # in the embedding, which quantisation leaves alone
    kv: int  # a cached key or value
    activation: int  # exchanged between devices within a step

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"{field.name}: expected > 0 bytes, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder-only transformer. The defaults describe Llama.

    OPT (Zhang et al. 2022): norm="layer", positions="learned", mlp_kind="relu", biases.
    Qwen3 (arXiv 2505.09388): qk_norm.

    Raises:
      ValueError: if a size is not positive, `head_dim` is odd (rotary embedding pairs
        its halves), `q_heads` is no multiple of `kv_heads`, a kind is unknown, or
        `rope_divisors` is not one positive divisor for each rotary frequency.
    """

    name: str  # in reports
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
    positions: Literal["rotary", "learned"] = (
        "rotary"  # of q and k, or added before all layers
    )
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_divisors: tuple[float, ...] | None = None  # of each frequency (see rope.py)
    rope_attention_factor: float = 1.0  # of every rotary sine and cosine
    mlp_kind: Literal["swiglu", "relu"] = "swiglu"  # three matrices, or two and a ReLU
    biases: bool = False  # whether every linear layer but the unembedding has one
    qk_norm: bool = False  # RMSNorm of each query and key head, before the rotation
    widths: Widths | None = None  # of a quantised model, for cost models; else dtype's

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float) and not value > 0:
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
        """Return the bytes of one weight, activation or cache element."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def stored(self) -> Widths:
        """Return the bytes of the elements: `widths`, by default those of `dtype`."""
        size = self.dtype_bytes
        same = Widths(weight=size, table=size, kv=size, activation=size)
        return self.widths or same

    @property
    def layer_kv_bytes_per_token(self) -> int:
        """Return the bytes of one token's keys and values in one layer's cache."""
        return 2 * self.kv_heads * self.head_dim * self.stored.kv

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of one token's keys and values in the cache, all layers."""
        return self.layers * self.layer_kv_bytes_per_token

    @property
    def layer_params(self) -> int:
        """Return the number of weights in the matrices of one block."""
        heads = 2 * self.q_heads + 2 * self.kv_heads  # query, output, key, value
        attention = self.embed * heads * self.head_dim
        return attention + self._mlp_matrices * self.embed * self.mlp

    @property
    def table_params(self) -> int:
        """Return the number of weights of the embedding, as of the unembedding."""
        return self.embed * self.vocab_size

    @property
    def num_params(self) -> int:
        """Return the number of weights of the model; a tied embedding counts once."""
        norm = self.embed if self.norm == "rms" else 2 * self.embed
        vectors = 2 * norm
        if self.biases:
            heads = (self.q_heads + 2 * self.kv_heads) * self.head_dim
            mlp = (self._mlp_matrices - 1) * self.mlp
            vectors += heads + self.embed + mlp + self.embed
        if self.qk_norm:
            vectors += 2 * self.head_dim
        positions = self.max_length if self.positions == "learned" else 0
        tables = self._tables * self.table_params + positions * self.embed
        return self.layers * (self.layer_params + vectors) + tables + norm

    @property
    def layer_bytes(self) -> float:
        """Return the bytes of the matrices of one block."""
        return self.layer_params * self.stored.weight

    @property
    def table_bytes(self) -> float:
        """Return the bytes of the embedding; the unembedding has as many."""
        return self.table_params * self.stored.table

    @property
    def weight_bytes(self) -> float:
        """Return the bytes of all matrices; a tied embedding counts once.

        Biases, norms and learned positions are left out (under 0.1 % of every
        published preset).
        """
        return self.layers * self.layer_bytes + self._tables * self.table_bytes

    @property
    def _mlp_matrices(self) -> int:
        return 3 if self.mlp_kind == "swiglu" else 2

    @property
    def _tables(self) -> int:
        return 1 if self.tie_embeddings else 2


def _opt(name: str, layers: int, embed: int, heads: int) -> ModelConfig:
    """Describe an OPT of Zhang et al. (arXiv 2205.01068), Table 1.

    The rest is from facebook/opt-*, config.json. The weights were published in float16;
    bfloat16 is our half precision.
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


def _llama(
    name: str,
    layers: int,
    embed: int,
    heads: tuple[int, int],
    mlp: int,
    vocab_size: int,
    max_length: int,
    *,
    norm_eps: float = 1e-5,
    rope_theta: float = 10_000.0,
) -> ModelConfig:
    """Describe a Llama with heads of 128; `heads` are (q_heads, kv_heads)."""
    return ModelConfig(
        name=name,
        vocab_size=vocab_size,
        layers=layers,
        embed=embed,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        mlp=mlp,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
        tie_embeddings=False,
        max_length=max_length,
        dtype="bfloat16",
    )


def _qwen3(
    name: str, layers: int, embed: int, q_heads: int, mlp: int, tie_embeddings: bool
) -> ModelConfig:
    """Describe Hugging Face Qwen/Qwen3-*, config.json."""
    heads, vocab_size, length = (q_heads, 8), 151_936, 40_960
    llama = _llama(name, layers, embed, heads, mlp, vocab_size, length, rope_theta=1e6)
    return dataclasses.replace(
        llama, norm_eps=1e-6, tie_embeddings=tie_embeddings, qk_norm=True
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
    dataclasses.replace(
        _TINY,
        name="m32",
        layers=4,
        embed=256,
        kv_heads=8,
        head_dim=32,
        mlp=1024,
        tie_embeddings=True,
        max_length=512,
    ),
    # Much KV for its weights: 32 KiB a token, as 8 layers of Llama-3-8B in bfloat16.
    dataclasses.replace(
        _TINY,
        name="kv",
        vocab_size=512,
        layers=8,
        embed=256,
        kv_heads=8,
        head_dim=64,
        mlp=512,
        tie_embeddings=True,
        max_length=4096,
    ),
    # Hugging Face HuggingFaceTB/SmolLM2-135M-Instruct, config.json. float32, because
    # bfloat16 is about 6 times slower on a CPU.
    dataclasses.replace(
        _llama("smollm2-135m", 30, 576, (9, 3), 1536, 49_152, 8192, rope_theta=1e5),
        head_dim=64,
        tie_embeddings=True,
        dtype="float32",
    ),
    _opt("opt-125m", 12, 768, 12),
    # These three are DistServe's; the weights of the last are not public.
    _opt("opt-13b", 40, 5120, 40),
    _opt("opt-66b", 64, 9216, 72),
    _opt("opt-175b", 96, 12_288, 96),
    # Brown et al. (arXiv 2005.14165), Table 2.1; GPT-2's vocabulary. For simulation:
    # its GELU stands as a ReLU here, which costs as much.
    dataclasses.replace(_opt("gpt3-175b", 96, 12_288, 96), vocab_size=50_257),
    # Touvron et al. (arXiv 2302.13971), Table 2; Hugging Face huggyllama/llama-13b and
    # -30b (the paper's 33B), config.json.
    _llama("llama-13b", 40, 5120, (40, 40), 13_824, 32_000, 2048, norm_eps=1e-6),
    _llama("llama-33b", 60, 6656, (52, 52), 17_920, 32_000, 2048, norm_eps=1e-6),
    # Hugging Face meta-llama/Llama-2-13b-hf and -70b-hf, Meta-Llama-3-8B and -70B,
    # mistralai/Mistral-7B-Instruct-v0.2 and 01-ai/Yi-34B, config.json.
    _llama("llama-2-13b", 40, 5120, (40, 40), 13_824, 32_000, 4096),
    _llama("llama-2-70b", 80, 8192, (64, 8), 28_672, 32_000, 4096),
    _llama("llama-3-8b", 32, 4096, (32, 8), 14_336, 128_256, 8192, rope_theta=5e5),
    _llama("llama-3-70b", 80, 8192, (64, 8), 28_672, 128_256, 8192, rope_theta=5e5),
    _llama("mistral-7b", 32, 4096, (32, 8), 14_336, 32_000, 32_768, rope_theta=1e6),
    _llama("yi-34b", 60, 7168, (56, 8), 20_480, 64_000, 4096, rope_theta=5e6),
    # Hugging Face tiiuae/falcon-180B, config.json. For simulation: its blocks run
    # attention and MLP side by side, with a GELU, which costs as much.
    dataclasses.replace(
        _llama("falcon-180b", 80, 14_848, (232, 8), 4 * 14_848, 65_024, 2048),
        head_dim=64,
        tie_embeddings=True,
        norm="layer",
        mlp_kind="relu",
    ),
    _qwen3("qwen3-0.6b", 28, 1024, 16, 3072, tie_embeddings=True),
    _qwen3("qwen3-8b", 36, 4096, 32, 12_288, tie_embeddings=False),
)
PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType(
    {config.name: config for config in _ALL}
)


def get_config(name: str, presets: Mapping[str, ModelConfig] = PRESETS) -> ModelConfig:
    """Return the model of that name.

    Args:
      name: a key of `presets`, or what `find_named` finds.

    Raises:
      ValueError: naming the presets, if there is no such model.
    """
    return find_named(
        name,
        presets,
        kind="model",
        what="a ModelConfig",
        is_one=lambda found: isinstance(found, ModelConfig),
    )
