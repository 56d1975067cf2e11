"""A pipeline stage: its mesh, its KV cache, and the two ends of a transfer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention import kv_cache
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.kv_transfer.piece_plan import PiecePlan
from disagg_jax.engine.program_table import Compiled, Programs
from models.config import ModelConfig
from sharding.heads import head_layout
from sharding.rules import Rules, named_sharding


class Stage:
    """One mesh of an instance. It holds no cache: several pools share its programs.

    Attributes:
      layers: indices of the model's layers on this stage.
      layout: which kv head is in which slot of the cache.
      replicated: the sharding of arrays that every device has whole: activations and
        step inputs.
      scratch_block: the block after the pool, which padding reads and writes.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        mesh: Mesh,
        rules: Rules,
        memory: KVMemory,
    ):
        self.config, self.layers, self.mesh, self.memory = config, layers, mesh, memory
        self.layout = head_layout(config.q_heads, config.kv_heads, mesh.devices.size)
        self.scratch_block = memory.num_blocks
        # Sharding objects are made once: a fresh one per call misses jax's fast path.
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.kv_sharding = named_sharding(mesh, kv_cache.AXES, rules)
        self.payload_sharding = named_sharding(mesh, kv_cache.PAYLOAD_AXES, rules)
        self._programs = Programs()

    def put(self, array: np.ndarray | Array) -> Array:
        """Copy an array of the host, or of another stage, to every device."""
        return jax.device_put(array, self.replicated)

    def spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Describe an array that every device has whole."""
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self.replicated)

    # -- the cache ------------------------------------------------------------------

    def cache_spec(self, layers: int) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
        """Describe the cache of `layers` layers."""
        slots = len(self.layout.kv)
        part = kv_cache.cache_spec(self.config, self.memory, slots, self.kv_sharding)
        return [(part, part)] * layers

    def new_cache(self) -> Cache:
        """Make the empty cache of the stage's layers."""
        ((part, _),) = self.cache_spec(1)
        zeros = jax.jit(
            lambda: jnp.zeros(part.shape, part.dtype), out_shardings=part.sharding
        )
        return [(zeros(), zeros()) for _ in self.layers]

    # -- the two ends of a transfer -------------------------------------------------

    def compile_gather(self, layers: int, blocks: int, plan: PiecePlan) -> None:
        """Compile the source's end for `blocks` blocks of `layers` layers."""
        key = ("gather", layers, blocks, plan.piece_heads)
        self._programs.compile(key, self._gather_program, layers, blocks, plan)

    def gather(
        self, cache: Cache, ids: np.ndarray, plan: PiecePlan
    ) -> list[list[Array]]:
        """Copy the blocks `ids` out of layers, cut into pieces of kv heads.

        Returns:
          For each of `plan.pieces_per_source` pieces its arrays: piece j of source
          shard i is the shards on device i of the arrays j.
        """
        key = ("gather", len(cache), ids.shape[0], plan.piece_heads)
        return self._programs[key](cache, ids)

    def compile_insert(self, layers: int, blocks: int, plan: PiecePlan) -> None:
        """Compile the destination's end for `blocks` blocks of `layers` layers."""
        key = ("insert", layers, blocks, plan.piece_heads)
        self._programs.compile(key, self._insert_program, layers, blocks, plan)

    def insert(
        self,
        cache: Cache,
        ids: np.ndarray,
        pieces: list[list[Array]],
        plan: PiecePlan,
    ) -> tuple[Cache, Array]:
        """Join the pieces and write them into the blocks `ids` of donated layers.

        Returns:
          The updated layers, and a scalar that is ready when they are: the layers may
          be donated to the next step before anyone waits for them.
        """
        key = ("insert", len(cache), ids.shape[0], plan.piece_heads)
        return self._programs[key](cache, ids, pieces)

    def payload_bytes(self, layers: int, blocks: int, plan: PiecePlan) -> int:
        """Return the bytes of all the pieces that `insert` takes."""
        spec = self._piece_spec(layers, blocks, plan)
        return len(plan.sources[0]) * sum(s.size * s.dtype.itemsize for s in spec)

    def _gather_program(self, layers: int, blocks: int, plan: PiecePlan) -> Compiled:
        gather = functools.partial(
            kv_cache.gather,
            pieces=plan.pieces_per_source,
            together=self._together(blocks, plan),
        )
        program = jax.shard_map(
            gather,
            mesh=self.mesh,
            in_specs=(self.kv_sharding.spec, PartitionSpec()),
            out_specs=self.payload_sharding.spec,
        )
        ids = self.spec((blocks,), jnp.int32)
        return jax.jit(program).lower(self.cache_spec(layers), ids).compile()

    def _insert_program(self, layers: int, blocks: int, plan: PiecePlan) -> Compiled:
        program = jax.shard_map(
            kv_cache.insert,
            mesh=self.mesh,
            in_specs=(
                self.kv_sharding.spec,
                PartitionSpec(),
                self.payload_sharding.spec,
            ),
            out_specs=(self.kv_sharding.spec, PartitionSpec()),
        )
        ids = self.spec((blocks,), jnp.int32)
        pieces = [self._piece_spec(layers, blocks, plan)] * len(plan.sources[0])
        jitted = jax.jit(program, donate_argnums=0)
        return jitted.lower(self.cache_spec(layers), ids, pieces).compile()

    def _piece_spec(
        self, layers: int, blocks: int, plan: PiecePlan
    ) -> list[jax.ShapeDtypeStruct]:
        """Describe the arrays of a piece as they arrive."""
        parts, together = 2 * layers, self._together(blocks, plan)
        width = self.mesh.devices.size * self._row_size(plan)
        return [
            jax.ShapeDtypeStruct(
                (min(together, parts - i) * blocks, width),
                jnp.dtype(self.config.dtype),
                sharding=self.payload_sharding,
            )
            for i in range(0, parts, together)
        ]

    def _together(self, blocks: int, plan: PiecePlan) -> int:
        part_bytes = blocks * self._row_size(plan) * self.config.dtype_bytes
        return kv_cache.parts_together(part_bytes)

    def _row_size(self, plan: PiecePlan) -> int:
        """Return the elements of a piece in a block of a layer's k, or v."""
        return plan.piece_heads * self.memory.block_tokens * self.config.head_dim
