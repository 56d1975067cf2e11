"""Attention in plain XLA, for devices of every kind."""

from __future__ import annotations

from jax import Array

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.gathered import gathered_attention, prompt_attention
from disagg_jax.engine.attention.kernel import AttentionKernel
from disagg_jax.engine.attention.kv_cache import LayerCache
from disagg_jax.engine.attention.paged import chunk_entries, paged_attention


class XlaAttention(AttentionKernel):
    """Plain XLA. Equal inputs give equal bits, but for decodes on a GPU."""

    name = "xla"

    def prompts(self, q_TNH: Array, k_TKH: Array, v_TKH: Array, row_T: Array) -> Array:
        return prompt_attention(row_T, q_TNH, k_TKH, v_TKH)

    def chunks(
        self,
        q_TNH: Array,
        layer: LayerCache,
        row_T: Array,
        position_T: Array,
        blocks: Entries,
    ) -> Array:
        return gathered_attention(q_TNH, layer, row_T, position_T, blocks)

    def decodes(
        self, q_BNH: Array, layer: LayerCache, position_B: Array, entries: Entries
    ) -> Array:
        block_bytes = sum(part.nbytes // part.shape[0] for part in layer)
        chunk = chunk_entries(self.platform, block_bytes)
        return paged_attention(q_BNH, layer, position_B, entries, chunk)
