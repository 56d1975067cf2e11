"""A pipeline stage: its mesh, how arrays lie on it, and its part of the KV cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention import kv_cache
from disagg_jax.engine.attention.kernel import AttentionKernel
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.program_table import Programs
from models.config import ModelConfig
from sharding.heads import head_layout
from sharding.rules import Rules, named_sharding


class Stage:
    """One mesh of an instance. It holds no cache: several pools share its programs.

    Attributes:
      layers: indices of the model's layers on this stage.
      layout: which kv head is in which slot of the cache.
      tiled: see `kv_cache.is_tiled`.
      replicated: the sharding of arrays that every device has whole: activations and
        step inputs.
      logits: the sharding of logits `[rows, V]`. Each device keeps those of its part of
        the vocabulary: a greedy step needs no more than the likeliest of each part.
      programs: what takes KV blocks out of the cache and puts them in, see `Segment`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        mesh: Mesh,
        rules: Rules,
        memory: KVMemory,
        kernel: AttentionKernel,
    ):
        self.config, self.layers, self.mesh, self.memory = config, layers, mesh, memory
        self.kernel = kernel
        self.layout = head_layout(config.q_heads, config.kv_heads, mesh.size)
        self.tiled = kv_cache.is_tiled(mesh)
        # Sharding objects are made once: a fresh one per call misses jax's fast path.
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.kv_sharding = named_sharding(mesh, kv_cache.AXES, rules)
        self.logits = named_sharding(mesh, (None, "vocab"), rules)
        self.payload_sharding = named_sharding(mesh, kv_cache.PAYLOAD_AXES, rules)
        self.programs = Programs()

    def put(self, array: np.ndarray | Array) -> Array:
        """Copy an array of the host, or of another stage, to every device."""
        return jax.device_put(array, self.replicated)

    def spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Describe an array that every device has whole."""
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self.replicated)

    def cache_spec(self, layers: int) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
        """Describe the cache of `layers` layers."""
        slots = len(self.layout.kv)
        part = self.kernel.part_spec(self.config, self.memory, slots, self.kv_sharding)
        return [(part, part)] * layers

    def new_cache(self) -> Cache:
        """Make the empty cache of the stage's layers."""
        part = self.cache_spec(1)[0][0]
        zeros = jax.jit(
            lambda: jnp.zeros(part.shape, part.dtype), out_shardings=part.sharding
        )
        return [(zeros(), zeros()) for _ in self.layers]
