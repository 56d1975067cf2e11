"""The hand-off of KV from a prefill pool to a decode pool."""

from __future__ import annotations

import dataclasses

from disagg_jax.engine.attention.registry import choose_kernel
from disagg_jax.sim.hardware.link import LinkSpec
from experiments.benchmarks.handoff import rates
from experiments.benchmarks.peaks import spec_sheet
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import Sizes
from experiments.two_meshes import Cut, handoff_table, link_between

_MIB = 2**20


def bound(sizes: Sizes) -> LinkSpec | None:
    """Return what KV goes over; None where it is not known.

    On one device that is its memory: bytes are read and written to leave a pool, and
    once more to enter the other.
    """
    if sizes.devices.count > 1:
        return link_between(sizes.devices.kind)
    if (spec := spec_sheet()) is None:
        return None
    return LinkSpec(
        name="memory, four times",
        latency_s=0.0,
        bandwidth_bytes_s=spec.hbm_bytes_s / 4,
        efficiency=1.0,
    )


def run(bench: Bench) -> Found:
    """Move KV of each size, by the engine and by plain JAX."""
    sizes, config = bench.sizes, bench.sizes.config
    kernel = choose_kernel(sizes.attention, sizes.devices.platform, config).kernel
    if shared := sizes.devices.count < 2:
        print("the two pools share one device: KV crosses no link, and is copied in it")
    kv_only = dataclasses.replace(config, vocab_size=1, mlp=1)  # its sizes, but weights
    mib = [n for n in sizes.handoff_mib if 8 * n * _MIB <= sizes.devices.room_bytes]
    found = rates(
        kv_only,
        [(1, 1)],
        [n * _MIB for n in mib],
        kernel.block_tokens,
        None,
        sizes.repeats,
    )
    print(handoff_table(found, Cut(prefill=1, decode=1), bound(sizes)))
    most = max(rate.size_bytes / rate.seconds for rate in found if rate.way == "whole")
    return Found(f"{most / 1e9:.3g} GB/s" + (", one device" if shared else ""))


PART = Part(name="handoff", about="KV from pool to pool", run=run)
