"""The least that a program must move and compute on each device of its mesh.

Weights are read once, and so is the KV of the context; new KV is written. FLOPs are 2
for each weight and token, and those of attention. A transfer reads the KV once and
writes it once. All are spread evenly over the devices: heads that a layout repeats or
pads are no part of a bound.
"""

from __future__ import annotations

import dataclasses

from disagg_jax.deployment import cut_layers
from disagg_jax.sim.hardware import Hardware
from disagg_jax.work import StepLoad
from experiments.benchmarks.peaks import Peaks, StepBound
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramBound:
    """The least work of a program on one device."""

    size_bytes: float
    flops: float

    def seconds(self, hardware: Hardware) -> float:
        """Return the longer of moving and computing: the roofline."""
        moving_s = self.size_bytes / hardware.hbm_bytes_s
        return max(moving_s, self.flops / hardware.peak_flops)


def step_bound(
    config: ModelConfig, load: StepLoad, tp: int, pp: int = 1, stage: int = 0
) -> ProgramBound:
    """Return the bound of a step on a device of one of `pp` stages."""
    peaks = Peaks(bytes_s=1.0, flops=1.0)  # seconds are not asked for
    every = tuple((0, count) for _, count in load.chunks)
    fresh = StepBound.of_stages(config, StepLoad(every, load.decodes, 0), peaks, pp)
    whole = StepBound.of_stages(config, load, peaks, pp)
    weight_bytes = fresh[stage].size_bytes
    read_bytes = whole[stage].size_bytes - weight_bytes
    layers = len(cut_layers(range(config.layers), pp)[stage])
    tokens = load.decodes + load.prompt_tokens
    written_bytes = tokens * kv_token_bytes(config, layers)
    # `StepBound` leaves the FLOPs of decode attention out.
    pairs = load.context * layers
    return ProgramBound(
        size_bytes=weight_bytes / tp
        + (read_bytes + written_bytes) / min(tp, config.kv_heads),
        flops=(whole[stage].flops + 4 * pairs * config.q_heads * config.head_dim) / tp,
    )


def transfer_bound(
    config: ModelConfig, tokens: int, layers: int, tp: int
) -> ProgramBound:
    """Return the bound of a gather, or an insert, of KV on a device of one end."""
    kv_bytes = tokens * kv_token_bytes(config, layers) / min(tp, config.kv_heads)
    return ProgramBound(size_bytes=2 * kv_bytes, flops=0)


def kv_token_bytes(config: ModelConfig, layers: int) -> int:
    """Return the bytes of KV of a token in `layers` layers, on all devices together."""
    return 2 * layers * config.kv_heads * config.head_dim * config.dtype_bytes
