"""The modules of one transformer block, and the maths inside them.

The modules build the weights and compute with them. `transformer.py` explains the shape
letters. Each weight carries the logical name of every axis (metadata `axes`); the rules
of sharding map logical axes to mesh axes. Head counts are read off the weights, because
tensor parallelism may pad or replicate heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from models.config import ModelConfig

Cache = TypeVar("Cache")  # any pytree; only `attend` reads it


def einsum(spec: str, x: Array, y: Array, dtype: jnp.dtype | None = None) -> Array:
    """Compute `jnp.einsum` of two operands with this project's precision of a dtype.

    float32 is the exact mode, in which different shardings and batchings must choose
    the same tokens: HIGHEST keeps a GPU from TF32 and a TPU from bfloat16 passes.
    bfloat16 is the fast mode: accelerators accumulate in float32 and round the result
    once, and the partial sums that tensor parallelism adds up travel as bfloat16.

    Returns:
      The result in `dtype`, by default the operands'.
    """
    exact = x.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=dtype)


def add_bias(y: Array, bias: nnx.Param | None) -> Array:
    """Add the bias of the other dimensions to `y [T, ...]`, if there is one.

    It is added to the whole sum: under tensor parallelism once, not on each device.
    """
    return y if bias is None else y + bias[...][None]


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Divide by the root mean square, in float32 inside (Zhang & Sennrich 2019).

    Args:
      x: `[..., D]`, normalised over the last dimension.
      scale: `[D]`.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * lax.rsqrt(mean_square + eps)
    return (normed * _like(scale, x)).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Normalise to mean 0 and variance 1, in float32 inside (Ba et al. 2016)."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    normed = centered * lax.rsqrt(variance + eps)
    return (normed * _like(scale, x) + _like(bias, x)).astype(x.dtype)


def _like(vector_D: Array, x: Array) -> Array:
    """Return `[D]` with the rank of `x`, in float32."""
    return jnp.expand_dims(vector_D, range(x.ndim - 1)).astype(jnp.float32)


def rope_table(config: ModelConfig, positions_T: Array) -> tuple[Array, Array]:
    """Return the sine and cosine of every position's rotation angles.

    Returns:
      Twice `[T, head_dim / 2]` float32. Pair i turns by
      `position * rope_theta ** (-2 i / head_dim)` radians (RoFormer, Su et al. 2021),
      over its divisor. Scores get the square of the factor on sines and cosines.
    """
    # Constants, in float64 up to here: far positions multiply the rounding error.
    exponents_D = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies_D = config.rope_theta**-exponents_D
    if config.rope_divisors is not None:
        frequencies_D = frequencies_D / np.array(config.rope_divisors)
    frequencies_1D = jnp.array(frequencies_D[None, :], jnp.float32)
    angles_TD = positions_T[:, None].astype(jnp.float32) * frequencies_1D
    factor = config.rope_attention_factor
    return jnp.sin(angles_TD) * factor, jnp.cos(angles_TD) * factor


def rotate(x_TNH: Array, table: tuple[Array, Array]) -> Array:
    """Rotate each head by its token's position.

    Pair i is (x[i], x[i + H/2]), the convention of Llama checkpoints on Hugging Face;
    the papers, and llama.cpp's weights, pair (x[2i], x[2i + 1]).
    """
    sin_T1D, cos_T1D = (part[:, None, :] for part in table)
    low_TND, high_TND = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    rotated = (
        low_TND * cos_T1D - high_TND * sin_T1D,
        high_TND * cos_T1D + low_TND * sin_T1D,
    )
    return jnp.concatenate(rotated, axis=-1).astype(x_TNH.dtype)


def attention(q_TNH: Array, k_SKH: Array, v_SKH: Array, mask_TS: Array) -> Array:
    """Attend grouped queries of T tokens over S keys; softmax in float32.

    Query heads `[k * G, (k + 1) * G)` share kv head `k`, where G = N / K. The letter Q
    stands for the queries of one kv head, G * T.

    Args:
      mask_TS: True where the query may look at the key. A row without any True gives
        the mean of all values (not NaN): padding queries need no special case.

    Returns:
      `[T, N, H]` in the dtype of `v_SKH`.
    """
    T, N, H = q_TNH.shape
    K = k_SKH.shape[1]
    G, S = N // K, k_SKH.shape[0]
    # Matrices, one for each kv head: with "TKGH,SKH->KGTS" XLA on a CPU copies scores
    # around, and 512 tokens of SmolLM2 took 1.7 times as long in here.
    q_KQH = q_TNH.reshape(T, K, G, H).transpose(1, 2, 0, 3).reshape(K, G * T, H)
    scores_KGTS = einsum("KQH,SKH->KQS", q_KQH, k_SKH, jnp.float32).reshape(K, G, T, S)
    scores_KGTS = jnp.where(
        mask_TS[None, None], scores_KGTS * H**-0.5, jnp.finfo(jnp.float32).min
    )
    probs_KGTS = jax.nn.softmax(scores_KGTS, axis=-1).astype(v_SKH.dtype)
    out_KQH = einsum("KQS,SKH->KQH", probs_KGTS.reshape(K, G * T, S), v_SKH)
    return out_KQH.reshape(K, G, T, H).transpose(2, 0, 1, 3).reshape(T, N, H)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the length of every logical axis of a weight."""
    return {
        "embed": config.embed,
        "heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp,
        "vocab": config.vocab_size,
        "length": config.max_length,
    }


def weight(
    config: ModelConfig,
    rngs: nnx.Rngs,
    *axes: str,
    fan_in: tuple[str, ...],
    gain: float = 1.0,
) -> nnx.Param:
    """Draw a random weight with one dimension for each logical axis in `axes`.

    Normal with variance gain^2 / (product of the `fan_in` axes): with a gain of 1 a
    matmul over those axes keeps the scale of its input. Nothing is scaled down for
    depth: random models are for tests, and strong layers make the output depend on the
    whole context.
    """
    size = axis_sizes(config)
    stddev = gain * math.prod(size[axis] for axis in fan_in) ** -0.5
    shape = tuple(size[axis] for axis in axes)
    noise = jax.random.normal(rngs.params(), shape, jnp.dtype(config.dtype))
    return nnx.Param(noise * stddev, axes=axes)


def bias(config: ModelConfig, rngs: nnx.Rngs, *axes: str) -> nnx.Param | None:
    """Draw a random bias, if the model has biases.

    It is so large that a test sees one left out; at 0.5 `tiny-opt` repeats one token.
    """
    if not config.biases:
        return None
    return weight(config, rngs, *axes, fan_in=(), gain=0.05)


class RMSNorm(nnx.Module):
    def __init__(self, config: ModelConfig, axis: str = "embed", scale: float = 1.0):
        self.eps = config.norm_eps
        self.scale = _constant(config, axis, scale)

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
    def __init__(self, config: ModelConfig) -> None:
        self.eps = config.norm_eps
        self.scale = _constant(config, "embed", 1.0)
        self.bias = _constant(config, "embed", 0.0)

    def __call__(self, x_TE: Array) -> Array:
        return layer_norm(x_TE, self.scale[...], self.bias[...], self.eps)


def _constant(config: ModelConfig, axis: str, value: float) -> nnx.Param:
    shape = (axis_sizes(config)[axis],)
    return nnx.Param(jnp.full(shape, value, jnp.dtype(config.dtype)), axes=(axis,))


class SelfAttention(nnx.Module):
    """The projections into and out of attention; the caller attends."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        into = functools.partial(weight, config, rngs, "embed")
        # With a gain of 1 random attention is nearly a mean over the context and greedy
        # output soon repeats one token; with 4 it picks out a few keys.
        self.wq = into("heads", "head_dim", fan_in=("embed",), gain=4.0)
        self.wk = into("kv_heads", "head_dim", fan_in=("embed",))
        self.wv = into("kv_heads", "head_dim", fan_in=("embed",))
        out_of = functools.partial(weight, config, rngs, "heads", "head_dim")
        self.wo = out_of("embed", fan_in=("heads", "head_dim"))
        self.bq = bias(config, rngs, "heads", "head_dim")
        self.bk = bias(config, rngs, "kv_heads", "head_dim")
        self.bv = bias(config, rngs, "kv_heads", "head_dim")
        self.bo = bias(config, rngs, "embed")
        # The norm of queries undoes the gain of wq.
        norm = functools.partial(RMSNorm, config, "head_dim")
        self.q_norm = norm(scale=4.0) if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def qkv(
        self, x_TE: Array, table: tuple[Array, Array] | None
    ) -> tuple[Array, Array, Array]:
        """Return queries `[T, N, H]`, keys and values `[T, K, H]`, rotated if asked."""
        q_TNH = add_bias(einsum("TE,ENH->TNH", x_TE, self.wq[...]), self.bq)
        k_TKH = add_bias(einsum("TE,EKH->TKH", x_TE, self.wk[...]), self.bk)
        v_TKH = add_bias(einsum("TE,EKH->TKH", x_TE, self.wv[...]), self.bv)
        if self.q_norm and self.k_norm:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        if table:
            q_TNH, k_TKH = rotate(q_TNH, table), rotate(k_TKH, table)
        return q_TNH, k_TKH, v_TKH

    def out(self, out_TNH: Array) -> Array:
        # Two matrices: for "TNH,NHE->TE" XLA on a CPU copies wo in every step.
        wo_NHE = self.wo[...]
        N, H, E = wo_NHE.shape
        out_TM, wo_ME = out_TNH.reshape(-1, N * H), wo_NHE.reshape(-1, E)
        return add_bias(einsum("TM,ME->TE", out_TM, wo_ME), self.bo)


class MLP(nnx.Module):
    """A gated MLP of three matrices (SwiGLU, Shazeer 2020), or a ReLU between two."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        gated = config.mlp_kind == "swiglu"
        into = functools.partial(
            weight, config, rngs, "embed", "mlp", fan_in=("embed",)
        )
        self.w_gate = into() if gated else None
        self.w_up = into()
        self.w_down = weight(config, rngs, "mlp", "embed", fan_in=("mlp",))
        self.b_gate = bias(config, rngs, "mlp") if gated else None
        self.b_up = bias(config, rngs, "mlp")
        self.b_down = bias(config, rngs, "embed")

    def __call__(self, x_TE: Array) -> Array:
        up_TF = add_bias(einsum("TE,EF->TF", x_TE, self.w_up[...]), self.b_up)
        if self.w_gate is None:
            hidden_TF = jax.nn.relu(up_TF)
        else:
            gate_TF = add_bias(einsum("TE,EF->TF", x_TE, self.w_gate[...]), self.b_gate)
            hidden_TF = jax.nn.silu(gate_TF) * up_TF
        return add_bias(einsum("TF,FE->TE", hidden_TF, self.w_down[...]), self.b_down)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}  # by ModelConfig.norm


class TransformerBlock(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = NORMS[config.norm](config)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x_TE: Array,
        table: tuple[Array, Array] | None,
        attend: Callable[[Array, Array, Array, Cache], tuple[Array, Cache]],
        cache: Cache,
    ) -> tuple[Array, Cache]:
        """Return the residual stream and the cache after this block.

        `attend(q_TNH, k_TKH, v_TKH, cache)` returns `[T, N, H]` and the new cache.
        """
        with jax.named_scope("qkv"):
            q_TNH, k_TKH, v_TKH = self.attention.qkv(self.attention_norm(x_TE), table)
        with jax.named_scope("attention"):
            out_TNH, cache = attend(q_TNH, k_TKH, v_TKH, cache)
        with jax.named_scope("attention_out"):
            x_TE = x_TE + self.attention.out(out_TNH)
        with jax.named_scope("mlp"):
            x_TE = x_TE + self.mlp(self.mlp_norm(x_TE))
        return x_TE, cache
