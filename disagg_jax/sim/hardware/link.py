"""Links between devices: how long bytes take when nothing else is on the wire.

A transfer takes latency + bytes / (efficiency * lanes * bandwidth). Queueing for a link
is the backend's job. Measured latencies and efficiencies are read from the send-recv
tables that Vidur published (github.com/microsoft/vidur, data/profiling/network), and
comments say which numbers are assumed instead.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
from collections.abc import Mapping

from disagg_jax.errors import require
from disagg_jax.sim.hardware.numbers import expect_numbers
from models.files import read_json


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinkSpec:
    """One direction of a link of one device (or host, where it says so).

    Raises:
      ValueError: on a negative latency, no bandwidth, or an efficiency not in (0, 1].
    """

    name: str
    latency_s: float  # of a message of no bytes
    bandwidth_bytes_s: float  # one way, ideal: from the spec sheet
    efficiency: float  # share of the bandwidth that large messages reach

    def __post_init__(self) -> None:
        require(self.latency_s >= 0, "latency_s: expected >= 0", self.latency_s)
        bandwidth = self.bandwidth_bytes_s
        require(bandwidth > 0, "bandwidth_bytes_s: expected > 0", bandwidth)
        in_range = 0 < self.efficiency <= 1
        require(in_range, "efficiency: expected in (0, 1]", self.efficiency)

    def transfer_s(self, size_bytes: float, lanes: int = 1) -> float:
        """Return the seconds for `size_bytes` spread evenly over `lanes` such links.

        Between instances that shard KV alike, lanes = min(tp of the source, tp of the
        destination) where each device has a link of its own.
        """
        require(size_bytes >= 0, "size_bytes: expected >= 0", size_bytes)
        require(lanes >= 1, "lanes: expected >= 1", lanes)
        rate_bytes_s = self.efficiency * lanes * self.bandwidth_bytes_s
        return self.latency_s + size_bytes / rate_bytes_s

    def ideal(self) -> LinkSpec:
        """Return the same wire without latency and loss: a bound."""
        return dataclasses.replace(self, latency_s=0.0, efficiency=1.0)


_ALL = (
    LinkSpec(
        name="nvlink-a100",
        latency_s=8e-6,  # Vidur's DGX send-recv tables
        bandwidth_bytes_s=300e9,  # A100 datasheet: 600 GB/s both ways together
        efficiency=0.77,  # Vidur's DGX send-recv tables: 230-265 of 300 GB/s
    ),
    LinkSpec(
        name="nvlink-h100",
        latency_s=5e-6,  # Vidur's DGX send-recv tables
        bandwidth_bytes_s=450e9,  # H100 SXM datasheet: 900 GB/s both ways together
        efficiency=0.77,  # Vidur's DGX send-recv tables: 348 of 450 GB/s
    ),
    LinkSpec(
        name="nvlink5",  # of Blackwell: 8 devices of a node, or 72 of a rack
        latency_s=5e-6,  # assumed: as between H100s
        bandwidth_bytes_s=900e9,  # Blackwell datasheet: 1.8 TB/s both ways together
        # nvbandwidth between two devices of a GB200 rack reaches 770 of 900 GB/s
        # (github.com/Azure/AI-benchmarking-guide, issue 7).
        efficiency=0.86,
    ),
    LinkSpec(
        name="pcie5",
        latency_s=5e-6,  # assumed: as NVLink between H100s
        bandwidth_bytes_s=64e9,  # PCIe 5.0 x16: 32 GT/s x 16 lanes, before encoding
        efficiency=0.8,  # assumed: no published measurement found
    ),
    LinkSpec(
        name="pcie4",
        latency_s=5e-6,  # assumed: as pcie5
        bandwidth_bytes_s=32e9,  # PCIe 4.0 x16: 16 GT/s x 16 lanes, before encoding
        efficiency=0.8,  # assumed: as pcie5
    ),
    LinkSpec(
        name="memory",  # of a host, between devices that are its cores; all assumed
        latency_s=50e-6,
        bandwidth_bytes_s=5e9,
        efficiency=1.0,
    ),
    LinkSpec(
        name="800gb",
        latency_s=17e-6,  # assumed: as 400gb
        bandwidth_bytes_s=100e9,  # ConnectX-8 datasheet: 800 Gb/s
        efficiency=0.72,  # assumed: as 400gb
    ),
    LinkSpec(
        name="400gb",
        latency_s=17e-6,  # Vidur's H100 inter-node send-recv
        bandwidth_bytes_s=50e9,  # 400 Gb/s
        # Vidur's H100 inter-node send-recv: 35.9 of 50 GB/s, if its NIC is 400 Gb/s,
        # as aiconfigurator assumes.
        efficiency=0.72,
    ),
    LinkSpec(
        name="200gb",  # one of the eight adapters of a DGX A100
        latency_s=17e-6,  # assumed: as 400gb
        bandwidth_bytes_s=25e9,  # DGX A100 datasheet: HDR InfiniBand, 200 Gb/s
        efficiency=0.72,  # assumed: as 400gb
    ),
    LinkSpec(
        name="100gb",
        latency_s=24e-6,  # Vidur's A100 inter-node send-recv
        bandwidth_bytes_s=12.5e9,  # 100 Gb/s
        # Vidur's A100 inter-node send-recv: 7.8 of 12.5 GB/s, if that link is 100 Gb/s.
        efficiency=0.62,
    ),
    LinkSpec(
        name="25gb",  # DistServe's testbed between nodes
        latency_s=24e-6,  # assumed: as 100gb
        bandwidth_bytes_s=3.125e9,  # 25 Gb/s
        efficiency=0.62,  # assumed: as 100gb
    ),
    LinkSpec(
        name="10gb",  # Ethernet of a cloud's smaller machines
        latency_s=50e-6,  # assumed: as dcn-v5e, an Ethernet round through the hosts
        bandwidth_bytes_s=1.25e9,  # 10 Gb/s
        efficiency=0.62,  # assumed: as 100gb
    ),
    LinkSpec(
        name="ici-v5e",  # one link of a chip; a chip of the 2-D torus has four
        latency_s=1e-6,  # assumed: about 1 us for a hop
        bandwidth_bytes_s=45e9,  # one way; "How to Scale Your Model", chapter on TPUs
        efficiency=1.0,  # assumed: not measured; 45 GB/s is below the 50 of the spec
    ),
    LinkSpec(
        name="ici-v5p",  # one link of a chip; a chip of the 3-D torus has six
        latency_s=1e-6,  # assumed: as ici-v5e
        # Google Cloud, docs/v5p: 1200 GB/s for a chip, both ways, over its six links
        bandwidth_bytes_s=100e9,
        efficiency=0.9,  # assumed: the scaling book counts 45 of v5e's 50 GB/s
    ),
    LinkSpec(
        name="ici-v6e",  # one link of a chip; a chip of the 2-D torus has four
        latency_s=1e-6,  # assumed: as ici-v5e
        # Google Cloud, docs/v6e: 800 GB/s for a chip, both ways, over its four links
        bandwidth_bytes_s=100e9,
        efficiency=0.9,  # assumed: as ici-v5p
    ),
    LinkSpec(
        name="dcn-v5e",  # of a host with 8 chips
        latency_s=50e-6,  # assumed: an Ethernet round through the hosts
        bandwidth_bytes_s=25e9,  # Google Cloud: 2 x 100 Gb/s NICs
        efficiency=0.62,  # assumed: as 100gb
    ),
)
LINKS: Mapping[str, LinkSpec] = types.MappingProxyType({x.name: x for x in _ALL})


_FIELDS = ("latency_s", "bandwidth_bytes_s", "efficiency")  # of a file


def get_link(name: str) -> LinkSpec:
    """Return the preset called `name`, or the link that a file describes.

    Args:
      name: of a preset, or the path of a .json file with the numbers latency_s,
        bandwidth_bytes_s and efficiency. The link is called as the file.

    Raises:
      ValueError: naming the presets, if none has that name, or the fault of the file.
      FileNotFoundError: if there is no such file.
    """
    if not name.endswith(".json"):
        expected = f"link: expected one of {sorted(LINKS)} or a .json file"
        require(name in LINKS, expected, name)
        return LINKS[name]
    path = pathlib.Path(name)
    where, fields = f"link: {path}", read_json(path)
    expect_numbers(where, fields, _FIELDS, f"the numbers {list(_FIELDS)}", _FIELDS)
    try:
        return LinkSpec(name=path.stem, **fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
