"""Whether a model fits on tp x pp devices, and how much context fits beside it."""

from __future__ import annotations

import dataclasses

from disagg_jax.deployment import cut_layers, require_parallelism
from disagg_jax.errors import require
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """A model's layers over pp stages, and its heads over the tp devices of each.

    The first layers % pp stages have a layer more than the others. Where tp exceeds
    kv_heads, tp / kv_heads devices keep each kv head.

    Raises:
      ValueError: if heads or layers do not divide, or the model is not dense.
    """

    model: ModelConfig
    tp: int
    pp: int

    def __post_init__(self) -> None:
        require_parallelism(self.tp, self.pp)
        name, q_heads, kv = self.model.name, self.model.q_heads, self.model.kv_heads
        self.model.require_dense()
        expected = f"{name}: expected tp to divide {q_heads} query heads"
        require(q_heads % self.tp == 0, expected, self.tp)
        divides = kv % self.tp == 0 or self.tp % kv == 0
        require(divides, f"{name}: expected tp to fit {kv} kv heads", self.tp)
        layers = self.model.layers
        require(self.pp <= layers, f"{name}: expected pp <= {layers} layers", self.pp)

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Return the number of layers of each stage."""
        stages = cut_layers(range(self.model.layers), self.pp)
        return tuple(len(layers) for layers in stages)

    @property
    def kv_shards(self) -> int:
        """Return the number of devices that share the KV of a stage."""
        return min(self.tp, self.model.kv_heads)

    @property
    def weight_bytes_per_device(self) -> float:
        """Return the bytes of weights on the fullest device, one of the first stage.

        The first stage has the embedding. The last stage has the unembedding, and its
        own copy of a tied one unless it is also the first.
        """
        model = self.model
        tables = 2 if self.pp == 1 and not model.tie_embeddings else 1
        layers = self.stage_layers[0]
        return (layers * model.layer_bytes + tables * model.table_bytes) / self.tp

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
            f"{self.model.name} with tp={self.tp}, pp={self.pp}: expected weights and "
            f"KV in {usable / 1e9:.4g} GB of a device ({utilisation:g} of its memory)",
            f"{weights / 1e9:.4g} GB of weights alone",
        )
        return tokens
