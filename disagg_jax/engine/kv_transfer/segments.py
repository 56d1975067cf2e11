"""The parts in which a request's KV goes from one instance of a model to another."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.stages import Compiled

from disagg_jax.engine.attention import kv_cache
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.kv_transfer.device_put import move
from disagg_jax.engine.kv_transfer.piece_plan import PiecePlan, piece_plan
from disagg_jax.engine.layer_group import LayerGroup
from disagg_jax.engine.model_programs import ModelPrograms
from disagg_jax.engine.program_table import Program, program_name
from disagg_jax.engine.stage import Stage

# For each piece of a shard its arrays, sharded along axis 1 (the kv heads): the shard
# on device i is that piece of shard i.
Pieces = list[list[Array]]
# Each extra array in a `device_put` costs about 0.1 ms per device; packing several into
# one costs a copy on arrival. m32, TP4 to TP4: 1 MiB took 4.4 ms with k and v of each
# layer apart and 2.4 ms together; 16 MiB 15.0 and 14.0; 128 MiB 75 and 89 (2 busy
# cores).
_ARRAY_BYTES = 4 * 2**20


class Segment(NamedTuple):
    """Layers of one source group that are on one destination stage."""

    src: LayerGroup
    dst: Stage
    layers: range
    plan: PiecePlan

    def programs(self, blocks: int) -> list[Program]:
        """Return the programs of both ends for transfers of `blocks` blocks.

        Segments with equal ends share their programs: the stages keep them.
        """
        of = self.dst.config.layers
        ends = (
            ("gather", self.src.stage.programs, self._gather_program),
            ("insert", self.dst.programs, self._insert_program),
        )
        return [
            Program(
                kind=end,
                size=blocks,
                layers=self.layers,
                name=program_name(f"{end}_{blocks}", self.layers, of),
                table=table,
                key=(end, *self._key(blocks)),
                build=functools.partial(build, blocks),
            )
            for end, table, build in ends
        ]

    def gather(self, cache: Cache, ids: np.ndarray) -> Pieces:
        """Copy the blocks `ids` out of the source's cache, cut into pieces."""
        program = self.src.stage.programs["gather", *self._key(len(ids))]
        return program(cache[self._part], ids)

    def move(self, pieces: Pieces) -> Pieces:
        """Copy gathered pieces to the destination's devices."""
        return move(pieces, self.plan, self.dst.payload_sharding)

    def insert(self, cache: Cache, ids: np.ndarray, pieces: Pieces) -> Array:
        """Join moved pieces and write them into the destination's blocks `ids`.

        The cache of the layers is donated, and replaced in the list by the updated one.

        Returns:
          A scalar that is ready when the KV has landed: the cache may be donated to the
          next step before anyone waits for it.
        """
        program = self.dst.programs["insert", *self._key(len(ids))]
        cache[self._part], landed = program(cache[self._part], ids, pieces)
        return landed

    def payload_bytes(self, blocks: int) -> int:
        """Return the bytes that arrive for `blocks` blocks."""
        return sum(
            math.prod(array.shape) * array.dtype.itemsize
            for piece in self._pieces_spec(blocks)
            for array in piece
        )

    @property
    def _part(self) -> slice:
        return slice(self.layers.start, self.layers.stop)

    def _key(self, blocks: int) -> tuple[int, int, int]:
        """Return the sizes that a stage's gather or insert programs differ in."""
        return len(self.layers), blocks, self.plan.piece_heads

    def _gather_program(self, blocks: int) -> Compiled:
        stage = self.src.stage
        gather = functools.partial(
            kv_cache.gather,
            pieces=self.plan.pieces_per_source,
            together=self._together(blocks),
            tiled=stage.tiled,
        )
        program = jax.shard_map(
            gather,
            mesh=stage.mesh,
            in_specs=(stage.kv_sharding.spec, PartitionSpec()),
            out_specs=stage.payload_sharding.spec,
        )
        cache = stage.cache_spec(len(self.layers))
        ids = stage.spec((blocks,), jnp.int32)
        return jax.jit(program).lower(cache, ids).compile(_options(stage))

    def _insert_program(self, blocks: int) -> Compiled:
        stage = self.dst
        kv, payload = stage.kv_sharding.spec, stage.payload_sharding.spec
        program = jax.shard_map(
            functools.partial(kv_cache.insert, tiled=stage.tiled),
            mesh=stage.mesh,
            in_specs=(kv, PartitionSpec(), payload),
            out_specs=(kv, PartitionSpec()),
        )
        cache = stage.cache_spec(len(self.layers))
        ids = stage.spec((blocks,), jnp.int32)
        jitted = jax.jit(program, donate_argnums=0)
        lowered = jitted.lower(cache, ids, self._pieces_spec(blocks))
        return lowered.compile(_options(stage))

    def _pieces_spec(self, blocks: int) -> list[list[jax.ShapeDtypeStruct]]:
        """Describe the pieces as they arrive."""
        parts, together = 2 * len(self.layers), self._together(blocks)
        width, *rest = self._piece_shape
        piece = [
            jax.ShapeDtypeStruct(
                (min(together, parts - i) * blocks, self.dst.mesh.size * width, *rest),
                jnp.dtype(self.dst.config.dtype),
                sharding=self.dst.payload_sharding,
            )
            for i in range(0, parts, together)
        ]
        return [piece] * len(self.plan.sources[0])

    def _together(self, blocks: int) -> int:
        """Return how many k or v of layers share an array of a piece."""
        part_bytes = blocks * math.prod(self._piece_shape) * self.dst.config.dtype_bytes
        return max(1, _ARRAY_BYTES // part_bytes)

    @property
    def _piece_shape(self) -> kv_cache.Shape:
        """The shape of a piece of a block of a layer's k, or v."""
        part = self.dst.cache_spec(1)[0][0]
        return kv_cache.piece_shape(part, self.plan.piece_heads, self.dst.tiled)


def _options(stage: Stage) -> dict[str, str | bool]:
    """Return how the programs of transfers are compiled.

    A program for a TPU may begin by fetching an argument into VMEM, while the one
    before it ends: XLA chose a whole array of the pool where it had room (up to 110 MiB
    on a v5e, to send a block of 128 KiB).
    """
    is_tpu = stage.mesh.devices.flat[0].platform == "tpu"
    return {"xla_msa_max_cross_program_prefetches": "0"} if is_tpu else {}


def find_segments(src: ModelPrograms, dst: ModelPrograms) -> list[Segment]:
    """Return all pairs of a group and a stage that share layers, by layer."""
    plan = piece_plan(src.layout.kv, src.tp, dst.layout.kv, dst.tp)
    found: list[Segment] = []
    for group, stage in itertools.product(src.groups, dst.stages):
        a, b = group.layers, stage.layers
        layers = range(max(a.start, b.start), min(a.stop, b.stop))
        if layers:
            found.append(Segment(group, stage, layers, plan))
    return found
