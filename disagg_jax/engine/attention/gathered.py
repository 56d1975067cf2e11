"""Attention of whole prompts to their tokens, and of chunks to gathered KV blocks.

Chunks attend to a gathered copy of their requests' blocks: a copy is small beside what
so many queries do with it.

Shape letters as in `models/transformer.py`; also C blocks that chunks attend to.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kv_cache import LayerCache, read_blocks
from models.layers import attention

# Prefill queries that attend at a time. It bounds the score matrix, and a piece leaves
# out the keys that come after it. SmolLM2 on a core, 512 tokens, CPU time of attention
# in all layers: 311 ms with 512 at a time, 218 with 256, 201 with 128 (and twice as
# many parts of programs to compile).
_QUERY_CHUNK = 256
# The same for chunks, whose keys can be many more: queries * keys at a time, but for
# at most so many pieces, each of which takes time to compile.
_SCORES = 2**22
_MAX_PIECES = 16


def prompt_attention(row_T: Array, q_TNH: Array, k_TKH: Array, v_TKH: Array) -> Array:
    """Attend from each token of whole prompts to its row, up to itself.

    It goes over the kv heads of a device one by one: scores of all heads at once do not
    stay on chip, and were written to memory and read again (2048 tokens of Llama-3-8B,
    compiled for a v6e: 1.19 GB a layer, and 0.83 GB head by head). On a core 512 tokens
    take 7 % less for 3 kv heads, and 27 % less for 8.
    """
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    index_T = jnp.arange(T)

    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        q_TGH, k_TH, v_TH = head
        outs: list[Array] = []
        for start in range(0, T, _QUERY_CHUNK):
            end = min(start + _QUERY_CHUNK, T)
            mask = (row_T[start:end, None] == row_T[None, :end]) & (
                index_T[start:end, None] >= index_T[None, :end]
            )
            k_S1H, v_S1H = k_TH[:end, None], v_TH[:end, None]
            outs.append(attention(q_TGH[start:end], k_S1H, v_S1H, mask))
        return jnp.concatenate(outs)

    q_KTGH = q_TNH.reshape(T, K, N // K, H).swapaxes(0, 1)
    heads = (q_KTGH, k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1))
    out_KTGH = lax.map(attend_head, heads)
    return out_KTGH.swapaxes(0, 1).reshape(T, N, H)


def gathered_attention(
    q_TNH: Array,
    layer: LayerCache,
    row_T: Array,
    position_T: Array,
    blocks: Entries,
) -> Array:
    """Attend from tokens of chunks to copies of their blocks, with a mask.

    Args:
      row_T: the chunk of each token, -1 of others.
      blocks: of all chunks; the owner of padding is -1.
    """
    H, block_tokens = q_TNH.shape[-1], layer[0].shape[2]
    offset_O = jnp.arange(block_tokens)
    position_S = (blocks.start_P[:, None] + offset_O[None, :]).reshape(-1)
    owner_S = jnp.repeat(blocks.owner_P, block_tokens)
    seen_TS = (
        (row_T[:, None] == owner_S[None, :])
        & (owner_S >= 0)[None, :]
        & (position_S[None, :] <= position_T[:, None])
    )
    used_S = seen_TS.any(0)
    T, S = seen_TS.shape
    piece = max(min(_QUERY_CHUNK, _SCORES // S), -(-T // _MAX_PIECES))
    k, v = (read_blocks(part, blocks.block_P, H) for part in layer)
    k_SKH, v_SKH = (part.swapaxes(1, 2).reshape(S, -1, H) for part in (k, v))
    # Keys that no query sees have weight 0, and 0 * NaN would be NaN.
    v_SKH = jnp.where(used_S[:, None, None], v_SKH, 0)
    outs = [
        attention(q_TNH[i : i + piece], k_SKH, v_SKH, seen_TS[i : i + piece])
        for i in range(0, T, piece)
    ]
    return jnp.concatenate(outs)
