"""Hand-offs of KV from mesh to mesh, beside a copy and beside plain JAX."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from disagg_jax.engine import Engine, run_alone
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.request import Request
from disagg_jax.work import Transfer
from experiments.benchmarks.engines import benchmark_engine, only, pool
from experiments.benchmarks.timing import Figure, interleaved, timed_s
from models.config import ModelConfig


def handoff_engine(
    config: ModelConfig,
    src_tp: int,
    dst_tp: int,
    sizes: Sequence[int],
    block_tokens: int,
    layer_groups: int = 1,
) -> Engine:
    """Return a prefill and a decode mesh, for transfers of `sizes` blocks alone.

    One device may stand for two; see `devices_for`.
    """
    return benchmark_engine(
        config,
        f"prefill:tp{src_tp},decode:tp{dst_tp}",
        [pool(config, max(sizes), block_tokens)] * 2,
        [only(transfer_blocks=tuple(sorted(sizes)))] * 2,
        layer_groups=layer_groups,
        virtual=True,
    )


def blocks_of(config: ModelConfig, size_bytes: int, block_tokens: int) -> int:
    """Return how many blocks of a model's KV have `size_bytes`, or a little more."""
    return math.ceil(size_bytes / (config.kv_bytes_per_token * block_tokens))


def plain_device_put(engine: Engine, ids: Sequence[int]) -> Callable[[], None]:
    """Return the hand-off of blocks `ids` as plain JAX: index, `device_put`, `.at[]`.

    The payload is a new array every time, because jax keeps the host's copy of an array
    that passed through the host.
    """
    src, dst = engine.instances
    vector = np.array(ids, np.int32)
    (source,), (target,) = src.programs.stages, dst.programs.stages

    def gather(cache: Cache, ids: Array) -> Cache:
        return [(k[ids], v[ids]) for k, v in cache]

    def insert(cache: Cache, ids: Array, new: Cache) -> Any:
        pairs = zip(cache, new, strict=True)
        return [(k.at[ids].set(x), v.at[ids].set(y)) for (k, v), (x, y) in pairs]

    gathering = jax.jit(gather, out_shardings=source.kv_sharding)
    inserting = jax.jit(insert, out_shardings=target.kv_sharding, donate_argnums=0)

    def run() -> None:
        src_ids, dst_ids = source.put(vector), target.put(vector)
        payload = jax.block_until_ready(gathering(src.cache, src_ids))
        moved = jax.block_until_ready(jax.device_put(payload, target.kv_sharding))
        dst.cache[:] = inserting(dst.cache, dst_ids, moved)
        jax.block_until_ready(dst.cache)

    return run


def scattered_transfer(engine: Engine, blocks: int) -> Transfer:
    """Return a transfer of blocks that lie scattered, as after a while of serving."""
    rng, num_blocks = np.random.default_rng(0), engine.memory[0].num_blocks
    ids = tuple(rng.permutation(num_blocks)[:blocks].tolist())
    request = Request(id=0, arrival_s=0, prompt_tokens=1, max_tokens=1)
    return Transfer(0, request, 0, 1, ids, ids, context=1)


class Rate(NamedTuple):
    """The bandwidth of one way to move KV."""

    pair: str
    way: str
    size_bytes: int
    seconds: float
    copy_s: float  # of as many bytes, on the host, in the same rounds


def rates(
    config: ModelConfig,
    pairs: Sequence[tuple[int, int]],
    sizes_bytes: Sequence[int],
    block_tokens: int,
    layer_groups: int | None,
    repeats: int,
) -> list[Rate]:
    """Measure every way, pair of meshes and size.

    Args:
      layer_groups: of the way that moves each by itself; None leaves it out.
    """
    blocks = sorted({blocks_of(config, size, block_tokens) for size in sizes_bytes})
    found: list[Rate] = []
    for src_tp, dst_tp in pairs:
        engines = {
            way: handoff_engine(config, src_tp, dst_tp, blocks, block_tokens, n)
            for way, n in {"whole": 1, "groups": layer_groups}.items()
            if n is not None
        }
        for n in blocks:
            found += _rates(f"tp{src_tp}->tp{dst_tp}", engines, n, repeats)
    return found


def _rates(
    pair: str, engines: Mapping[str, Engine], blocks: int, repeats: int
) -> list[Rate]:
    """Measure transfers of `blocks` blocks by plain JAX and by each engine.

    The engine called "groups" moves each group of layers by itself.
    """
    whole = engines["whole"]
    transfer = scattered_transfer(whole, blocks)
    stream = dataclasses.replace(transfer, step=1)  # of a step that is not going on
    size = whole.transfer_bytes(transfer)
    source = np.ones(size, np.uint8)
    plain = plain_device_put(whole, transfer.src_blocks)

    def engine_s(way: str) -> float:
        work = stream if way == "groups" else transfer
        return sum(run_alone(engines[way], work)[0])

    seconds = interleaved(
        repeats,
        {
            # numpy's, into a new array
            "copy": lambda: timed_s(source.copy),
            "plain device_put": lambda: timed_s(plain),
            **{way: functools.partial(engine_s, way) for way in engines},
        },
    )
    copy_s = seconds.pop("copy")
    return [Rate(pair, way, size, time_s, copy_s) for way, time_s in seconds.items()]


def handoff_figures(
    config: ModelConfig,
    src_tp: int,
    dst_tp: int,
    mib: Sequence[int],
    block_tokens: int,
    repeats: int,
) -> list[Figure]:
    """Measure transfers of each size, against a copy and against device_put."""
    blocks = {n: blocks_of(config, n * 2**20, block_tokens) for n in mib}
    sizes = sorted(set(blocks.values()))
    engine = handoff_engine(config, src_tp, dst_tp, sizes, block_tokens)
    figures: list[Figure] = []
    for n in mib:
        plain, ours = _rates("", {"whole": engine}, blocks[n], repeats)
        gigabytes, copy_s = ours.size_bytes / 1e9, ours.copy_s
        against_copy = Figure(
            part="handoff",
            name=f"TP{src_tp}->TP{dst_tp} {n} MiB",
            measured=gigabytes / ours.seconds,
            bound=gigabytes / copy_s,
            unit="GB/s",
            bound_name="numpy copy into a new array",
            aim=0.6 if src_tp == dst_tp else None,
        )
        figures += [
            against_copy,
            dataclasses.replace(
                against_copy,
                bound=gigabytes / copy_s / 3,
                bound_name="three such copies: gather, device_put, insert",
                aim=None,
            ),
            dataclasses.replace(
                against_copy,
                bound=gigabytes / plain.seconds,
                bound_name="index, device_put, .at[].set",
                aim=None if src_tp == dst_tp else 2.0,
            ),
        ]
    return figures
