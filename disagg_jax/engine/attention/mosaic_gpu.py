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
    """Own kernels for Hopper; chunks of prompts are left to plain XLA.

    Equal inputs give equal bits. The kernels are compiled for an H100 in tests, and
    their arithmetic is tested in an interpreter on a CPU; **they never ran on a GPU**.
    """

    name = "mosaic_gpu"

    # The kernels are imported where they are used: Pallas takes a second to import, and
    # not every jaxlib has its GPU side.

    def problem(self, config: ModelConfig, block_tokens: int) -> str:
        if self.platform != "gpu" or self.compute_capability not in ("", "9.0"):
            expected = "expected a GPU of Hopper (compute capability 9.0), got "
            return expected + (self.compute_capability or f"a {self.platform}")
        from disagg_jax.engine.attention import mosaic_gpu_decodes

        group = config.q_heads // config.kv_heads
        return mosaic_gpu_decodes.problem(
            config.dtype, block_tokens, config.head_dim, group
        )

    def prompts(self, q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array) -> Array:
        from disagg_jax.engine.attention import mosaic_gpu_prompts

        return mosaic_gpu_prompts.prompt_attention(q_TNH, k_TKH, v_TKH, row_T)

    def decodes(
        self, q_BNH: Array, layer: LayerCache, position_B: Array, entries: Entries
    ) -> Array:
        from disagg_jax.engine.attention import mosaic_gpu_decodes

        return mosaic_gpu_decodes.decode_attention(q_BNH, layer, position_B, entries)

    def costs(self, shape: StepShape, heads: DeviceHeads) -> Mapping[str, KernelCost]:
        from disagg_jax.engine.attention import mosaic_gpu_decodes, mosaic_gpu_prompts

        _, K, _, H = heads.part.shape
        sizes = heads.q_heads, K, H
        if shape.kind == "prefill":
            cost = mosaic_gpu_prompts.kernel_cost(shape.tokens, *sizes)
            return {mosaic_gpu_prompts.KERNEL: cost}
        if not shape.decodes:
            return {}
        cost = mosaic_gpu_decodes.kernel_cost(shape.decodes, shape.blocks, *sizes)
        return {mosaic_gpu_decodes.KERNEL: cost}
