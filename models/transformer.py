"""A decoder-only transformer as pure functions of a nested dict of weights.

Shape letters, in names and in einsum:

    T  tokens of one call: flat, any mix of requests   S  key positions
    E  embed                                            F  mlp
    N  query heads                                      K  kv heads
    H  head_dim                                         V  vocab
    L  layers, the leading axis of every stacked layer weight

    params = {
        "embed": [V, E],
        "layers": {
            "attention_norm": {"scale": [L, E]},
            "attention": {"wq": [L, E, N, H], "wk": [L, E, K, H],
                          "wv": [L, E, K, H], "wo": [L, N, H, E]},
            "mlp_norm": {"scale": [L, E]},
            "mlp": {"w_gate": [L, E, F], "w_up": [L, E, F], "w_down": [L, F, E]},
        },
        "final_norm": {"scale": [E]},
        "unembed": [E, V],  # absent where the embedding is tied
    }

Flax NNX builds the weights and takes no part in a step: a stacked plain pytree is the
cheapest thing to pass to a jitted function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from models import layers
from models.config import ModelConfig
from models.layers import Cache

Params: TypeAlias = dict[str, Any]  # nested; leaves are arrays, see the top

# attend(layer, q_TNH, k_TKH, v_TKH, cache) -> (out_TNH, cache): what a request's tokens
# see of each other is the caller's business. `layer` is a traced int32 scalar.
Attend: TypeAlias = Callable[[Array, Array, Array, Array, Cache], tuple[Array, Cache]]


class Transformer(nnx.Module):
    """Builds the weights; its state is `Params`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        # The variance of an embedding is 1 / E, as if it were a matmul's weight: a tied
        # random model would otherwise do no more than repeat its last token.
        self.embed = layers.weight(config, rngs, "vocab", "embed", fan_in=("embed",))
        self.layers = layers.Block(config, rngs)
        self.final_norm = layers.RMSNorm(config, "embed")
        if not config.tie_embeddings:
            axes = ("embed", "vocab")
            self.unembed = layers.weight(config, rngs, *axes, fan_in=("embed",))


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, seed: int | Array) -> Params:
    """Random weights, the same for the same seed however they are sharded.

    Jitted; may be wrapped in another `jax.jit` with `out_shardings`, and then no device
    holds more than its shards.
    """
    model = Transformer(config, nnx.Rngs(jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model))


def param_shapes(config: ModelConfig) -> Params:
    """`Params` of `jax.ShapeDtypeStruct`; nothing is allocated."""
    return jax.eval_shape(functools.partial(init_params, config), 0)


def param_axes(config: ModelConfig) -> Params:
    """`Params` whose leaves are tuples with the logical name of each dimension."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model), lambda param: param.get_metadata("axes"))


def split_layers(layer_params: Params, bounds: Sequence[int]) -> list[Params]:
    """Cuts `params["layers"]` into consecutive groups, each its own `run_layers`.

    Args:
      bounds: `[0, ..., L]`, increasing: group i is layers `bounds[i]` to
        `bounds[i + 1]`, the latter excluded.

    Raises:
      ValueError: if the bounds do not cover every layer once.
    """
    num_layers = _num_layers(layer_params)
    ends = list(bounds)
    increasing = all(a < b for a, b in zip(ends, ends[1:], strict=False))
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != num_layers or not increasing:
        raise ValueError(
            f"bounds: expected increasing layer numbers from 0 to {num_layers}, "
            f"got {ends}"
        )
    return [
        jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], layer_params)
        for a, b in zip(ends, ends[1:], strict=False)
    ]


def embed(params: Params, tokens_T: Array) -> Array:
    """Token ids to `[T, E]`. Needs `params["embed"]` only."""
    with jax.named_scope("embed"):
        return params["embed"][tokens_T]


def run_layers(
    config: ModelConfig,
    layer_params: Params,
    x_TE: Array,
    positions_T: Array,
    attend: Attend[Cache],
    cache: Cache,
) -> tuple[Array, Cache]:
    """Runs a group of consecutive layers.

    Args:
      layer_params: all of `params["layers"]`, or a part made by `split_layers`.
      positions_T: each token's position in its own request, for the rotary embedding.
      attend: called once, while tracing; its `layer` counts from 0 within this group.
      cache: any pytree with what `attend` keeps for the whole group. It travels in the
        carry of the scan over layers, where XLA updates it in place; as the scan's
        input and output it would be copied (SmolLM2 on a CPU: 338 ms a step, not 71).

    Returns:
      The residual stream after the last layer, and the cache as `attend` left it.
    """
    table = layers.rope_table(positions_T, config.head_dim, config.rope_theta)

    def layer(
        carry: tuple[Array, Cache], inputs: tuple[Array, Params]
    ) -> tuple[tuple[Array, Cache], None]:
        index, params = inputs
        block = _block(config, params)
        return block(carry[0], table, functools.partial(attend, index), carry[1]), None

    indices_L = jnp.arange(_num_layers(layer_params), dtype=jnp.int32)
    with jax.named_scope("layers"):
        carry, _ = lax.scan(layer, (x_TE, cache), (indices_L, layer_params))
    return carry


def unembed(config: ModelConfig, params: Params, x_TE: Array) -> Array:
    """The residual stream to float32 logits `[T, V]`, final norm included.

    Needs `params["final_norm"]`, and `params["unembed"]` or, where tied, `["embed"]`.
    """
    with jax.named_scope("unembed"):
        x_TE = layers.rms_norm(x_TE, params["final_norm"]["scale"], config.norm_eps)
        if config.tie_embeddings:
            return layers.einsum("TE,VE->TV", x_TE, params["embed"], jnp.float32)
        return layers.einsum("TE,EV->TV", x_TE, params["unembed"], jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params: Params, tokens_T: Array) -> Array:
    """Logits `[T, V]` of one sequence, all at once and without a cache.

    The oracle: whatever batching, paging and sharding do, they must agree with this.
    """
    return unembed(config, params, _hidden(config, params, tokens_T))


def greedy(
    config: ModelConfig, params: Params, prompt: Sequence[int], n: int
) -> list[int]:
    """The `n` tokens that follow `prompt`, each the likeliest, without a cache.

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
    return tokens_T[len(prompt) : total].tolist()


@functools.partial(jax.jit, static_argnums=0)
def _extend(
    config: ModelConfig, params: Params, tokens_T: Array, start: int, stop: int
) -> Array:
    """Fills positions `start` to `stop` of `tokens_T` with greedy tokens."""

    def step(position: Array, tokens_T: Array) -> Array:
        x_TE = _hidden(config, params, tokens_T)
        last_1E = lax.dynamic_slice_in_dim(x_TE, position - 1, 1)
        logits_1V = unembed(config, params, last_1E)
        token = jnp.argmax(logits_1V[0]).astype(tokens_T.dtype)
        return tokens_T.at[position].set(token)

    return lax.fori_loop(start, stop, step, tokens_T)


def _hidden(config: ModelConfig, params: Params, tokens_T: Array) -> Array:
    """The residual stream `[T, E]` of one sequence after the last layer."""
    positions_T = jnp.arange(tokens_T.shape[0])
    causal_TS = positions_T[:, None] >= positions_T[None, :]

    def attend(
        layer: Array, q_TNH: Array, k_TKH: Array, v_TKH: Array, cache: tuple[()]
    ) -> tuple[Array, tuple[()]]:
        del layer
        return layers.attention(q_TNH, k_TKH, v_TKH, causal_TS), cache

    x_TE = embed(params, tokens_T)
    return run_layers(config, params["layers"], x_TE, positions_T, attend, ())[0]


def _num_layers(layer_params: Params) -> int:
    return jax.tree.leaves(layer_params)[0].shape[0]


def _block(config: ModelConfig, params: Params) -> layers.Block:
    """A block around the given weights of one layer. Happens while tracing."""
    abstract = nnx.eval_shape(lambda: layers.Block(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)
