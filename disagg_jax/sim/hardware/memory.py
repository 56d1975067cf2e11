"""Whether a model fits on an instance, and how much context fits beside it."""

from __future__ import annotations

import dataclasses

from disagg_jax.deployment import Parallelism, cut_layers
from disagg_jax.errors import require
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """A model's layers over pp stages, and its heads over the tp devices of each.

    The first layers % pp stages have a layer more than the others. Where tp exceeds
    kv_heads, tp / kv_heads devices keep each kv head.

    Raises:
      ValueError: with the numbers, if heads or layers do not divide, or on dp or ep.
    """

    model: ModelConfig
    parallelism: Parallelism

    def __post_init__(self) -> None:
        name, q_heads, kv = self.model.name, self.model.q_heads, self.model.kv_heads
        self.parallelism.require_tp_pp_only(name)
        tp, pp = self.parallelism.tp, self.parallelism.pp
        expected = f"{name}: expected tp to divide {q_heads} query heads"
        require(q_heads % tp == 0, expected, tp)
        divides = kv % tp == 0 or tp % kv == 0
        require(divides, f"{name}: expected tp to fit {kv} kv heads", tp)
        layers = self.model.layers
        require(pp <= layers, f"{name}: expected pp <= {layers} layers", pp)

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Return the number of layers of each stage."""
        stages = cut_layers(range(self.model.layers), self.parallelism.pp)
        return tuple(len(layers) for layers in stages)

    @property
    def kv_shards(self) -> int:
        """Return the number of devices that share the KV of a stage."""
        return min(self.parallelism.tp, self.model.kv_heads)

    @property
    def weight_bytes_per_device(self) -> float:
        """Return the bytes of weights on the fullest device, one of the first stage.

        The first stage has the embedding. The last stage has the unembedding, and its
        own copy of a tied one unless it is also the first.
        """
        model, tp = self.model, self.parallelism.tp
        tables = 2 if self.parallelism.pp == 1 and not model.tie_embeddings else 1
        layers = self.stage_layers[0]
        return (layers * model.layer_bytes + tables * model.table_bytes) / tp

    @property
    def kv_bytes_per_token_per_device(self) -> float:
        """Return the bytes of KV of one token on the device that keeps most."""
        layer_bytes = self.model.layer_kv_bytes_per_token
        return self.stage_layers[0] * layer_bytes / self.kv_shards

    def kv_tokens(self, memory_bytes: float, utilisation: float = 0.9) -> int:
        """Return the tokens of KV that fit beside the weights.

        Args:
          memory_bytes: of one device.
          utilisation: share of the memory for weights and KV, not for activations.

        Raises:
          ValueError: if the weights leave no room for one token.
        """
        require(0 < utilisation <= 1, "utilisation: expected in (0, 1]", utilisation)
        usable = memory_bytes * utilisation
        weights = self.weight_bytes_per_device
        tokens = int((usable - weights) // self.kv_bytes_per_token_per_device)
        require(
            tokens >= 1,
            f"{self.model.name} with {self.parallelism}: expected weights and KV in "
            f"{usable / 1e9:.4g} GB of a device ({utilisation:g} of its memory)",
            f"{weights / 1e9:.4g} GB of weights alone",
        )
        return tokens
