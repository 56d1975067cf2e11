from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from models import layers
from models.config import get_config


def normal(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def test_rms_norm_is_the_formula() -> None:
    x, scale = np.asarray(normal(0, 5, 16)) * 3, np.asarray(normal(1, 16))
    want = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 0.1) * scale
    got = layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32 rounding


def test_rms_norm_of_bfloat16_rounds_only_once() -> None:
    x, scale = normal(0, 64, 512, dtype="bfloat16"), normal(1, 512, dtype="bfloat16")
    exact = layers.rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), 1e-5)
    got = layers.rms_norm(x, scale, 1e-5)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_layer_norm_is_the_formula() -> None:
    x, scale, bias = (
        np.asarray(normal(i, *s)) for i, s in enumerate([(5, 16), (16,), (16,)])
    )
    x = x * 3 + 7
    variance = x.var(axis=1, keepdims=True)
    want = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(variance + 0.1) * scale + bias
    got = layers.layer_norm(*map(jnp.asarray, (x, scale, bias)), 0.1)
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32 rounding


def rotated(x_H: Array, position: int, theta: float = 100.0) -> Array:
    config = dataclasses.replace(
        get_config("tiny"), head_dim=x_H.shape[0], rope_theta=theta
    )
    table = layers.rope_table(config, jnp.array([position]))
    return layers.rotate(x_H[None, None, :], table)[0, 0]


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q_H, k_H = normal(0, 32), normal(1, 32)

    def score(q_position: int, k_position: int) -> float:
        return float(rotated(q_H, q_position) @ rotated(k_H, k_position))

    # Angles up to 300 radians in float32: absolute error about 300 * 6e-8 each.
    assert score(7, 2) == pytest.approx(score(305, 300), abs=1e-3)
    assert abs(score(7, 2) - score(8, 2)) > 0.1


def test_rotary_pairs_are_half_a_head_apart() -> None:
    # Pair 1 of H = 8 is (x[1], x[5]) and turns by theta ** (-2/8) a position.
    x_H = jnp.zeros(8).at[1].set(1.0)
    angle = 3 * 100.0 ** (-2 / 8)
    want = np.zeros(8)
    want[1], want[5] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(rotated(x_H, 3), want, atol=1e-6)


def naive_attention(
    q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, mask_TS: np.ndarray
) -> np.ndarray:
    """Multi-head attention with the kv heads repeated, one query and head at a time."""
    T, N, H = q_TNH.shape
    k_SNH = np.repeat(k_SKH, N // k_SKH.shape[1], axis=1)
    v_SNH = np.repeat(v_SKH, N // v_SKH.shape[1], axis=1)
    out = np.zeros((T, N, H))
    for t in range(T):
        for n in range(N):
            scores = k_SNH[mask_TS[t], n] @ q_TNH[t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v_SNH[mask_TS[t], n]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_queries_equal_repeated_heads(kv_heads: int) -> None:
    q, k, v = normal(0, 4, 6, 8), normal(1, 7, kv_heads, 8), normal(2, 7, kv_heads, 8)
    mask = np.random.default_rng(0).random((4, 7)) < 0.6
    mask[:, 0] = True
    want = naive_attention(*map(np.asarray, (q, k, v)), mask)
    got = layers.attention(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32 sums of 7


def test_a_query_without_keys_gets_the_mean_and_not_nan() -> None:
    q, k, v = normal(0, 2, 2, 4), normal(1, 3, 2, 4), normal(2, 3, 2, 4)
    got = layers.attention(q, k, v, jnp.zeros((2, 3), bool))
    np.testing.assert_allclose(got[0], v.mean(axis=0), atol=1e-6)


def test_softmax_of_bfloat16_is_float32() -> None:
    # Scores of about +-40: rounded to bfloat16 they would be off by up to 0.125, the
    # weights by 13 %. Only the weights (2^-9) and the result (2^-9) are rounded.
    q, k, v = (normal(i, 64, 2, 16, dtype="bfloat16") for i in range(3))
    q, v = q * 10, jnp.abs(v)
    mask = jnp.ones((64, 64), bool)
    exact = layers.attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    got = layers.attention(q, k, v, mask)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=0.01)


@pytest.mark.parametrize(
    "dtype, precision",
    [("float32", jax.lax.Precision.HIGHEST), ("bfloat16", jax.lax.Precision.DEFAULT)],
)
def test_float32_matmuls_ask_for_float32(
    dtype: str, precision: jax.lax.Precision
) -> None:
    # Only a GPU or TPU would compute another result, so look at what is asked for.
    x = jnp.ones((2, 2), jnp.dtype(dtype))
    jaxpr = jax.make_jaxpr(lambda x: layers.einsum("TE,EF->TF", x, x))(x)
    (dot,) = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert dot.params["precision"] == (precision, precision)
    assert layers.einsum("TE,EF->TF", x, x).dtype == x.dtype
