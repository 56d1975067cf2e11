"""The wires between instances: which one a transfer takes, and for how long.

Transfers on one wire queue, first come first served. Within a node every device has
links of its own into a switch (NVLink, ICI), so what is shared is the receiving
instance's end. Between nodes all instances of a node share its NIC; the one that sends
is the wire. No peer simulator queues transfers (`facts/latency.md`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from disagg_jax.deployment import Deployment, InstanceSpec
from disagg_jax.expect import expect
from disagg_jax.sim.link import LinkSpec
from disagg_jax.work import Transfer


class Hop(NamedTuple):
    """One transfer on its wire."""

    duration_s: float
    bytes: int = 0
    link: tuple[int, ...] = ()  # the wire; () is one for each (src, dst)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Where the instances are, and the links inside nodes and between them.

    Raises:
      ValueError: if a node has no devices.
    """

    deployment: Deployment
    kv_bytes_per_token: int
    inside: LinkSpec | None = None  # one device's link; None takes no time
    between: LinkSpec | None = None  # a node's NIC; None is one large node
    node_devices: int = 8

    def __post_init__(self) -> None:
        expect(self.node_devices >= 1, "node_devices: expected >= 1", self.node_devices)

    def hop(self, transfer: Transfer) -> Hop:
        size = self.kv_bytes_per_token * transfer.context
        src, dst = (self.deployment.instances[i] for i in (transfer.src, transfer.dst))
        first, second = self._node(transfer.src), self._node(transfer.dst)
        if self.between is not None and first != second:
            return Hop(self.between.transfer_s(size), size, (-1, first))
        if self.inside is None:
            return Hop(0.0, size)
        seconds = self.inside.transfer_s(size, _lanes(src, dst))
        return Hop(seconds, size, (-2, transfer.dst))

    def _node(self, instance: int) -> int:
        """The node of an instance's first device; instances lie in device order."""
        before = self.deployment.instances[:instance]
        return sum(spec.devices for spec in before) // self.node_devices


def _lanes(src: InstanceSpec, dst: InstanceSpec) -> int:
    """Links in use at once: the devices of the end with fewer."""
    return min(src.devices, dst.devices)
