"""Drawing the next token of each row, with sampling parameters per row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """One entry per row; the fields of `request.Sampling`."""

    temperature: Array  # `[R] float32`; 0 is greedy
    top_k: Array  # `[R] int32`; 0 keeps all
    top_p: Array  # `[R] float32`
    seed: Array  # `[R] int32`
    index: Array  # `[R] int32` how many tokens the request has generated before


def sample(logits_RV: Array, params: SamplingParams) -> Array:
    """The next token of each row, `[R] int32`.

    Token n of a request depends on its logits, its parameters and n only, so recompute
    and replay give the same tokens. Sorting the vocabulary is paid for only in steps in
    which some row is not greedy.
    """
    with jax.named_scope("sample"):
        greedy_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
        return jax.lax.cond(
            jnp.any(params.temperature > 0),
            lambda: jnp.where(
                params.temperature > 0, _draw(logits_RV, params), greedy_R
            ),
            lambda: greedy_R,
        )


def _draw(logits_RV: Array, params: SamplingParams) -> Array:
    temperature_R1 = jnp.maximum(params.temperature, 1e-6)[:, None]
    logits_RV = logits_RV.astype(jnp.float32) / temperature_R1
    kept_RV = logits_RV >= _threshold(logits_RV, params)[:, None]
    logits_RV = jnp.where(kept_RV, logits_RV, -jnp.inf)
    return jax.vmap(_categorical)(logits_RV, params.seed, params.index)


def _threshold(logits_RV: Array, params: SamplingParams) -> Array:
    """The lowest logit that top-k, and then top-p of what is left, keep; `[R]`.

    Logits equal to the threshold all stay, so ties may keep more than k.
    """
    V = logits_RV.shape[-1]
    sorted_RV = jnp.sort(logits_RV, axis=-1, descending=True)
    top_k_R = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, V), V)
    in_top_k_RV = jnp.arange(V)[None, :] < top_k_R[:, None]
    probs_RV = jax.nn.softmax(jnp.where(in_top_k_RV, sorted_RV, -jnp.inf), axis=-1)
    # A token stays if the likelier ones do not reach top_p; the first always stays.
    before_RV = jnp.cumsum(probs_RV, axis=-1) - probs_RV
    kept_RV = in_top_k_RV & (before_RV < params.top_p[:, None])
    count_R = jnp.maximum(kept_RV.sum(-1), 1)
    return jnp.take_along_axis(sorted_RV, count_R[:, None] - 1, axis=-1)[:, 0]


def _categorical(logits_V: Array, seed: Array, index: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)
