"""Accelerators that programs are compiled for, without one in this machine.

XLA's compilers for TPUs and NVIDIA GPUs run on an x86-64 Linux host. A TPU's is in the
wheel `libtpu`, which knows its topologies by name; a GPU's is in jax's CUDA plugin, and
is told what the GPU is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from disagg_jax.errors import require
from disagg_jax.sim.hardware import HARDWARE, Hardware
from sharding.mesh import Device


class _Tpu(NamedTuple):
    """A chip that libtpu knows by name."""

    hardware: str  # its spec sheet
    clock_ghz: float  # that gives the spec sheet's FLOPs
    memory_gib: float  # what libtpu 0.0.42 says there is, to a program too large for it


_TPUS = {
    "v5e": _Tpu("tpu-v5e", 1.5, 15.75),
    "v5p": _Tpu("tpu-v5p", 1.75, 95.74),
    "v6e": _Tpu("tpu-v6e", 1.75, 31.25),
}
# Read by libtpu when it is loaded. It must not ask a cloud's metadata server where it
# is, nor refuse to be loaded by two processes: no chip is in use.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class _Gpu(NamedTuple):
    """What XLA compiles for: github.com/openxla/xla, backends/gpu/target_config."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # of a core
    shared_bytes: tuple[int, int]  # of a core; of a block that asks for most
    l2_bytes: int
    clock_ghz: float
    bandwidth_bytes_s: int
    memory_bytes: int


_HOPPER_SHARED = (233472, 232448)
_GPUS = {
    "a100-80g": _Gpu(
        *((8, 0), 108, 64, (167936, 166912), 40 * 2**20, 1.41),
        *(2_039_040_000_000, 85_100_068_864),
    ),
    "h100": _Gpu(
        *((9, 0), 132, 128, _HOPPER_SHARED, 50 * 2**20, 1.98),
        *(3_352_320_000_000, 84_942_979_072),
    ),
    "h200": _Gpu(
        *((9, 0), 132, 128, _HOPPER_SHARED, 50 * 2**20, 1.98),
        *(4_800_000_000_000, 151_397_597_184),
    ),
    "b200": _Gpu(
        *((10, 0), 148, 128, _HOPPER_SHARED, 132_644_864, 1.965),
        *(7_672_320_000_000, 191_514_411_008),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """Devices that are not there."""

    name: str  # as it was asked for
    hardware: Hardware  # the peaks that bounds are made of
    memory_bytes: float  # of a device, for programs
    clock_hz: float
    devices: Sequence[Device]

    @classmethod
    def parse(cls, text: str) -> CompileTarget:
        """Describe a TPU topology ("v6e:2x4"), or a number of GPUs ("h100:8").

        JAX must not have started on an accelerator of this machine: it is told to use
        the host alone.

        Raises:
          ValueError: if there is no such target, or its compiler is not installed; with
            the command that installs it.
        """
        kind, _, size = text.partition(":")
        known = f"{', '.join(_TPUS)} with a topology (v6e:2x4), or "
        known += f"{', '.join(_GPUS)} with a number of devices (h100:8)"
        ok = kind in _TPUS or (kind in _GPUS and size.isdecimal() and int(size) > 0)
        require(ok and bool(size), f"target: expected one of {known}", text)
        extra = missing_wheel(text)
        if extra is not None:
            raise ValueError(
                f"target: {text} needs a compiler that is not installed: "
                f"pip install -e '.[{extra}]'"
            )
        jax.config.update("jax_platforms", "cpu")
        if kind in _TPUS:
            tpu = _TPUS[kind]
            return cls(
                name=text,
                hardware=HARDWARE[tpu.hardware],
                memory_bytes=tpu.memory_gib * 2**30,
                clock_hz=tpu.clock_ghz * 1e9,
                devices=_tpu_devices(text),
            )
        return cls(
            name=text,
            hardware=HARDWARE[kind],
            memory_bytes=_GPUS[kind].memory_bytes,
            clock_hz=_GPUS[kind].clock_ghz * 1e9,
            devices=_gpu_devices(_GPUS[kind], int(size)),
        )


def missing_wheel(text: str) -> str | None:
    """Return the extra that brings the compiler of a target; None if it is there."""
    names, extra = ("libtpu",), "tpu"
    if text.partition(":")[0] in _GPUS:
        names, extra = ("jax_cuda12_plugin", "jax_cuda13_plugin"), "compile-cuda"
    there = any(importlib.util.find_spec(name) for name in names)
    return None if there else extra


def _tpu_devices(name: str) -> Sequence[Device]:
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        expected = f"target: expected a topology of {name.partition(':')[0]}"
        raise ValueError(f"{expected}, got '{name}': {error}") from error


def _gpu_devices(gpu: _Gpu, count: int) -> Sequence[Device]:
    # The name must be empty: "1x1x8" there is "without an explicit topology shape".
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{count}",  # slices, hosts, devices of a host
        target_config=_target_config(gpu),
    ).devices


def _target_config(gpu: _Gpu) -> str:
    """Return a GpuTargetConfigProto as text."""
    major, minor = gpu.capability
    core_bytes, block_bytes = gpu.shared_bytes
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_core: {core_bytes}
  shared_memory_per_block_optin: {block_bytes}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth_bytes_s}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
"""
