"""Attention on TPUs by Pallas kernels, over the pool of plain XLA."""

from __future__ import annotations

from jax import Array

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kv_cache import LayerCache
from disagg_jax.engine.attention.pallas_tpu_decodes import decode_attention
from disagg_jax.engine.attention.pallas_tpu_prompts import (
    chunk_attention,
    prompt_attention,
)
from disagg_jax.engine.attention.xla import XlaAttention
from models.config import ModelConfig

_SUBLANES = 16  # rows of bfloat16 in a tile


class PallasTpuAttention(XlaAttention):
    """Pallas kernels for TPUs. On a CPU they are interpreted, for tests."""

    name = "pallas_tpu"

    def problem(self, config: ModelConfig, block_tokens: int) -> str:
        if self.platform == "gpu":
            return "expected TPUs, or CPUs, which interpret its kernels"
        if self.platform == "tpu" and block_tokens % _SUBLANES:
            return f"expected blocks of a multiple of {_SUBLANES} tokens"
        return ""

    def prompts(self, q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array) -> Array:
        return prompt_attention(q_TNH, k_TKH, v_TKH, row_T, interpret=self._interpret)

    def chunks(
        self,
        q_TNH: Array,
        layer: LayerCache,
        row_T: Array,
        position_T: Array,
        blocks: Entries,
    ) -> Array:
        return chunk_attention(
            q_TNH, layer, row_T, position_T, blocks, interpret=self._interpret
        )

    def decodes(
        self, q_BNH: Array, layer: LayerCache, position_B: Array, entries: Entries
    ) -> Array:
        return decode_attention(
            q_BNH, layer, position_B, entries, interpret=self._interpret
        )

    @property
    def _interpret(self) -> bool:
        return self.platform == "cpu"
