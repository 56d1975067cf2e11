"""The compiled programs of one mesh: steps, and the two ends of a transfer.

Everything is lowered and compiled ahead of time for a listed shape; serving only looks
programs up, so it cannot compile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from disagg_jax.deployment import KVMemory
from disagg_jax.engine import kv_cache, sampling
from disagg_jax.engine.batch import DecodeShape, PrefillShape, StepShape
from disagg_jax.engine.transfer import PiecePlan
from disagg_jax.engine.weights import place_params
from models import transformer
from models.config import ModelConfig
from sharding.heads import head_layout
from sharding.rules import Rules, named_sharding

Compiled = Callable[..., Any]


class ModelOnMesh:
    """One copy of the weights on one mesh, cut into layer groups, and its programs.

    A forward pass is a sequence of layer groups, each a program of its own with its own
    part of the cache. Programs hold no requests and no cache: several pools may use
    them.

    Attributes:
      tp: devices of the mesh.
      layout: which kv head is in which slot of the cache.
      scratch_block: what padding reads and writes; the block after the pool.
      on_host: whether its arrays are in the host's memory already.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Params,
        mesh: Mesh,
        rules: Rules,
        memory: KVMemory,
        layer_groups: int = 1,
    ):
        if not 1 <= layer_groups <= config.layers:
            raise ValueError(
                f"layer_groups: expected 1 to {config.layers} for {config.name}, got "
                f"{layer_groups}"
            )
        self.config, self.mesh, self.memory = config, mesh, memory
        self.tp: int = mesh.devices.size
        self.layout = head_layout(config.q_heads, config.kv_heads, self.tp)
        self.scratch_block = memory.num_blocks
        self.on_host: bool = mesh.devices.flat[0].platform == "cpu"
        bounds = np.linspace(0, config.layers, layer_groups + 1).round().astype(int)
        placed = place_params(config, params, self.layout, mesh, rules)
        self._params = _group_params(placed, bounds.tolist())
        # What programs take: flattening nested dicts took 8 us of every step.
        self._weights = [jax.tree.leaves(params) for params in self._params]
        self._group_layers: list[int] = np.diff(bounds).tolist()
        # Sharding objects are made once: a fresh one per call misses jax's fast path.
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self.kv_sharding = named_sharding(mesh, kv_cache.AXES, rules)
        self.payload_sharding = named_sharding(mesh, kv_cache.PAYLOAD_AXES, rules)
        self._programs: dict[Hashable, Compiled] = {}

    @property
    def layer_groups(self) -> int:
        return len(self._group_layers)

    def new_cache(self) -> list[kv_cache.Cache]:
        """An empty pool: for each layer group its part of the cache."""
        spec = self._part_spec()
        zeros = jax.jit(
            lambda: jnp.zeros(spec.shape, spec.dtype), out_shardings=spec.sharding
        )
        return [[(zeros(), zeros()) for _ in range(n)] for n in self._group_layers]

    def put(self, vector: np.ndarray) -> Array:
        """A host vector on every device of the mesh."""
        return jax.device_put(vector, self._replicated)

    # -- steps ----------------------------------------------------------------------

    def compile_step(self, shape: StepShape) -> None:
        """Compiles the step of `shape`, unless that was done before."""
        for group in range(self.layer_groups):
            self._compile((shape, group), self._group_program, shape, group)

    def compile_draw(self, rows: int) -> None:
        """Compiles the draw for steps of `rows` rows, unless that was done before."""
        self._compile(("draw", rows), self._draw_program, rows)

    def step(
        self, shape: StepShape, cache: list[kv_cache.Cache], packed: np.ndarray | Array
    ) -> tuple[Array, Array]:
        """Runs one step: (`[rows] int32` likeliest next token, `[rows, V]` logits).

        The caches are donated, and replaced in the list by the updated ones.

        Raises:
          ValueError: if the step of `shape` was not compiled.
        """
        x: tuple[Array, ...] = ()
        out: Any = None
        for group, weights in enumerate(self._weights):
            program = self._lookup((shape, group))
            cache[group], out = program(weights, cache[group], packed, *x)
            x = (out,)
        return out

    def draw(self, logits: Array, packed: Array) -> Array:
        """Next tokens by each row's sampling parameters; see `sampling.draw`.

        A program of its own, so that greedy steps pay nothing for it.
        """
        return self._lookup(("draw", logits.shape[0]))(logits, packed)

    def _draw_program(self, rows: int) -> Compiled:
        logits = self._spec((rows, self.config.vocab_size), jnp.float32)
        packed = self._spec((sampling.PARAMETERS, rows), jnp.int32)
        return jax.jit(sampling.draw).lower(logits, packed).compile()

    def _group_program(self, shape: StepShape, group: int) -> Compiled:
        cache, weights = self._cache_spec(group), self._weights[group]
        tree = jax.tree.structure(self._params[group])
        packed = self._spec((shape.fields.size,), jnp.int32)
        x_spec = self._spec((shape.width, self.config.embed), self.config.dtype)
        x = [x_spec] if group else []
        run_group = functools.partial(
            _run_group,
            self.config,
            self.memory.block_tokens,
            shape,
            is_last=group == self.layer_groups - 1,
        )

        def run(weights: list[Array], *inputs: Any) -> tuple[kv_cache.Cache, Any]:
            return run_group(jax.tree.unflatten(tree, weights), *inputs)

        shardings = [weight.sharding for weight in weights]
        step_inputs = (self._replicated,) * (1 + len(x))
        program = jax.jit(
            run,
            donate_argnums=1,
            in_shardings=(shardings, self.kv_sharding, *step_inputs),
            out_shardings=(self.kv_sharding, self._replicated),
        )
        return program.lower(weights, cache, packed, *x).compile()

    # -- the two ends of a transfer -------------------------------------------------

    def compile_gather(self, blocks: int, plan: PiecePlan) -> None:
        """Compiles the source's end of transfers of `blocks` blocks by `plan`."""
        for group in range(self.layer_groups):
            key = ("gather", group, blocks, plan.piece_heads)
            self._compile(key, self._gather_program, group, blocks, plan)

    def gather(
        self, group: int, cache: kv_cache.Cache, ids: Array, plan: PiecePlan
    ) -> list[list[Array]]:
        """Copies blocks out of a pool, cut into pieces of kv heads.

        Returns:
          For each of `plan.pieces_per_source` pieces its arrays: piece j of source
          shard i is the shards on device i of the arrays j.
        """
        key = ("gather", group, ids.shape[0], plan.piece_heads)
        return self._lookup(key)(cache, ids)

    def compile_insert(self, blocks: int, plan: PiecePlan) -> None:
        """Compiles the destination's end of transfers of `blocks` blocks by `plan`."""
        for group in range(self.layer_groups):
            key = ("insert", group, blocks, plan.piece_heads)
            self._compile(key, self._insert_program, group, blocks, plan)

    def insert(
        self,
        group: int,
        cache: kv_cache.Cache,
        ids: Array,
        pieces: list[list[Array]],
        plan: PiecePlan,
    ) -> tuple[kv_cache.Cache, Array]:
        """Joins the pieces and writes them into the blocks `ids` of a donated pool.

        Returns:
          The updated pool, and a scalar that is ready when the pool is: the pool itself
          may be donated to the next step before anyone looks.
        """
        key = ("insert", group, ids.shape[0], plan.piece_heads)
        return self._lookup(key)(cache, ids, pieces)

    def payload_bytes(self, blocks: int, plan: PiecePlan) -> int:
        """Bytes of all the pieces that `insert` takes."""
        specs = [
            spec
            for group in range(self.layer_groups)
            for spec in self._piece_spec(group, blocks, plan)
        ]
        return len(plan.sources[0]) * sum(s.size * s.dtype.itemsize for s in specs)

    def _gather_program(self, group: int, blocks: int, plan: PiecePlan) -> Compiled:
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
        ids = self._spec((blocks,), jnp.int32)
        return jax.jit(program).lower(self._cache_spec(group), ids).compile()

    def _insert_program(self, group: int, blocks: int, plan: PiecePlan) -> Compiled:
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
        ids = self._spec((blocks,), jnp.int32)
        pieces = [self._piece_spec(group, blocks, plan)] * len(plan.sources[0])
        jitted = jax.jit(program, donate_argnums=0)
        return jitted.lower(self._cache_spec(group), ids, pieces).compile()

    def _piece_spec(
        self, group: int, blocks: int, plan: PiecePlan
    ) -> list[jax.ShapeDtypeStruct]:
        """The arrays of a piece, as they arrive."""
        parts, together = 2 * self._group_layers[group], self._together(blocks, plan)
        width = self.tp * self._row_size(plan)
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
        """Elements of a piece's heads in a block of k, or of v, of a layer."""
        return plan.piece_heads * self.memory.block_tokens * self.config.head_dim

    # -- helpers --------------------------------------------------------------------

    def _compile(
        self, key: Hashable, build: Callable[..., Compiled], *args: Any
    ) -> None:
        if key not in self._programs:
            self._programs[key] = build(*args)

    def _lookup(self, key: Hashable) -> Compiled:
        program = self._programs.get(key)
        if program is None:
            raise ValueError(f"{key}: no such program was compiled before serving")
        return program

    def _spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._replicated)

    def _cache_spec(
        self, group: int
    ) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        part = self._part_spec()
        return [(part, part)] * self._group_layers[group]

    def _part_spec(self) -> jax.ShapeDtypeStruct:
        """The keys, or the values, of one layer."""
        blocks, block_tokens = self.memory.num_blocks + 1, self.memory.block_tokens
        return jax.ShapeDtypeStruct(
            (blocks, len(self.layout.kv), block_tokens, self.config.head_dim),
            jnp.dtype(self.config.dtype),
            sharding=self.kv_sharding,
        )


def _group_params(
    params: transformer.Params, bounds: Sequence[int]
) -> list[transformer.Params]:
    """Each layer group's weights; the first embeds and the last unembeds."""
    layers = params["layers"]
    groups: list[transformer.Params] = [
        {"layers": layers[start:end]} for start, end in itertools.pairwise(bounds)
    ]
    groups[0]["embed"] = params["embed"]
    groups[-1]["final_norm"] = params["final_norm"]
    unembed = "unembed" if "unembed" in params else "embed"
    groups[-1][unembed] = params[unembed]
    return groups


def _run_group(
    config: ModelConfig,
    block_tokens: int,
    shape: StepShape,
    params: transformer.Params,
    cache: kv_cache.Cache,
    packed: Array,
    *x_TE: Array,
    is_last: bool,
) -> tuple[kv_cache.Cache, Any]:
    """One layer group of a step. Without an `x_TE` it embeds the tokens.

    Returns:
      The cache, and `[T, E]` the residual stream; if it is last, tokens and logits.
    """
    inputs = shape.fields.split(packed)
    x = x_TE[0] if x_TE else transformer.embed(params, inputs["token"])
    attend = _attend(shape, inputs, cache[0][0].shape[0], block_tokens)
    x, cache = transformer.run_layers(
        config, params["layers"], x, inputs["position"], attend, cache
    )
    if not is_last:
        return cache, x
    if "last" in inputs:
        x = x[inputs["last"]]
    logits_RV = transformer.unembed(config, params, x)
    return cache, (jnp.argmax(logits_RV, axis=-1).astype(jnp.int32), logits_RV)


def _attend(
    shape: StepShape, inputs: dict[str, Array], pool_blocks: int, block_tokens: int
) -> transformer.Attend[kv_cache.Cache]:
    """The attention of a step of `shape`.

    Args:
      pool_blocks: blocks of the pool, the scratch block included.
    """
    if isinstance(shape, PrefillShape):
        return kv_cache.prefill_attend(inputs["row"], inputs["slot"], block_tokens)
    owner, start = inputs["owner"], inputs["start"]
    if shape.blocks == pool_blocks - 1:
        # The whole pool is read with its scratch block, which nobody owns: XLA copies
        # a slice. m32 on a CPU, 1023 blocks: 61 ms a step sliced, 28 whole.
        owner, start = jnp.append(owner, -1), jnp.append(start, 0)
    position, slot = inputs["position"], inputs["slot"]
    if isinstance(shape, DecodeShape):
        return kv_cache.decode_attend(position, slot, owner, start, block_tokens)
    chunks = kv_cache.ChunkContext(
        inputs["row"],
        inputs["chunk_block"],
        inputs["chunk_owner"],
        inputs["chunk_start"],
    )
    return kv_cache.mixed_attend(
        position, slot, chunks, owner, start, block_tokens, shape.decodes
    )
