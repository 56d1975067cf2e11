"""The one description of a model, for engine and cost models: numbers, no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from models.blocks import (
    Attention,
    Block,
    DenseMLP,
    LatentAttention,
    LinearAttention,
)

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
      ValueError: if a width is not positive, or no matmul computes in so many bits.
    """

    weight: float  # in the layers: 2 is float16 or bfloat16, 1 is int8
    table: float  # in the embedding, which quantisation leaves alone
    kv: int  # a cached key or value
    activation: int  # exchanged between devices within a step
    expert_weight: float | None = None  # of experts behind a router; else `weight`
    matmul_bits: int = 16  # that the layers' matmuls compute in: 16, 8 or 4
    expert_matmul_bits: int = 16  # the same of the experts
    # Whether activations get a scale for each block of 128 in every step, before they
    # are multiplied with weights of 8 bits; else their scales are fixed.
    block_scaled: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "table", "kv", "activation", "expert_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected > 0 bytes, got {value}")
        for name in ("matmul_bits", "expert_matmul_bits"):
            if (bits := getattr(self, name)) not in (16, 8, 4):
                raise ValueError(f"{name}: expected 16, 8 or 4, got {bits}")

    @property
    def experts(self) -> float:
        """Return the bytes of a weight of an expert, by default as of others."""
        return self.weight if self.expert_weight is None else self.expert_weight


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder-only transformer. The defaults describe Llama.

    OPT (Zhang et al. 2022): norm="layer", positions="learned", mlp_kind="relu", biases.
    Qwen3 (arXiv 2505.09388): qk_norm. Mixtures of experts and other attention are in
    `structure` (see `of_blocks`), for cost models alone: the engine runs dense models.

    Raises:
      ValueError: if a size is not positive, `head_dim` is odd (rotary embedding pairs
        its halves), `q_heads` is no multiple of `kv_heads`, a kind is unknown,
        `rope_divisors` is not one positive divisor for each rotary frequency, or
        `structure` has other layers or another width.
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
    structure: tuple[Block, ...] | None = None  # if the fields above do not say it all

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
        sizes = {(block.attention.embed, block.mlp.embed) for block in self.blocks}
        if sizes != {(self.embed, self.embed)}:
            raise ValueError(f"structure: expected embed={self.embed}, got {sizes}")
        if (count := sum(block.count for block in self.blocks)) != self.layers:
            raise ValueError(f"structure: expected {self.layers} layers, got {count}")

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
    def precision(self) -> str:
        """Return the precision of most weights: float32, bf16, fp8, fp4 or int4."""
        stored, mixture = self.stored, any(b.mlp.routed_params for b in self.blocks)
        width = stored.experts if mixture else stored.weight
        bits = stored.expert_matmul_bits if mixture else stored.matmul_bits
        if width < 1:
            return "fp4" if bits == 4 else "int4"
        return {1: "fp8", 2: "bf16"}.get(int(width), "float32")

    @property
    def is_dense(self) -> bool:
        """Return whether the fields say all: equal blocks, with an MLP for all tokens.

        The engine runs no other model.
        """
        return self.structure is None

    def require_dense(self) -> None:
        """Raise a ValueError, naming the model, unless it is dense."""
        if not self.is_dense:
            raise ValueError(
                "model: expected a dense one (no mixture of experts, latent or linear "
                f"attention, or window), got {self.name}"
            )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks, by kind: `structure`, or else what the fields describe."""
        if self.structure is not None:
            return self.structure
        attention = Attention(
            embed=self.embed,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )
        mlp = DenseMLP(embed=self.embed, width=self.mlp, matrices=self._mlp_matrices)
        return (Block(count=self.layers, attention=attention, mlp=mlp),)

    def block_bytes(self, block: Block) -> float:
        """Return the bytes of the matrices of one such block, of all its experts."""
        stored, routed = self.stored, block.mlp.routed_params
        return block.dense_params * stored.weight + routed * stored.experts

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of one token in the cache, all layers.

        Layers with a window forget them when it has passed.
        """
        return self.stored.kv * sum(
            block.count * block.attention.kv_values_per_token for block in self.blocks
        )

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
        matrices = sum(block.count * block.params for block in self.blocks)
        return matrices + self.layers * vectors + tables + norm

    @property
    def active_params(self) -> int:
        """Return the weights of all matrices that one token is multiplied with.

        The unembedding is one, the embedding is not: it is looked up.
        """
        blocks = sum(block.count * block.active_params for block in self.blocks)
        return blocks + self.table_params

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
        blocks = sum(block.count * self.block_bytes(block) for block in self.blocks)
        return blocks + self._tables * self.table_bytes

    @property
    def _mlp_matrices(self) -> int:
        return 3 if self.mlp_kind == "swiglu" else 2

    @property
    def _tables(self) -> int:
        return 1 if self.tie_embeddings else 2


def of_blocks(
    name: str,
    blocks: Sequence[Block],
    *,
    vocab_size: int,
    max_length: int,
    tie_embeddings: bool = False,
    norm_eps: float = 1e-6,
    widths: Widths | None = None,
) -> ModelConfig:
    """Describe a model that is not dense, for cost models.

    The fields of a dense model are those of its first attention to a cache (latents
    are one head of KV, as a decode reads them), and of its first MLP.

    Raises:
      ValueError: if no block has keys or values, or a size is impossible.
    """
    attention = next(
        (of for b in blocks if not isinstance(of := b.attention, LinearAttention)), None
    )
    if attention is None:
        raise ValueError(f"{name}: expected a block with keys and values, got none")
    if isinstance(attention, LatentAttention):
        heads = (attention.heads, 1, attention.kv_values_per_token)
    else:
        heads = (attention.q_heads, attention.kv_heads, attention.head_dim)
    return ModelConfig(
        name=name,
        vocab_size=vocab_size,
        layers=sum(block.count for block in blocks),
        embed=attention.embed,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        mlp=blocks[0].mlp.width,
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
        max_length=max_length,
        dtype="bfloat16",
        widths=widths,
        structure=tuple(blocks),
    )
