"""The measured peaks of a device, and the bound that they set on a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from disagg_jax.deployment import Parallelism
from disagg_jax.sim.cost.roofline import RooflineInstance
from disagg_jax.sim.hardware import HARDWARE, Hardware, Partition
from disagg_jax.work import StepLoad
from experiments.benchmarks.timing import timed_s
from models.config import ModelConfig

# What JAX calls a device -> its spec sheet.
_SPEC_SHEETS = {
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA GB300": "gb300",
    "NVIDIA L40S": "l40s",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5": "tpu-v5p",
    "TPU v6 lite": "tpu-v6e",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """Memory bandwidth and arithmetic of one device."""

    bytes_s: float  # reading memory
    flops: float  # dense matmul in the model's dtype, FLOP/s

    def hardware(self) -> Hardware:
        """Return a device that reaches these peaks in full and has no overhead."""
        return dataclasses.replace(
            HARDWARE["cpu"].ideal(),
            name="measured",
            peak_flops=self.flops,
            hbm_bytes_s=self.bytes_s,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBound:
    """The least work of a step on one device, without anything an engine adds.

    Weights are read once, and so is the KV of the cached context; prompt attention is
    causal. As in the roofline, decode attention has no FLOPs.
    """

    size_bytes: float
    flops: float
    seconds: float  # the longer of moving and computing, for each kind of layer

    @classmethod
    def of(cls, model: ModelConfig, load: StepLoad, peaks: Peaks) -> StepBound:
        """Return the bound of a model on one device."""
        (bound,) = cls.of_stages(model, load, peaks, 1)
        return bound

    @classmethod
    def of_stages(
        cls, model: ModelConfig, load: StepLoad, peaks: Peaks, pp: int
    ) -> list[StepBound]:
        """Apply the roofline to each of `pp` pipeline stages, of one device each.

        Bytes are its seconds at 1 byte/s, FLOPs at 1 FLOP/s.
        """
        partition = Partition(model, Parallelism(pp=pp))

        def seconds(bytes_s: float, flops: float) -> tuple[float, ...]:
            hardware = Peaks(bytes_s=bytes_s, flops=flops).hardware()
            return RooflineInstance(partition, hardware).stages_s(load)

        of_each = zip(
            seconds(1.0, math.inf),
            seconds(math.inf, 1.0),
            seconds(peaks.bytes_s, peaks.flops),
            strict=True,
        )
        return [cls(size_bytes=b, flops=f, seconds=s) for b, f, s in of_each]


def spec_sheet() -> Hardware | None:
    """Return the spec sheet of the first device, if it is a known accelerator."""
    name = _SPEC_SHEETS.get(jax.devices()[0].device_kind)
    return None if name is None else HARDWARE[name]


def peak_probes(dtype: str) -> tuple[Mapping[str, Callable[[], float]], Peaks]:
    """Return timers of two programs, and the bytes and FLOPs of one run of each.

    No cache holds their arrays, and beside their time an accelerator's launch is small.
    """
    on_host = jax.default_backend() == "cpu"
    stream_bytes = 2**28 if on_host else 2**32
    side = 2048 if on_host else 8192
    stream = jax.jit(lambda: jnp.ones(stream_bytes // 4, jnp.float32))()
    matrix = jax.jit(lambda: jnp.ones((side, side), jnp.dtype(dtype)))()
    read = jax.jit(jnp.sum).lower(stream).compile()
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    timers = {
        "read": lambda: timed_s(lambda: read(stream).block_until_ready()),
        "matmul": lambda: timed_s(lambda: multiply(matrix, matrix).block_until_ready()),
    }
    return timers, Peaks(bytes_s=stream_bytes, flops=2.0 * side**3)
