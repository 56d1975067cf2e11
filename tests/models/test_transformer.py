from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from models import layers, transformer
from models.config import PRESETS, ModelConfig, get_config
from models.transformer import Params

TINY = get_config("tiny")
TOKENS = jax.random.randint(jax.random.key(7), (24,), 0, TINY.vocab_size)


@pytest.fixture(scope="module")
def params() -> Params:
    return transformer.init_params(TINY, 0)


def causal_attend(
    layer: int, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: Any
) -> tuple[Array, Any]:
    del layer
    mask_TS = jnp.tril(jnp.ones((q_TNH.shape[0],) * 2, bool))
    return layers.attention(q_TNH, k_TKH, v_TKH, mask_TS), cache


@jax.jit
def run(layer_params: list[Params], x_TE: Array) -> Array:
    positions_T = jnp.arange(x_TE.shape[0])
    return transformer.run_layers(
        TINY, layer_params, x_TE, positions_T, causal_attend, ()
    )[0]


def numpy_forward(config: ModelConfig, params: Params, tokens: np.ndarray) -> Any:
    """Llama written out in float64 for one sequence, one token and head at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    half, group = config.head_dim // 2, config.q_heads // config.kv_heads
    frequency = config.rope_theta ** (-np.arange(half) / half)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequency)
        return np.concatenate([turned.real, turned.imag])

    xs = list(p["embed"][tokens])
    for block in p["layers"]:
        w, mlp = block["attention"], block["mlp"]
        seen: list[tuple[np.ndarray, np.ndarray]] = []
        for t, x in enumerate(xs):
            y = norm(x, block["attention_norm"]["scale"])
            keys = [rotate(y @ w["wk"][:, k], t) for k in range(config.kv_heads)]
            seen.append((np.array(keys), np.einsum("e,ekh->kh", y, w["wv"])))
            for n in range(config.q_heads):
                q = rotate(y @ w["wq"][:, n], t)
                scores = np.array([k[n // group] @ q for k, _ in seen])
                weights = np.exp(scores / np.sqrt(config.head_dim))
                weights /= weights.sum()
                head = sum(
                    a * v[n // group] for a, (_, v) in zip(weights, seen, strict=True)
                )
                xs[t] = xs[t] + head @ w["wo"][n]
            y = norm(xs[t], block["mlp_norm"]["scale"])
            gate = y @ mlp["w_gate"]
            gate /= 1 + np.exp(-gate)
            xs[t] = xs[t] + (gate * (y @ mlp["w_up"])) @ mlp["w_down"]
    last = np.array([norm(x, p["final_norm"]["scale"]) for x in xs])
    return last @ (p["embed"].T if config.tie_embeddings else p["unembed"])


@pytest.mark.parametrize("tied", [False, True])
def test_forward_is_llama(params: Params, tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    if tied:
        params = {key: value for key, value in params.items() if key != "unembed"}
    # Scales other than one, so that forgetting or swapping a norm shows.
    noise = 1 + 0.5 * jax.random.normal(jax.random.key(1), (3, TINY.embed))
    one, two, three = ({"scale": scale} for scale in noise)
    norms = {"attention_norm": one, "mlp_norm": two}
    blocks = [{**block, **norms} for block in params["layers"]]
    params = {**params, "layers": blocks, "final_norm": three}
    got = transformer.forward(config, params, TOKENS)
    assert got.dtype == jnp.float32
    # Logits are about 1; float32 through two layers.
    np.testing.assert_allclose(
        got, numpy_forward(config, params, np.asarray(TOKENS)), atol=1e-4
    )


def test_logits_do_not_see_later_tokens(params: Params) -> None:
    """By gradients: the logits of token t depend on inputs 0 to t, on each of them."""

    @jax.jit
    @jax.grad
    def sensitivity(x_TE: Array, t: int) -> Array:
        return transformer.unembed(TINY, params, run(params["layers"], x_TE))[t].sum()

    x_TE = transformer.embed(params, TOKENS, jnp.arange(24))
    for t in (0, 11, 23):
        sensitivity_T = jnp.abs(sensitivity(x_TE, t)).sum(axis=1)
        np.testing.assert_array_equal(sensitivity_T > 0, jnp.arange(24) <= t)


def test_a_prefix_has_the_same_logits(params: Params) -> None:
    whole = transformer.forward(TINY, params, TOKENS)
    prefix = transformer.forward(TINY, params, TOKENS[:9])
    # Same sums in another blocking: float32 rounding of logits of about 1.
    np.testing.assert_allclose(whole[:9], prefix, atol=1e-4)


def test_greedy_takes_the_likeliest_and_padding_does_not_show(params: Params) -> None:
    prompt = TOKENS.tolist()
    output = transformer.greedy(TINY, params, prompt, 41)  # 65 tokens: 128 padded
    assert output[:40] == transformer.greedy(TINY, params, prompt, 40)  # 64 padded
    logits = transformer.forward(TINY, params, jnp.array([*prompt, *output]))
    assert jnp.argmax(logits[23:-1], axis=1).tolist() == output
    assert transformer.greedy(TINY, params, prompt, 0) == []


@pytest.mark.parametrize(
    "name, different",
    [
        ("tiny", 34),  # found: 35 to 41 different tokens, 25 to 34 with mean attention
        ("tiny-qwen3", 34),
        ("tiny-opt", 18),  # a ReLU's output has a mean, which favours some tokens
    ],
)
def test_random_models_say_something(name: str, different: int) -> None:
    """A model that repeats one token, whatever the prompt, would test nothing."""
    config = get_config(name)
    params = transformer.init_params(config, 0)
    prompts = [[first, 2, 3] for first in (1, 9, 20, 77)]
    outputs = [transformer.greedy(config, params, prompt, 48) for prompt in prompts]
    assert min(len(set(output)) for output in outputs) > different
    for output in outputs[1:]:
        same = sum(a == b for a, b in zip(outputs[0], output, strict=True))
        assert same < 6


@pytest.mark.parametrize("prompt, n", [([], 4), ([1] * 1000, 25)])
def test_greedy_refuses_what_has_no_answer(
    params: Params, prompt: list[int], n: int
) -> None:
    with pytest.raises(ValueError, match=rf"1024 .*got {len(prompt)} \+ {n}"):
        transformer.greedy(TINY, params, prompt, n)


def test_layer_groups_equal_the_whole(params: Params) -> None:
    four = [*params["layers"], *jax.tree.map(jnp.negative, params["layers"])]
    x_TE = transformer.embed(params, TOKENS, jnp.arange(24))
    positions_T = jnp.arange(24)

    def attend(
        layer: int, q: Array, k: Array, v: Array, keys: Array
    ) -> tuple[Array, Array]:
        out, _ = causal_attend(layer, q, k, v, ())
        return out, keys.at[layer].set(k)

    @jax.jit
    def run_group(group: list[Params], x_TE: Array) -> tuple[Array, Array]:
        keys = jnp.zeros((len(group), 24, TINY.kv_heads, TINY.head_dim))
        return transformer.run_layers(TINY, group, x_TE, positions_T, attend, keys)

    whole_x, whole_keys = run_group(four, x_TE)
    x_TE, first_keys = run_group(four[:1], x_TE)
    x_TE, other_keys = run_group(four[1:], x_TE)
    # One program against two: float32 rounding of a residual stream of about 2.
    np.testing.assert_allclose(x_TE, whole_x, atol=1e-4)
    keys = jnp.concatenate([first_keys, other_keys])
    np.testing.assert_allclose(keys, whole_keys, atol=1e-4)


def test_heads_are_counted_on_the_weights(params: Params) -> None:
    """Replicated kv heads and padded query heads do not change the result."""
    counts_N1 = jnp.tile(jnp.array([1.0, 0.0]), TINY.q_heads)[:, None, None]

    def double(block: Params) -> Params:
        # A kv head serves 2 query heads. Each of those gets a replica of its own, and a
        # neighbour whose output counts for nothing.
        w = block["attention"]
        doubled = {name: jnp.repeat(w[name], 2, axis=1) for name in ("wq", "wk", "wv")}
        doubled["wo"] = jnp.repeat(w["wo"], 2, axis=0) * counts_N1
        return {**block, "attention": doubled}

    x_TE = transformer.embed(params, TOKENS, jnp.arange(24))
    want = run(params["layers"], x_TE)
    got = run([double(block) for block in params["layers"]], x_TE)
    np.testing.assert_allclose(got, want, atol=1e-4)  # float32 rounding


DENSE = sorted(name for name, config in PRESETS.items() if config.is_dense)


def test_weights_of_a_model_that_is_not_dense_are_refused() -> None:
    config = get_config("deepseek-v3")
    for of in (transformer.param_shapes, transformer.param_axes):
        with pytest.raises(ValueError, match="expected a dense one .*deepseek-v3"):
            of(config)
    with pytest.raises(ValueError, match="expected a dense one .*deepseek-v3"):
        transformer.init_params(config, 0)


@pytest.mark.parametrize("name", DENSE)
def test_axes_name_every_dimension(name: str) -> None:
    config = get_config(name)
    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    sizes = layers.axis_sizes(config)

    def check(shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> int:
        assert shape.shape == tuple(sizes[axis] for axis in names)
        assert shape.dtype == config.dtype
        return math.prod(shape.shape)

    # tree.map raises where the structures differ.
    counts = jax.tree.map(check, shapes, axes)
    assert sum(jax.tree.leaves(counts)) == config.num_params
    assert ("unembed" in shapes) != config.tie_embeddings


def test_init_has_the_announced_shapes_and_follows_the_seed(params: Params) -> None:
    announced = transformer.param_shapes(TINY)
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert found == announced
    again, other = (transformer.init_params(TINY, seed) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert not jnp.allclose(other["embed"], params["embed"])
    # No two weights of the same shape are the same draw.
    first, second = (block["mlp"] for block in params["layers"])
    assert not jnp.allclose(first["w_gate"], first["w_up"])
    assert not jnp.allclose(first["w_gate"], second["w_gate"])


def test_bfloat16_stays_bfloat16_up_to_the_logits(params: Params) -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x_TE = transformer.embed(params16, TOKENS, jnp.arange(24))

    def attend(
        layer: int, q: Array, k: Array, v: Array, cache: tuple[()]
    ) -> tuple[Array, tuple[()]]:
        assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
        return causal_attend(layer, q, k, v, cache)

    @jax.jit
    def run16(layer_params: list[Params], x_TE: Array) -> Array:
        positions_T = jnp.arange(24)
        return transformer.run_layers(
            config, layer_params, x_TE, positions_T, attend, ()
        )[0]

    x_TE = run16(params16["layers"], x_TE)
    assert x_TE.dtype == jnp.bfloat16
    logits = transformer.unembed(config, params16, x_TE)
    assert logits.dtype == jnp.float32
    exact = transformer.forward(TINY, params, TOKENS)
    # Logits of spread 1; 8 bits of mantissa through two layers.
    assert jnp.sqrt(jnp.mean((logits - exact) ** 2)) < 0.1
