"""Attention of whole prompts by cuDNN. **Compiled for an H100, never run on a GPU.**

It needs cuDNN where it is compiled (`pip install nvidia-cudnn-cu12`; without a GPU, its
folder in LD_LIBRARY_PATH). Decodes are left to plain XLA: the paged attention that jax
has of cuDNN (0.10 to 0.12, `jax._src.cudnn`) takes no pool but one of as many blocks as
its rectangular table has places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from disagg_jax.engine.attention.kernel import DeviceHeads, KernelCost
from disagg_jax.engine.attention.xla import XlaAttention
from disagg_jax.programs.shapes import StepShape
from models.config import ModelConfig

KERNEL = "__cudnn$fmhaScaleBiasSoftmax"  # its target in a compiled program


class CudnnAttention(XlaAttention):
    """cuDNN's flash attention for whole prompts; plain XLA for chunks and decodes."""

    name = "cudnn"

    def problem(self, config: ModelConfig, block_tokens: int) -> str:
        if self.platform != "gpu" or float(self.compute_capability or 8) < 8:
            expected = "expected a GPU of compute capability 8.0 or more (Ampere), got "
            return expected + (self.compute_capability or f"a {self.platform}")
        if config.dtype != "bfloat16":
            return "expected bfloat16"
        if config.head_dim % 8 or config.head_dim > 128:
            return f"expected a head_dim of 8s up to 128, got {config.head_dim}"
        return ""

    def prompts(self, q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array) -> Array:
        return prompt_attention(q_TNH, k_TKH, v_TKH, row_T, "cudnn")

    def costs(self, shape: StepShape, heads: DeviceHeads) -> Mapping[str, KernelCost]:
        if shape.kind != "prefill":
            return {}
        _, K, _, H = heads.part.shape
        T, N = shape.tokens, heads.q_heads
        size_bytes = 2 * (2 * T * (N + K) * H + T * T)
        return {KERNEL: KernelCost(size_bytes=size_bytes, flops=4 * T * T * N * H)}


def prompt_attention(
    q_TNH: Array,
    k_TKH: Array,
    v_TKH: Array,
    row_T: Array,
    implementation: Literal["cudnn", "xla"],
) -> Array:
    """Attend from each token of whole prompts to its row, up to itself.

    The mask is dense, `[T, T]`, one for all heads.
    """
    index_T = jnp.arange(row_T.shape[0])
    mask_TT = row_T[:, None] == row_T[None, :]
    mask_TT &= index_T[:, None] >= index_T[None, :]
    return jax.nn.dot_product_attention(
        *(x[None] for x in (q_TNH, k_TKH, v_TKH)),
        mask=mask_TT[None, None],
        implementation=implementation,
    )[0]
