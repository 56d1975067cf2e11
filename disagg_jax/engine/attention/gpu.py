"""Attention kernels of GPUs. None has run on one yet, so `auto` takes none of them."""

from __future__ import annotations

from collections.abc import Mapping

from jax import Array

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kernel import DeviceHeads, KernelCost
from disagg_jax.engine.attention.kv_cache import LayerCache
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.programs.shapes import StepShape
from models.config import ModelConfig


class MosaicGpuAttention(XlaAttention):
    """Plain XLA, but for decodes: an own kernel for Hopper, `mosaic_gpu.py`.

    Equal inputs give equal bits. The kernel is compiled for an H100 in tests, and its
    arithmetic is tested in an interpreter on a CPU; **it never ran on a GPU**.
    """

    name = "mosaic_gpu"

    # `mosaic_gpu` is imported where it is used: Pallas takes a second to import, and
    # not every jaxlib has its GPU side.

    def problem(self, config: ModelConfig, block_tokens: int) -> str:
        if self.platform != "gpu":
            return "expected a GPU of Hopper (compute capability 9.0)"
        from disagg_jax.engine.attention import mosaic_gpu

        group = config.q_heads // config.kv_heads
        return mosaic_gpu.problem(config.dtype, block_tokens, config.head_dim, group)

    def decodes(
        self, q_BNH: Array, layer: LayerCache, position_B: Array, entries: Entries
    ) -> Array:
        from disagg_jax.engine.attention import mosaic_gpu

        return mosaic_gpu.decode_attention(q_BNH, layer, position_B, entries)

    def costs(self, shape: StepShape, heads: DeviceHeads) -> Mapping[str, KernelCost]:
        from disagg_jax.engine.attention import mosaic_gpu

        if not shape.decodes:
            return {}
        _, K, _, H = heads.part.shape
        cost = mosaic_gpu.kernel_cost(shape.decodes, shape.blocks, heads.q_heads, K, H)
        return {mosaic_gpu.KERNEL: cost}
