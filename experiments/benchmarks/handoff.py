"""Hand-offs of KV from mesh to mesh: an engine for them, and what they are held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine.attention.kv_cache import Cache
from disagg_jax.engine.executor import run_alone
from disagg_jax.request import Request
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.work import Transfer
from experiments.benchmarks.engines import NO_STEPS, Rig
from experiments.benchmarks.timing import Figure, interleaved, timed_s
from models.config import ModelConfig


def handoff_rig(
    config: ModelConfig,
    src_tp: int,
    dst_tp: int,
    sizes: Sequence[int],
    block_tokens: int,
    layer_groups: int = 1,
) -> Rig:
    """A prefill and a decode mesh, for transfers of `sizes` blocks and nothing else."""
    memory = KVMemory(
        num_blocks=max(sizes), block_tokens=block_tokens, max_context=config.max_length
    )
    transfers = dataclasses.replace(NO_STEPS, transfer_blocks=tuple(sorted(sizes)))
    return Rig.build(
        config,
        f"prefill:tp{src_tp},decode:tp{dst_tp}",
        {Role.PREFILL: PrefillOnly(), Role.DECODE: DecodeOnly()},
        [memory] * 2,
        [transfers] * 2,
        layer_groups,
    )


def plain_device_put(rig: Rig, ids: Sequence[int]) -> Callable[[], None]:
    """The hand-off of blocks `ids` as JAX has it: index, `jax.device_put`, `.at[].set`.

    The payload is a new array every time, because jax keeps the host's copy of one that
    passed through it.
    """
    src, dst = rig.engine.instances
    vector = np.array(ids, np.int32)
    (source,), (target,) = src.model.stages, dst.model.stages

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


def scattered_transfer(rig: Rig, blocks: int) -> Transfer:
    """Of blocks that lie scattered, as they do after a while of serving."""
    pool = rig.engine.instances[0].model.memory.num_blocks
    ids = tuple(np.random.default_rng(0).permutation(pool)[:blocks].tolist())
    request = Request(id=0, arrival_s=0, prompt_tokens=1, max_tokens=1)
    return Transfer(0, request, 0, 1, ids, ids, context=1)


def handoff_s(
    rig: Rig,
    transfer: Transfer,
    ways: Mapping[str, Callable[[], float]],
    repeats: int,
) -> dict[str, float]:
    """Median seconds of `ways` to do `transfer`, and of what they are held against.

    "copy" is a numpy copy of as many bytes into a new array; "plain device_put" the
    hand-off as JAX has it; see `plain_device_put`.
    """
    source = np.ones(rig.engine.transfer_bytes(transfer), np.uint8)
    plain = plain_device_put(rig, transfer.src_blocks)
    return interleaved(
        repeats,
        {
            "copy": lambda: timed_s(source.copy),
            "plain device_put": lambda: timed_s(plain),
            **ways,
        },
    )


def handoff_figures(
    name: str, rig: Rig, blocks: int, repeats: int, equal: bool
) -> list[Figure]:
    """Of one transfer, against a copy and against device_put.

    Args:
      equal: whether the two meshes are alike.
    """
    transfer = scattered_transfer(rig, blocks)
    ours = {"ours": lambda: sum(run_alone(rig.engine, transfer)[0])}
    seconds = handoff_s(rig, transfer, ours, repeats)
    size = rig.engine.transfer_bytes(transfer)
    rate = {side: size / value / 1e9 for side, value in seconds.items()}

    def figure(bound: float, bound_name: str, aim: float | None = None) -> Figure:
        return Figure(
            part="handoff",
            name=name,
            measured=rate["ours"],
            bound=bound,
            unit="GB/s",
            bound_name=bound_name,
            aim=aim,
        )

    return [
        figure(rate["copy"], "numpy copy into a new array", 0.6 if equal else None),
        figure(rate["copy"] / 3, "three such copies: gather, device_put, insert"),
        figure(
            rate["plain device_put"],
            "index, device_put, .at[].set",
            None if equal else 2.0,
        ),
    ]
