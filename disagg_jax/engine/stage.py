"""A pipeline stage: a mesh, how KV lies on it, and the two ends of a transfer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention import pool_order
from disagg_jax.engine.kv_transfer.device_put import PiecePlan
from disagg_jax.engine.program_table import Compiled, Programs
from models.config import ModelConfig
from sharding.heads import head_layout
from sharding.rules import Rules, named_sharding


class Stage:
    """One mesh of an instance. It holds no cache: several pools may use its programs.

    Attributes:
      layers: those of the model's that it has.
      layout: which kv head is in which slot of the cache.
      replicated: the sharding of what every device has: activations, step inputs.
      scratch_block: what padding reads and writes; the block after the pool.
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
        self.kv_sharding = named_sharding(mesh, pool_order.AXES, rules)
        self.payload_sharding = named_sharding(mesh, pool_order.PAYLOAD_AXES, rules)
        self._programs = Programs()

    def put(self, array: np.ndarray | Array) -> Array:
        """An array of the host, or of another stage, on every device."""
        return jax.device_put(array, self.replicated)

    def spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array that every device has."""
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self.replicated)

    # -- the cache ------------------------------------------------------------------

    def cache_spec(
        self, layers: int
    ) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """The cache of so many layers."""
        blocks, block_tokens = self.memory.num_blocks + 1, self.memory.block_tokens
        part = jax.ShapeDtypeStruct(
            (blocks, len(self.layout.kv), block_tokens, self.config.head_dim),
            jnp.dtype(self.config.dtype),
            sharding=self.kv_sharding,
        )
        return [(part, part)] * layers

    def new_cache(self) -> pool_order.Cache:
        """The cache of its layers, empty."""
        ((part, _),) = self.cache_spec(1)
        zeros = jax.jit(
            lambda: jnp.zeros(part.shape, part.dtype), out_shardings=part.sharding
        )
        return [(zeros(), zeros()) for _ in self.layers]

    # -- the two ends of a transfer -------------------------------------------------

    def compile_gather(self, layers: int, blocks: int, plan: PiecePlan) -> None:
        """Compiles the source's end for `blocks` blocks of so many layers."""
        key = ("gather", layers, blocks, plan.piece_heads)
        self._programs.compile(key, self._gather_program, layers, blocks, plan)

    def gather(
        self, cache: pool_order.Cache, ids: np.ndarray, plan: PiecePlan
    ) -> list[list[Array]]:
        """Copies the blocks `ids` out of layers, cut into pieces of kv heads.

        Returns:
          For each of `plan.pieces_per_source` pieces its arrays: piece j of source
          shard i is the shards on device i of the arrays j.
        """
        key = ("gather", len(cache), ids.shape[0], plan.piece_heads)
        return self._programs[key](cache, ids)

    def compile_insert(self, layers: int, blocks: int, plan: PiecePlan) -> None:
        """Compiles the destination's end for `blocks` blocks of so many layers."""
        key = ("insert", layers, blocks, plan.piece_heads)
        self._programs.compile(key, self._insert_program, layers, blocks, plan)

    def insert(
        self,
        cache: pool_order.Cache,
        ids: np.ndarray,
        pieces: list[list[Array]],
        plan: PiecePlan,
    ) -> tuple[pool_order.Cache, Array]:
        """Joins the pieces and writes them into the blocks `ids` of donated layers.

        Returns:
          The updated layers, and a scalar that is ready when they are: they may be
          donated to the next step before anyone looks.
        """
        key = ("insert", len(cache), ids.shape[0], plan.piece_heads)
        return self._programs[key](cache, ids, pieces)

    def payload_bytes(self, layers: int, blocks: int, plan: PiecePlan) -> int:
        """Bytes of all the pieces that `insert` takes."""
        spec = self._piece_spec(layers, blocks, plan)
        return len(plan.sources[0]) * sum(s.size * s.dtype.itemsize for s in spec)

    def _gather_program(self, layers: int, blocks: int, plan: PiecePlan) -> Compiled:
        gather = functools.partial(
            pool_order.gather,
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
            pool_order.insert,
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
        """The arrays of a piece, as they arrive."""
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
        return pool_order.parts_together(part_bytes)

    def _row_size(self, plan: PiecePlan) -> int:
        """Elements of a piece's heads in a block of k, or of v, of a layer."""
        return plan.piece_heads * self.memory.block_tokens * self.config.head_dim
