"""The blocks of a model in numbers: attention of three kinds, MLP or experts. No JAX.

Every attention has
  params                weights of its matrices
  kv_values_per_token   that a token leaves in the cache of one layer
  kv_shards(tp)         of tp devices, those that share the KV of a token without copies
  state_values          that one layer keeps of a sequence, however long it is
  window                tokens that a token attends to, itself included; None: all
  prefill_pair_flops    FLOPs of one query token and one key, where keys are expanded
  decode_pair_flops     the same in a decode, where latent KV is read as it is cached
  splits(tp)            whether its heads divide over tp devices
and every MLP
  params                weights of its matrices, those of all experts
  active_params         those that one token is multiplied with
  routed_params         those of experts that are chosen by a router

Weights of norms and biases are left out: under 0.1 % of every published preset.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeAlias


def _require_positive(shape: object, *, zero: tuple[str, ...] = ()) -> None:
    """Raise a ValueError unless the numbers in a shape are positive, or 0 at `zero`."""
    assert dataclasses.is_dataclass(shape)
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if type(value) is int and value < (0 if field.name in zero else 1):
            least = 0 if field.name in zero else 1
            kind = type(shape).__name__
            raise ValueError(f"{kind}.{field.name}: expected >= {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Attention of queries to a cache of keys and values, shared by groups of heads.

    Raises:
      ValueError: if a size is not positive, or `q_heads` no multiple of `kv_heads`.
    """

    embed: int  # width of the residual stream
    q_heads: int  # query heads
    kv_heads: int  # key and value heads
    head_dim: int  # width of a head
    window: int | None = None  # tokens that a token attends to; None: all
    gated: bool = False  # whether a gate as wide as the queries scales the output
    state_values: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.q_heads % self.kv_heads:
            expected = f"q_heads: expected a multiple of kv_heads={self.kv_heads}"
            raise ValueError(f"{expected}, got {self.q_heads}")

    @property
    def params(self) -> int:
        """Return the weights of query, key, value and output, and of the gate."""
        query = (3 if self.gated else 2) * self.q_heads
        return self.embed * self.head_dim * (query + 2 * self.kv_heads)

    @property
    def kv_values_per_token(self) -> int:
        """Return the values of one token's keys and values."""
        return 2 * self.kv_heads * self.head_dim

    def kv_shards(self, tp: int) -> int:
        """Return the devices that share a token's KV; the others keep copies."""
        return min(tp, self.kv_heads)

    def splits(self, tp: int) -> bool:
        """Return whether tp divides query heads, and divides or copies KV heads."""
        kv = self.kv_heads
        return self.q_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)

    @property
    def prefill_pair_flops(self) -> int:
        """Return the FLOPs of one query token and one key: scores, sum of values."""
        return 4 * self.q_heads * self.head_dim

    @property
    def decode_pair_flops(self) -> int:
        """Return the same as `prefill_pair_flops`."""
        return self.prefill_pair_flops


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: DeepSeek-V2 (arXiv 2405.04434), section 2.1.

    A token's cache is one latent vector and one rotated key, for all heads. A prefill
    expands the latent into keys and values of each head. A decode multiplies queries
    and outputs with the expansion instead ("absorbed"), and attends to the latents.

    Raises:
      ValueError: if a size is not positive.
    """

    embed: int  # width of the residual stream
    heads: int  # of queries, and of expanded keys and values
    q_rank: int | None  # of the latent of the queries; None: they are projected at once
    kv_rank: int  # of the latent that is cached
    nope_dim: int  # part of a head's query and key that is not rotated
    rope_dim: int  # part that is rotated; its key is shared by the heads
    value_dim: int  # width of a head's value
    state_values: ClassVar[int] = 0
    window: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _require_positive(self)

    @property
    def params(self) -> int:
        """Return the weights of projections down, of expansions and of the output."""
        key_dim = self.nope_dim + self.rope_dim
        if self.q_rank is None:
            query = self.embed * self.heads * key_dim
        else:
            query = self.q_rank * (self.embed + self.heads * key_dim)
        latent = self.embed * self.kv_values_per_token
        expansion = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return query + latent + expansion + self.heads * self.value_dim * self.embed

    @property
    def kv_values_per_token(self) -> int:
        """Return the values of one token's latent and rotated key."""
        return self.kv_rank + self.rope_dim

    def kv_shards(self, tp: int) -> int:
        """Return 1: every device needs the whole latent."""
        return 1

    def splits(self, tp: int) -> bool:
        """Return whether tp divides the heads."""
        return self.heads % tp == 0

    @property
    def prefill_pair_flops(self) -> int:
        """Return the FLOPs of one query token and one expanded key and value."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def decode_pair_flops(self) -> int:
        """Return the FLOPs of one query token and one latent: scores, and their sum."""
        return 2 * self.heads * (self.kv_values_per_token + self.kv_rank)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """Gated DeltaNet (arXiv 2412.06464) as in Qwen3-Next and Qwen3.5.

    A sequence leaves a matrix of key_dim x value_dim for each value head, and the last
    inputs of a short convolution; a step reads and writes them. It has no keys to
    attend to, so no FLOPs of pairs. The FLOPs of the state are left out: 7 for each of
    its values and token, 3 % of those of the matrices of such a block in Qwen3.5.

    Raises:
      ValueError: if a size is not positive, or `value_heads` no multiple of
        `key_heads`.
    """

    embed: int  # width of the residual stream
    key_heads: int  # of queries, and of keys
    value_heads: int  # of values, gates and the state; a multiple of key_heads
    key_dim: int  # width of a query or key
    value_dim: int  # width of a value
    kernel: int  # tokens that the convolution sees
    kv_values_per_token: ClassVar[int] = 0
    prefill_pair_flops: ClassVar[int] = 0
    decode_pair_flops: ClassVar[int] = 0
    window: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.value_heads % self.key_heads:
            expected = f"value_heads: expected a multiple of key_heads={self.key_heads}"
            raise ValueError(f"{expected}, got {self.value_heads}")

    @property
    def _convolved(self) -> int:
        """Return the width of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def params(self) -> int:
        """Return the weights of the projections in and out, and of the convolution."""
        values = self.value_heads * self.value_dim
        decays = 2 * self.value_heads  # how much is kept, and how much is written
        into = self._convolved + values + decays  # the second is the output's gate
        return self.embed * (into + values) + self._convolved * self.kernel

    @property
    def state_values(self) -> int:
        """Return the values of a sequence's state and of its convolution's inputs."""
        state = self.value_heads * self.key_dim * self.value_dim
        return state + self._convolved * (self.kernel - 1)

    def kv_shards(self, tp: int) -> int:
        """Return tp: the devices share the state of a sequence."""
        return tp

    def splits(self, tp: int) -> bool:
        """Return whether tp divides the key heads, and so the value heads."""
        return self.key_heads % tp == 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DenseMLP:
    """An MLP that every token goes through.

    Raises:
      ValueError: if a size is not positive.
    """

    embed: int  # width of the residual stream
    width: int  # hidden
    matrices: int = 3  # up, gate and down; 2 without a gate
    routed_params: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _require_positive(self)

    @property
    def params(self) -> int:
        """Return the weights of its matrices."""
        return self.matrices * self.embed * self.width

    @property
    def active_params(self) -> int:
        """Return the weights of its matrices: a token goes through all."""
        return self.params


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMLP:
    """A mixture of experts: a router sends each token to some, and all to the shared.

    Raises:
      ValueError: if a size is not positive, or more experts are active than there are.
    """

    embed: int  # width of the residual stream
    width: int  # hidden, of one expert
    experts: int  # that the router chooses from
    active: int  # experts of one token
    shared_width: int = 0  # hidden, of the experts of all tokens together
    matrices: int = 3  # of an expert: up, gate and down

    def __post_init__(self) -> None:
        _require_positive(self, zero=("shared_width",))
        if self.active > self.experts:
            expected = f"active: expected at most {self.experts} experts"
            raise ValueError(f"{expected}, got {self.active}")

    @property
    def expert_params(self) -> int:
        """Return the weights of one expert."""
        return self.matrices * self.embed * self.width

    @property
    def routed_params(self) -> int:
        """Return the weights of all experts that the router chooses from."""
        return self.experts * self.expert_params

    @property
    def shared_params(self) -> int:
        """Return the weights of the experts that every token goes through."""
        return self.matrices * self.embed * self.shared_width

    @property
    def router_params(self) -> int:
        """Return the weights of the router."""
        return self.embed * self.experts

    @property
    def params(self) -> int:
        """Return the weights of experts and router."""
        return self.routed_params + self.shared_params + self.router_params

    @property
    def active_params(self) -> int:
        """Return the weights that one token is multiplied with."""
        routed = self.active * self.expert_params
        return routed + self.shared_params + self.router_params

    def touched(self, tokens: int) -> float:
        """Return how many experts of the router `tokens` tokens are expected to need.

        Each token chooses `active` different ones, all equally likely, and tokens do
        not depend on each other: E (1 - (1 - K/E)^tokens).
        """
        share = self.active / self.experts
        return self.experts * (1 - (1 - share) ** tokens)


AnyAttention: TypeAlias = Attention | LatentAttention | LinearAttention
AnyMLP: TypeAlias = DenseMLP | ExpertMLP


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Equal transformer blocks of a model, wherever they stand in it.

    Raises:
      ValueError: if there is none, or its two parts are of unlike width.
    """

    count: int  # blocks of this kind
    attention: AnyAttention
    mlp: AnyMLP

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.attention.embed != self.mlp.embed:
            expected = f"embed: expected {self.attention.embed} as in attention"
            raise ValueError(f"{expected}, got {self.mlp.embed}")

    @property
    def params(self) -> int:
        """Return the weights in the matrices of one block."""
        return self.attention.params + self.mlp.params

    @property
    def dense_params(self) -> int:
        """Return the weights of one block that every token is multiplied with."""
        return self.params - self.mlp.routed_params

    @property
    def active_params(self) -> int:
        """Return the weights of one block that one token is multiplied with."""
        return self.attention.params + self.mlp.active_params
