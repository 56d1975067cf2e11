"""Attention of one layer: its time beside the KV that it reads, and its errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from disagg_jax.deployment import KVMemory
from disagg_jax.engine.attention.entries import Entries
from disagg_jax.engine.attention.kernel import AttentionKernel
from disagg_jax.engine.attention.kv_cache import AXES, Cache, LayerCache
from disagg_jax.engine.attention.step import step_attend
from disagg_jax.programs.shapes import StepShape, split_decodes
from disagg_jax.programs.slices import slices_of
from disagg_jax.work import Slice
from experiments.benchmarks.timing import Figure, interleaved, timed_s
from models.config import ModelConfig
from sharding import RULES, make_mesh, named_sharding

# -- time ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Rows of equal context, their blocks anywhere in the pool."""

    rows: int = 256
    tokens: Sequence[int] = (16_384, 49_152)  # that all rows attend to together
    block_tokens: int = 64
    dtype: str = "float32"
    # Those of Llama-3-8B.
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


class DecodeArguments(NamedTuple):
    """The arguments of `AttentionKernel.decodes`."""

    q_BNH: Array
    layer: LayerCache
    position_B: Array
    entries: Entries


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Return normal numbers, drawn on the device."""
    return _normal(jax.random.key(seed), shape, jnp.dtype(dtype))


_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


def random_decodes(shape: AttentionShape, tokens: int) -> DecodeArguments:
    """Return decodes over `tokens` tokens of KV, drawn on the device."""
    each = -(-tokens // shape.rows // shape.block_tokens)
    blocks = shape.rows * each
    pool = (blocks, shape.kv_heads, shape.block_tokens, shape.head_dim)
    rows = (shape.rows, shape.q_heads, shape.head_dim)
    shapes = (pool, pool, rows)
    k, v, q_BNH = (draw(i, each, shape.dtype) for i, each in enumerate(shapes))
    entries = Entries(
        jnp.array(np.random.default_rng(0).permutation(blocks)),
        jnp.array(np.repeat(np.arange(shape.rows), each)),
        jnp.array(np.tile(np.arange(each) * shape.block_tokens, shape.rows)),
    )
    position_B = jnp.full(shape.rows, tokens // shape.rows - 1)
    return DecodeArguments(q_BNH, (k, v), position_B, entries)


def read_s(layer: LayerCache) -> Callable[[], float]:
    """Compile one read of k and v; return a timer of it."""
    total = jax.jit(lambda layer: sum(map(jnp.sum, layer), start=jnp.zeros(())))
    return lambda: timed_s(lambda: total(layer).block_until_ready())


def attention_s(
    attend: Callable[..., Array], q: Array, *args: Any, steps: int = 1
) -> Callable[[], float]:
    """Return a timer of the mean seconds of `attend(q, *args)`; see `repeated`."""
    run = repeated(attend, steps)
    return lambda: timed_s(lambda: run(q, *args).block_until_ready()) / steps


def repeated(attend: Callable[..., Array], steps: int) -> Callable[..., Array]:
    """Return `steps` calls of `attend(q, *args)` in one program.

    The output of each is the queries of the next. So a launch from the host does not
    hide the time of a short one.
    """

    @jax.jit
    def run(q: Array, *args: Any) -> Array:
        def step(_: Array, q: Array) -> Array:
            # Else what does not depend on the queries is computed once for all.
            q, each = lax.optimization_barrier((q, args))
            return attend(q, *each)

        return lax.fori_loop(0, steps, step, q) if steps > 1 else attend(q, *args)

    return run


def attention_figure(
    shape: AttentionShape, kernel: AttentionKernel, tokens: int, repeats: int
) -> Figure:
    """Measure attention to `tokens` tokens of KV, and a sum over that KV."""
    decodes = random_decodes(shape, tokens)
    timers = {
        "attend": attention_s(kernel.decodes, *decodes),
        "read": read_s(decodes.layer),
    }
    found_s = interleaved(repeats, timers)
    return Figure(
        part="attention",
        name=f"B{shape.rows} over {tokens} tokens",
        measured=found_s["attend"] * 1e3,
        bound=found_s["read"] * 1e3,
        unit="ms",
        bound_name="its KV read once",
        better="less",
        aim=5.0,
    )


# -- errors ----------------------------------------------------------------------------

QKV: TypeAlias = Sequence[Array]  # of some tokens of a request, [tokens, heads, H] each
# Of a step, (start, count) of each slice: a decode is one token after others. Contexts
# are less than a block, a block, more than one, and many.
STEPS: Mapping[str, Sequence[tuple[int, int]]] = {
    "prompts": ((0, 5), (0, 64), (0, 131)),
    "decodes": ((1, 1), (63, 1), (64, 1), (200, 1), (130, 1)),
    "chunks": ((64, 33), (37, 60), (0, 50), (90, 1), (128, 1)),
}
_ALIKE = 64  # tokens and blocks of a step are padded to a multiple, as an engine does


def step_error(kernel: AttentionKernel, config: ModelConfig, step: str) -> float:
    """Return the relative error of a step's attention against float64 on the host.

    The error is the norm of the difference over the norm of what it should be. KV that
    is there before is written by the kernel's own prompts, into a pool of NaN.

    Args:
      step: a key of `STEPS`.
    """
    parts, size = STEPS[step], kernel.block_tokens
    memory = KVMemory(
        num_blocks=sum(-(-(start + n) // size) for start, n in parts) + 1,
        block_tokens=size,
        max_context=max(start + n for start, n in parts),
    )
    slices = slices_of(parts, memory)
    rng, dtype = np.random.default_rng(0), jnp.dtype(config.dtype)
    heads = (config.q_heads, config.kv_heads, config.kv_heads)

    def draw(part: Slice) -> QKV:
        tokens = part.start + part.count
        shapes = [(tokens, n, config.head_dim) for n in heads]
        return [jnp.array(rng.standard_normal(shape), dtype) for shape in shapes]

    whole = [draw(part) for part in slices]
    run = _AttentionSteps(kernel, config, memory)
    starts = [part.start for part in slices]
    if any(starts):
        known = [i for i, n in enumerate(starts) if n]
        run(
            [_first(slices[i], starts[i], memory) for i in known],
            [[x[: starts[i]] for x in whole[i]] for i in known],
        )
    pairs = list(zip(whole, starts, strict=True))
    got = run(slices, [[x[n:] for x in qkv] for qkv, n in pairs])
    want = [_plain(_double(q), _double(k), _double(v), n) for (q, k, v), n in pairs]
    out, right = np.concatenate(got), np.concatenate(want)
    return float(np.linalg.norm(out - right) / np.linalg.norm(right))


def _first(part: Slice, tokens: int, memory: KVMemory) -> Slice:
    """Return the prompt of a request's first tokens, in the same blocks."""
    blocks = part.blocks[: memory.blocks_for(tokens)]
    return dataclasses.replace(
        part, start=0, count=tokens, blocks=blocks, tokens=(0,) * tokens
    )


class _AttentionSteps:
    """Attention of steps on one device, to a pool of NaN at first."""

    def __init__(self, kernel: AttentionKernel, config: ModelConfig, memory: KVMemory):
        self._kernel, self._memory = kernel, memory
        mesh = make_mesh(jax.devices()[:1])
        self._sharding = named_sharding(mesh, AXES, RULES["colocated"])
        part = kernel.part_spec(config, memory, config.kv_heads, self._sharding)
        empty = jnp.full(part.shape, jnp.nan, part.dtype)
        self._cache: Cache = [(empty, empty)]

    def __call__(self, slices: Sequence[Slice], qkv: Sequence[QKV]) -> list[np.ndarray]:
        """Return the output `[count, N, H]` of each slice, given its q, k and v."""
        shape = _shape_of(slices)
        chunks, decodes = split_decodes(slices, shape.decodes)
        # Decodes come first in a step, see `packing.pack`.
        order = [*range(len(chunks), len(slices)), *range(len(chunks))]
        counts = [slices[i].count for i in order]
        padding = ((0, shape.tokens - sum(counts)), (0, 0), (0, 0))
        joined = [
            jnp.pad(jnp.concatenate([qkv[i][of] for i in order]), padding)
            for of in range(3)
        ]
        fields = self._kernel.fields(shape, self._memory.block_tokens)

        @jax.jit
        def attend(
            packed: Array, cache: Cache, q: Array, k: Array, v: Array
        ) -> tuple[Array, Cache]:
            inputs = fields.split(packed)
            step = step_attend(shape, inputs, self._kernel, self._sharding)
            return step(0, q, k, v, cache)

        packed = jnp.array(self._kernel.pack(shape, slices, self._memory))
        out, self._cache = attend(packed, self._cache, *joined)
        pieces = np.split(_double(out), np.cumsum(counts))
        return [pieces[order.index(i)] for i in range(len(slices))]


def _shape_of(slices: Sequence[Slice]) -> StepShape:
    """Return a shape that holds the slices of one of `STEPS`, with some padding."""
    decodes = [part for part in slices if part.is_decode]
    chunks = [part for part in slices if not part.is_decode]
    of_all, of_chunks, of_decodes = (
        math.ceil(sum(sizes) / _ALIKE) * _ALIKE
        for sizes in (
            [part.count for part in slices],
            [len(part.blocks) for part in chunks],
            [len(part.blocks) for part in decodes],
        )
    )
    rows = 8  # none has more slices
    if not any(part.start for part in slices):
        return StepShape.prefill(of_all, rows)
    if not chunks:
        return StepShape.decode(rows, of_decodes)
    return StepShape.mixed(of_all, rows, of_chunks, rows, of_decodes)


def _double(x: Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _plain(
    q_SNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, start: int
) -> np.ndarray:
    """Return causal attention of the queries from `start` on."""
    group = q_SNH.shape[1] // k_SKH.shape[1]
    k_SNH, v_SNH = (np.repeat(x, group, axis=1) for x in (k_SKH, v_SKH))
    scores = np.einsum("tnh,snh->nts", q_SNH[start:], k_SNH) * q_SNH.shape[-1] ** -0.5
    S = scores.shape[-1]
    scores[:, np.arange(start, S)[:, None] < np.arange(S)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v_SNH)
