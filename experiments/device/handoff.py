"""The hand-off of KV from a prefill pool to a decode pool."""

from __future__ import annotations

import dataclasses

from disagg_jax.engine.attention.registry import choose_kernel
from disagg_jax.sim.hardware.link import LinkSpec
from experiments.benchmarks.handoff import rates
from experiments.benchmarks.peaks import spec_sheet
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import DeviceSizes
from experiments.two_meshes import (
    Cut,
    build,
    check_tokens,
    handoff_table,
    link_between,
)

_MIB = 2**20


def bound(sizes: DeviceSizes) -> LinkSpec | None:
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
    """Move KV of each size, and compare tokens of two pools with those of one."""
    sizes, config, attention = bench.sizes, bench.sizes.config, bench.sizes.attention
    kernel = choose_kernel(attention, sizes.devices, config).kernel
    cut = Cut(prefill=1, decode=1)
    if shared := sizes.devices.count < 2:
        print("the two pools share one device: KV crosses no link, and is copied in it")
    mib = [n for n in sizes.handoff_mib if 8 * n * _MIB <= sizes.devices.room_bytes]
    found = rates(
        dataclasses.replace(config, vocab_size=1, mlp=1),  # as much KV, fewer weights
        [(1, 1)],
        [n * _MIB for n in mib],
        kernel.block_tokens,
        None,
        sizes.repeats,
    )
    print(handoff_table(found, cut, bound(sizes)))
    most = max(rate.size_bytes / rate.seconds for rate in found if rate.way == "whole")
    said = f"{most / 1e9:.3g} GB/s" + (" in one device" if shared else "")
    if bench.deadline.passed():
        return Found(said, left_out="tokens of two pools")
    meshes = build(config, cut, attention, kernel.block_tokens, virtual=True)
    tokens = check_tokens(config, meshes, attention)
    print(f"\n{tokens}")
    equal = tokens.equal == tokens.total
    return Found(f"{said}; {tokens}", wrong=tokens.exact and not equal)


PART = Part(name="handoff", about="KV from pool to pool", run=run)
