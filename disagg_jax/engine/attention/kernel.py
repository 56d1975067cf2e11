"""What an attention kernel is: the one object that a stage asks about attention.

A kernel says how KV lies in the cache, how many tokens a block has, what the inputs of
a step are, how a step writes and attends, and what its own programs move. The kernels
of this project share all of this but the attention itself, so that one pool format
serves plain XLA, cuDNN and own kernels alike; a kernel with another format overrides
more.

Shape letters as in `models/transformer.py`; also B decode rows, P blocks that decodes
attend to, C blocks that chunks attend to.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention import kv_cache, packing
from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kv_cache import LayerCache
from disagg_jax.programs.shapes import StepShape
from disagg_jax.work import Slice
from models.config import ModelConfig

Inputs = Mapping[str, Array]  # the fields of a packed vector, see `packing.fields_of`

# Tokens in a KV block. A TPU keeps 128 floats of an array's last dimension together,
# and scores have offsets there. On a core attention of 16 decodes over 4096 tokens of
# SmolLM2 took 2.2 ms with 16 tokens in a block, 1.8 with 32, 1.4 with 64, 1.6 with 128.
_BLOCK_TOKENS = {"tpu": 128}
_BLOCK_TOKENS_ELSE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCost:
    """What one call of a kernel reads and writes in HBM, and computes."""

    size_bytes: float
    flops: float


class DeviceHeads(NamedTuple):
    """What one device has of a layer: its query heads, and an array of its pool."""

    q_heads: int
    part: jax.ShapeDtypeStruct  # k, or v: [blocks, K, block_tokens, H]


class KernelDevice(Protocol):
    """What a kernel has to know of its devices, as a `jax.Device` says it.

    A GPU also has a `compute_capability`.
    """

    @property
    def platform(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class AttentionKernel(abc.ABC):
    """Attention of steps on devices of one kind.

    The three kinds of attention, `prompts`, `chunks` and `decodes`, are called under
    `jax.shard_map`: they see the heads of one device. Nothing in the cache may reach a
    token that does not see it, not even NaN.

    Attributes:
      platform: of the devices, as JAX names it: cpu, gpu or tpu.
      compute_capability: of GPUs, such as "9.0"; "" of others, or if it is not known.
      name: in `--set attention=`, profiles and keys of programs.
    """

    platform: str
    compute_capability: str = dataclasses.field(default="", kw_only=True)
    name: ClassVar[str]

    @classmethod
    def on(cls, device: KernelDevice) -> Self:
        """Return the kernel for devices like this one."""
        capability = getattr(device, "compute_capability", "")
        return cls(device.platform, compute_capability=capability)

    def problem(self, config: ModelConfig, block_tokens: int) -> str:
        """Say what the kernel would need instead; "" if it can serve the model."""
        return ""

    # -- the cache ---------------------------------------------------------------------

    @property
    def block_tokens(self) -> int:
        """Return the tokens in a KV block that suit the devices."""
        return _BLOCK_TOKENS.get(self.platform, _BLOCK_TOKENS_ELSE)

    def part_spec(
        self,
        config: ModelConfig,
        memory: KVMemory,
        kv_slots: int,
        sharding: NamedSharding,
    ) -> jax.ShapeDtypeStruct:
        """Return k, or v, of a layer; its first axes are blocks and kv heads.

        See `kv_cache.part_spec`.
        """
        return kv_cache.part_spec(config, memory, kv_slots, sharding)

    # -- the inputs of a step ----------------------------------------------------------

    def fields(self, shape: StepShape, block_tokens: int) -> packing.Fields:
        """Return what the packed vector of a step consists of.

        Models read its `token`, `position` and `last`.
        """
        return packing.fields_of(shape, block_tokens)

    def pack(
        self, shape: StepShape, slices: Sequence[Slice], memory: KVMemory
    ) -> np.ndarray:
        """Return that vector, `int32`; see `packing.pack`."""
        return packing.pack(shape, slices, memory)

    # -- a step ------------------------------------------------------------------------

    def attend(
        self,
        shape: StepShape,
        inputs: Inputs,
        layer: LayerCache,
        q_TNH: Array,
        k_TKH: Array,
        v_TKH: Array,
    ) -> tuple[Array, LayerCache]:
        """Write the KV of a step's tokens; then each token attends to its request.

        Returns:
          `[T, N, H]`, and the layer's cache.
        """
        k, v = layer
        layer = _write(shape, inputs, k, k_TKH), _write(shape, inputs, v, v_TKH)
        if shape.kind == "prefill":
            return self.prompts(q_TNH, k_TKH, v_TKH, inputs["row"]), layer
        if shape.kind == "decode":
            return self._decodes(shape, inputs, layer, q_TNH), layer
        row_T = inputs["row"]
        names = "chunk_block", "chunk_owner", "chunk_start"
        blocks = Entries(*(inputs[name] for name in names))
        out_TNH = self.chunks(q_TNH, layer, row_T, inputs["position"], blocks)
        B = shape.decodes
        if not B:  # an instance that never decodes: there are no entries
            return out_TNH, layer
        is_chunk = (row_T[:B] >= 0)[:, None, None]
        decodes_BNH = self._decodes(shape, inputs, layer, q_TNH[:B])
        first = jnp.where(is_chunk, out_TNH[:B], decodes_BNH)
        return jnp.concatenate([first, out_TNH[B:]]), layer

    def _decodes(
        self, shape: StepShape, inputs: Inputs, layer: LayerCache, q_BNH: Array
    ) -> Array:
        entries = Entries(inputs["block"], inputs["owner"], inputs["start"])
        return self.decodes(q_BNH, layer, inputs["position"][: shape.decodes], entries)

    @abc.abstractmethod
    def prompts(self, q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array) -> Array:
        """Attend from each token of whole prompts to its row, up to itself.

        Args:
          row_T: the prompt of each token; a prompt's tokens lie one after the other. -1
            is padding, whose output is of no account.
        """

    @abc.abstractmethod
    def chunks(
        self,
        q_TNH: Array,
        layer: LayerCache,
        row_T: Array,
        position_T: Array,
        blocks: Entries,
    ) -> Array:
        """Attend from each token of chunks to the blocks of its row, up to itself.

        Args:
          row_T: the chunk of each token; -1 is no chunk, whose output is of no account.
          blocks: of all chunks; the owner of padding is -1.
        """

    @abc.abstractmethod
    def decodes(
        self, q_BNH: Array, layer: LayerCache, position_B: Array, entries: Entries
    ) -> Array:
        """Attend from the one query of each row to the blocks of its entries.

        Rows without entries get zeros. The queries' own KV is in the cache already.
        """

    # -- the account -------------------------------------------------------------------

    def costs(self, shape: StepShape, heads: DeviceHeads) -> Mapping[str, KernelCost]:
        """Return what one call of each kernel moves in a step, by its name.

        Only of those whose compiled program does not say it: a TPU's does, by the
        `cost_estimate` of `pl.pallas_call`.
        """
        return {}


def _write(shape: StepShape, inputs: Inputs, part: Array, x_TKH: Array) -> Array:
    """Put the keys, or values, of a step's tokens into k or v of a layer."""
    # Decodes first: XLA for TPUs has another layout for a scatter of tokens to what
    # whole blocks were written to, and copied the pool into it and back.
    if B := shape.decodes:
        part = kv_cache.write_tokens(part, inputs["slot"], x_TKH[:B])
    if shape.kind == "decode":
        return part
    token_WO = inputs["write_token"].reshape(-1, part.shape[2])
    keep = shape.kind == "mixed"  # a chunk can begin inside a block
    block_W = inputs["write_block"]
    return kv_cache.write_blocks(part, block_W, token_WO, x_TKH, keep=keep)
