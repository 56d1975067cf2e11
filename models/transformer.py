"""A decoder-only transformer as pure functions of a nested dict of weights.

Shape letters, in names and in einsum:

    T  tokens of one call: flat, any mix of requests   S  key positions
    E  embed                                            F  mlp
    N  query heads                                      K  kv heads
    H  head_dim                                         V  vocab

    params = {
        "embed": [V, E],
        "positions": [max_length, E],  # with learned positions
        "layers": [{  # one for each layer
            "attention_norm": {"scale": [E]},
            "attention": {"wq": [E, N, H], "wk": [E, K, H],
                          "wv": [E, K, H], "wo": [N, H, E],
                          # with biases
                          "bq": [N, H], "bk": [K, H], "bv": [K, H], "bo": [E],
                          # with qk_norm
                          "q_norm": {"scale": [H]}, "k_norm": {"scale": [H]}},
            "mlp_norm": {"scale": [E]},
            "mlp": {"w_gate": [E, F],  # SwiGLU
                    "w_up": [E, F], "w_down": [F, E],
                    "b_gate": [F], "b_up": [F], "b_down": [E]},  # with biases
        }, ...],
        "final_norm": {"scale": [E]},
        "unembed": [E, V],  # absent with a tied embedding
    }

A LayerNorm has a {"bias": [E]} beside its scale.

Flax NNX builds the weights and takes no part in a step. Layers have arrays of their own
rather than one stacked array: XLA on a CPU copies a layer's cache out of a stack before
a matmul reads it, and its weights as well, whether a scan or unrolled code slices them.
The price is compile time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from models import layers
from models.config import ModelConfig
from models.layers import Cache

Params: TypeAlias = dict[str, Any]  # nested; leaves are arrays, see the top
Built = TypeVar("Built", bound=nnx.Module)

# attend(layer, q_TNH, k_TKH, v_TKH, cache) -> (out_TNH, cache): the caller chooses the
# keys that a query sees.
Attend: TypeAlias = Callable[[int, Array, Array, Array, Cache], tuple[Array, Cache]]


class Ends(nnx.Module):
    """The weights before the first layer and after the last.

    Raises:
      ValueError: naming the model, if it is not dense. Whoever makes, shapes, places or
        restores weights comes by here first.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        config.require_dense()
        # The variance of an embedding is 1 / E, as if it were a matmul's weight: a tied
        # random model would otherwise do no more than repeat its last token.
        table = functools.partial(layers.weight, config, rngs, fan_in=("embed",))
        self.embed = table("vocab", "embed")
        if config.positions == "learned":
            self.positions = table("length", "embed")
        self.final_norm = layers.NORMS[config.norm](config)
        if not config.tie_embeddings:
            self.unembed = table("embed", "vocab")


def init_params(config: ModelConfig, seed: int | Array) -> Params:
    """Draw random weights, the same for the same seed however they are sharded.

    Inside a `jax.jit` with `out_shardings` no device holds more than its shards.
    """
    ends_key, layers_key = jax.random.split(jax.random.key(seed))
    layer_keys = jax.random.split(layers_key, config.layers)
    return {
        **_init(Ends, config, ends_key),
        "layers": [_init(layers.TransformerBlock, config, key) for key in layer_keys],
    }


Module: TypeAlias = Callable[[ModelConfig, nnx.Rngs], nnx.Module]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(module: Module, config: ModelConfig, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(module(config, nnx.Rngs(key))))


def param_shapes(config: ModelConfig) -> Params:
    """Return `Params` of `jax.ShapeDtypeStruct`; nothing is allocated."""
    return jax.eval_shape(functools.partial(init_params, config), 0)


@functools.cache
def param_axes(config: ModelConfig) -> Params:
    """Return `Params` of tuples with the logical name of each dimension."""

    def axes(module: Module) -> Params:
        abstract = nnx.eval_shape(lambda: module(config, nnx.Rngs(0)))
        return nnx.to_pure_dict(
            nnx.state(abstract), lambda param: param.get_metadata("axes")
        )

    return {**axes(Ends), "layers": [axes(layers.TransformerBlock)] * config.layers}


def part(params: Params, layers: range) -> Params:
    """Cut the part of consecutive layers out of a tree in the form of `Params`.

    The part with the first layer also has the embedding, the part with the last layer
    the final norm and the unembedding.
    """
    names = ["embed", "positions"] if layers.start == 0 else []
    if layers.stop == len(params["layers"]):
        names += ["final_norm", "unembed" if "unembed" in params else "embed"]
    ends = {name: params[name] for name in names if name in params}
    return {**ends, "layers": params["layers"][layers.start : layers.stop]}


def embed(params: Params, tokens_T: Array, positions_T: Array) -> Array:
    """Embed token ids, and positions if the model learned them, as `[T, E]`.

    Needs `params["embed"]`, and `["positions"]` if there is one.
    """
    with jax.named_scope("embed"):
        # XLA makes a slice of a gather of one row. Of a table that is divided over the
        # vocabulary a GPU then gathers the whole (1 GB of Llama-3-8B); two rows do not.
        rows = jnp.repeat(tokens_T, 2) if tokens_T.shape[0] == 1 else tokens_T
        x_TE = params["embed"][rows][: tokens_T.shape[0]]
        return (
            x_TE + params["positions"][positions_T] if "positions" in params else x_TE
        )


def run_layers(
    config: ModelConfig,
    layer_params: Sequence[Params],
    x_TE: Array,
    positions_T: Array,
    attend: Attend[Cache],
    cache: Cache,
) -> tuple[Array, Cache]:
    """Run a group of consecutive layers.

    Args:
      layer_params: consecutive items of `params["layers"]`.
      positions_T: each token's position in its own request, for the rotary embedding.
      attend: called for each layer; its `layer` counts from 0 within this group.
      cache: any pytree, which `attend` keeps for the whole group.

    Returns:
      The residual stream after the last layer, and the cache as `attend` left it.
    """
    rotary = config.positions == "rotary"
    table = layers.rope_table(config, positions_T) if rotary else None
    for index, params in enumerate(layer_params):
        with jax.named_scope(f"layer_{index}"):
            block = _filled(_block, config, params)
            x_TE, cache = block(x_TE, table, functools.partial(attend, index), cache)
    return x_TE, cache


def unembed(config: ModelConfig, params: Params, x_TE: Array) -> Array:
    """Turn the residual stream into float32 logits `[T, V]`, final norm included.

    Needs `params["final_norm"]`, and `params["unembed"]` or a tied `["embed"]`.
    """
    with jax.named_scope("unembed"):
        x_TE = _filled(layers.NORMS[config.norm], config, params["final_norm"])(x_TE)
        if config.tie_embeddings:
            return layers.einsum("TE,VE->TV", x_TE, params["embed"], jnp.float32)
        return layers.einsum("TE,EV->TV", x_TE, params["unembed"], jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params: Params, tokens_T: Array) -> Array:
    """Return the logits `[T, V]` of one sequence, all at once and without a cache.

    This is the oracle that batching, paging and sharding must agree with.
    """
    return unembed(config, params, _hidden(config, params, tokens_T))


def greedy(
    config: ModelConfig, params: Params, prompt: Sequence[int], n: int
) -> list[int]:
    """Return the `n` likeliest tokens after `prompt`, one by one, without a cache.

    Every token is a full pass over a sequence padded to a multiple of 64 (causality
    hides the padding), so that few lengths compile.

    Raises:
      ValueError: if the prompt is empty or prompt and output exceed the context.
    """
    total = len(prompt) + n
    if not prompt or total > config.max_length:
        raise ValueError(
            f"expected a prompt and at most {config.max_length} tokens in all, "
            f"got {len(prompt)} + {n}"
        )
    padding = [0] * (-total % 64 + n)
    tokens_T = jnp.array([*prompt, *padding], jnp.int32)
    tokens_T = _extend(config, params, tokens_T, len(prompt), total)
    return np.asarray(tokens_T)[len(prompt) : total].tolist()


@functools.partial(jax.jit, static_argnums=0)
def _extend(
    config: ModelConfig, params: Params, tokens_T: Array, start: int, stop: int
) -> Array:
    """Fill positions `start` to `stop` of `tokens_T` with greedy tokens."""

    def step(position: Array, tokens_T: Array) -> Array:
        x_TE = _hidden(config, params, tokens_T)
        last_1E = lax.dynamic_slice_in_dim(x_TE, position - 1, 1)
        logits_1V = unembed(config, params, last_1E)
        token = jnp.argmax(logits_1V[0]).astype(tokens_T.dtype)
        return tokens_T.at[position].set(token)

    return lax.fori_loop(start, stop, step, tokens_T)


def _hidden(config: ModelConfig, params: Params, tokens_T: Array) -> Array:
    """Return the residual stream `[T, E]` of one sequence after the last layer."""
    positions_T = jnp.arange(tokens_T.shape[0])
    causal_TS = positions_T[:, None] >= positions_T[None, :]

    def attend(
        layer: int, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: tuple[()]
    ) -> tuple[Array, tuple[()]]:
        del layer
        return layers.attention(q_TNH, k_TKH, v_TKH, causal_TS), cache

    x_TE = embed(params, tokens_T, positions_T)
    return run_layers(config, params["layers"], x_TE, positions_T, attend, ())[0]


def _block(config: ModelConfig) -> layers.TransformerBlock:
    return layers.TransformerBlock(config, nnx.Rngs(0))


def _filled(
    build: Callable[[ModelConfig], Built], config: ModelConfig, params: Params
) -> Built:
    """Return the module of `build` with the given weights. Only while tracing."""
    return nnx.merge(_graph(build, config), params)


@functools.cache
def _graph(
    build: Callable[[ModelConfig], Built], config: ModelConfig
) -> nnx.GraphDef[Built]:
    """Return what the module consists of, without weights.

    To find it takes 20 ms for a block, and every layer of every program asks for it.
    """
    return nnx.graphdef(nnx.eval_shape(functools.partial(build, config)))
