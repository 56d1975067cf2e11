"""Whether a model fits on an instance, and how much context fits beside it."""

from __future__ import annotations

import dataclasses

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from models.blocks import Block, ExpertMLP
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """A model's layers over pp stages, and each layer over the devices of its stage.

    Heads and dense matrices are spread over the tp devices of a replica, and each of
    the dp replicas keeps its own copy. Routed experts are spread over all tp x dp
    devices: over ep groups, and the matrices of an expert over the devices of a group.

    Layers of one kind are spread evenly: the first layers % pp stages have a layer more
    than the others. Where tp exceeds kv_heads, tp / kv_heads devices keep each kv head,
    and each device keeps all of a latent vector.

    Raises:
      ValueError: with the numbers, if heads, layers or experts do not divide.
    """

    model: ModelConfig
    parallelism: Parallelism

    def __post_init__(self) -> None:
        model, tp, pp = self.model, self.parallelism.tp, self.parallelism.pp
        name, q_heads, kv = model.name, model.q_heads, model.kv_heads
        splits = all(block.attention.splits(tp) for block in model.blocks)
        expected = f"{name}: expected tp to fit {q_heads} query heads and {kv} kv heads"
        require(splits, expected, tp)
        require(pp <= model.layers, f"{name}: expected pp <= {model.layers} layers", pp)
        ep = self.parallelism.ep
        few = ep == 1 or self.has_experts
        require(few, f"{name}: expected ep = 1, as it has no experts", ep)
        for block in model.blocks:
            if isinstance(block.mlp, ExpertMLP):
                expected = f"{name}: expected ep to divide {block.mlp.experts} experts"
                require(block.mlp.experts % ep == 0, expected, ep)

    @property
    def has_experts(self) -> bool:
        """Return whether a layer has routed experts."""
        return any(isinstance(block.mlp, ExpertMLP) for block in self.model.blocks)

    @property
    def stage_blocks(self) -> tuple[tuple[Block, ...], ...]:
        """Return the blocks of each stage."""
        pp = self.parallelism.pp
        # Kinds alternate in a model, so each is spread over all stages.
        cuts = [
            [block.count // pp + (stage < block.count % pp) for stage in range(pp)]
            for block in self.model.blocks
        ]
        return tuple(
            tuple(
                dataclasses.replace(block, count=cut[stage])
                for block, cut in zip(self.model.blocks, cuts, strict=True)
                if cut[stage]
            )
            for stage in range(pp)
        )

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Return the number of layers of each stage."""
        return tuple(
            sum(block.count for block in blocks) for blocks in self.stage_blocks
        )

    @property
    def weight_bytes_per_device(self) -> float:
        """Return the bytes of weights on the fullest device, one of the first stage.

        The first stage has the embedding. The last stage has the unembedding, and its
        own copy of a tied one unless it is also the first.
        """
        model, parallelism = self.model, self.parallelism
        alone = parallelism.pp == 1 and not model.tie_embeddings
        shared_bytes = (2 if alone else 1) * model.table_bytes
        expert_bytes = 0.0
        for block in self.stage_blocks[0]:
            shared_bytes += block.count * block.dense_params * model.stored.weight
            routed = block.mlp.routed_params
            expert_bytes += block.count * routed * model.stored.experts
        return shared_bytes / parallelism.tp + expert_bytes / parallelism.stage_devices

    @property
    def kv_bytes_per_token_per_device(self) -> float:
        """Return the bytes of KV of one more token on the device that keeps most.

        A layer with a window drops a token for each that it gets, as engines do that
        have blocks for each kind of layer; the window itself is left out.
        """
        tp, width = self.parallelism.tp, self.model.stored.kv
        return sum(
            block.count
            * block.attention.kv_values_per_token
            * width
            / block.attention.kv_shards(tp)
            for block in self.stage_blocks[0]
            if block.attention.window is None
        )

    def kv_tokens(self, memory_bytes: float, utilisation: float = 0.9) -> int:
        """Return the tokens of KV that fit beside the weights, on all replicas.

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
            f"{self.model.name} with {self.parallelism}: expected weights and "
            f"KV in {usable / 1e9:.4g} GB of a device ({utilisation:g} of its memory)",
            f"{weights / 1e9:.4g} GB of weights alone",
        )
        return tokens * self.parallelism.dp
