"""A device as a roofline sees it: peaks, memory, and the share of them that is reached.

Efficiencies are measured points, not fits, and interpolated between the points. The
presets are in presets.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

from disagg_jax.errors import require
from disagg_jax.sim.hardware.link import LinkSpec

_POSITIVE = ("peak_flops", "hbm_bytes_s", "memory_bytes", "tile_rows", "node_devices")


@dataclasses.dataclass(frozen=True, slots=True)
class EfficiencyCurve:
    """The share of a peak that is reached, by size.

    It is linear between two points and constant outside them. size / efficiency must
    not fall from one point to the next, or a larger problem would take less time. The
    ratio then falls nowhere: on a segment a ratio of linear functions is monotone.

    Raises:
      ValueError: if points are missing, out of order, or not in (0, 1], or if a larger
        problem would take less time.
    """

    points: tuple[tuple[float, float], ...]  # (size, efficiency), sizes increasing

    def __post_init__(self) -> None:
        require(len(self.points) > 0, "curve: expected at least one point", self.points)
        for size, efficiency in self.points:
            ok = size > 0 and 0 < efficiency <= 1
            expected = "curve: expected (size > 0, 0 < efficiency <= 1)"
            require(ok, expected, (size, efficiency))
        for (x0, y0), (x1, y1) in itertools.pairwise(self.points):
            require(x0 < x1, "curve: expected increasing sizes", (x0, x1))
            expected = f"curve: expected size / efficiency >= {x0 / y0:g} at {x1:g}"
            require(x0 / y0 <= x1 / y1, expected, x1 / y1)

    @classmethod
    def constant(cls, efficiency: float) -> EfficiencyCurve:
        """Return a curve of the same efficiency at all sizes."""
        return cls(((1.0, efficiency),))

    def at(self, size: float) -> float:
        """Return the efficiency at `size`."""
        points = self.points
        if size <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if size <= x1:
                return y0 + (y1 - y0) * (size - x0) / (x1 - x0)
        return points[-1][1]


@dataclasses.dataclass(frozen=True, slots=True)
class AllReduce:
    """An all-reduce of n bytes takes alpha + 2 (tp - 1)/tp n / bus bandwidth.

    Raises:
      ValueError: on a negative alpha or no bandwidth.
    """

    alpha_s: float  # of a message of no bytes
    bus_bytes_s: float  # as NCCL counts it: independent of tp where links are alike

    def __post_init__(self) -> None:
        require(self.alpha_s >= 0, "alpha_s: expected >= 0", self.alpha_s)
        require(self.bus_bytes_s > 0, "bus_bytes_s: expected > 0", self.bus_bytes_s)

    def time_s(self, tp: int, size_bytes: float) -> float:
        """Return the seconds for `size_bytes` on each of `tp` devices."""
        return self.alpha_s + 2 * (tp - 1) / tp * size_bytes / self.bus_bytes_s


@dataclasses.dataclass(frozen=True, slots=True)
class AllToAll:
    """An all-to-all of n bytes takes alpha + (devices - 1)/devices n / bandwidth.

    Each device sends its n bytes to all in equal parts, one of them to itself.

    Raises:
      ValueError: on a negative alpha or no bandwidth.
    """

    alpha_s: float  # of a message of no bytes
    bytes_s: float  # at which a device sends to the others

    def __post_init__(self) -> None:
        require(self.alpha_s >= 0, "alpha_s: expected >= 0", self.alpha_s)
        require(self.bytes_s > 0, "bytes_s: expected > 0", self.bytes_s)

    def time_s(self, devices: int, size_bytes: float) -> float:
        """Return the seconds for `size_bytes` on each of `devices`."""
        return self.alpha_s + (devices - 1) / devices * size_bytes / self.bytes_s


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of accelerator, and the links that join several.

    Raises:
      ValueError: naming the field, on a value that no device has.
    """

    name: str
    peak_flops: float  # dense matmul of 16-bit operands, FLOP/s
    # The same by bits of narrower floating-point operands, where the device has such.
    peak_flops_by_bits: Mapping[int, float] = dataclasses.field(
        default_factory=dict[int, float]
    )
    hbm_bytes_s: float  # memory bandwidth
    memory_bytes: float  # of one device
    # Shares of the peaks that are reached:
    gemm_mfu: EfficiencyCurve  # by rows (tokens) of a linear layer's matmul
    weight_mbu: float  # of hbm_bytes_s, streaming weights for few rows
    attention_mfu: EfficiencyCurve  # by tokens attended to, prefill, causal FLOPs
    kv_mbu: float  # of hbm_bytes_s, decode attention, for large KV
    kv_startup_s: float  # of decode attention in one layer, before KV flows at kv_mbu
    # Joining devices:
    all_reduce: Mapping[int, AllReduce]  # by tp > 1; other sizes are refused
    # By devices > 1, between experts; other sizes are refused.
    all_to_all: Mapping[int, AllToAll] = dataclasses.field(
        default_factory=dict[int, AllToAll]
    )
    hop: LinkSpec  # takes activations to the next pipeline stage
    # What machines of this kind have; measured rows are simulated with it. Another
    # simulation is told its own, as other networks can be rented.
    between: LinkSpec | None = None  # of one device to other nodes; None: not known
    node_devices: int = 8  # that `hop` joins
    # A step:
    step_s: float  # t0: launches and host work of a stage that nothing hides
    tile_rows: int  # above this, rows of a matmul are computed in multiples of it

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            require(value > 0, f"{self.name}: {name}: expected > 0", value)
        peaks = self.peak_flops_by_bits
        ok = all(0 < bits < 16 and peak > 0 for bits, peak in peaks.items())
        expected = "peak_flops_by_bits: expected FLOP/s > 0 by bits under 16"
        require(ok, f"{self.name}: {expected}", peaks)
        for name in ("weight_mbu", "kv_mbu"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{self.name}: {name}: expected in (0, 1]", value)
        for name in ("kv_startup_s", "step_s"):
            value = getattr(self, name)
            require(value >= 0, f"{self.name}: {name}: expected >= 0", value)

    def peak(self, bits: int) -> float:
        """Return the peak of a dense matmul whose operands have `bits`, in FLOP/s.

        Weights of a precision that the device lacks are expanded to 16 bits.

        Raises:
          ValueError: if `bits` is not 16, 8 or 4.
        """
        require(bits in (16, 8, 4), "bits: expected 16, 8 or 4", bits)
        return self.peak_flops_by_bits.get(bits, self.peak_flops)

    def rows(self, tokens: int) -> int:
        """Return the rows that a matmul over `tokens` is billed for.

        Above one tile whole tiles are computed (Sarathi on an A6000: 256 tokens take
        69.8 ms, 257 take 92.3 ms). Up to one tile libraries choose kernels of fewer
        rows, and streaming the weights takes longer than the kernels.
        """
        tile = self.tile_rows
        return tokens if tokens <= tile else -(-tokens // tile) * tile

    def ideal(self) -> Hardware:
        """Return the same peaks reached in full, with no overhead: a bound.

        Communication takes no time: it hides behind compute and memory traffic.
        """
        full = EfficiencyCurve.constant(1.0)
        reduced, exchanged = AllReduce(0.0, math.inf), AllToAll(0.0, math.inf)
        return dataclasses.replace(
            self,
            name=f"{self.name}-ideal",
            gemm_mfu=full,
            weight_mbu=1.0,
            attention_mfu=full,
            kv_mbu=1.0,
            kv_startup_s=0.0,
            all_reduce={tp: reduced for tp in self.all_reduce},
            all_to_all={devices: exchanged for devices in self.all_to_all},
            hop=dataclasses.replace(self.hop.ideal(), bandwidth_bytes_s=math.inf),
            step_s=0.0,
            tile_rows=1,
        )
