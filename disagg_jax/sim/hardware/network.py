"""The wires between instances: which one a transfer takes, and for how long.

Transfers on one wire queue, first come first served, or share it. Within a node every
device has links of its own into a switch (NVLink, ICI), so the receiving instance's end
is the wire. Between nodes all instances of a node share its NIC, and the sending node's
NIC is the wire. We found no published simulator that queues transfers on a wire.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from disagg_jax.deployment import Deployment
from disagg_jax.errors import require
from disagg_jax.sim.hardware.link import LinkSpec
from disagg_jax.work import Transfer

# The link, how many of it are used at once, and the wire's name: (-1, node) is the NIC
# of a node, (-2, instance) the receiving end of an instance, () no wire of its own.
Route = tuple[LinkSpec | None, int, tuple[int, ...]]


@dataclasses.dataclass(slots=True)
class Hop:
    """One transfer on its wire."""

    parts_s: tuple[float, ...]  # of each part of the transfer
    bytes: int = 0
    link: tuple[int, ...] = ()  # the wire; () is one for each (src, dst)
    shared: bool = False  # with the others on the wire, instead of after them

    @property
    def duration_s(self) -> float:
        """Return the seconds of all parts, one after the other."""
        return sum(self.parts_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The nodes of a deployment, and the links inside nodes and between them.

    Raises:
      ValueError: if a node has no devices, a token fewer than 0 bytes, KV no layer
        group, or `sharing` is unknown.
    """

    deployment: Deployment
    kv_bytes_per_token: int
    inside: LinkSpec | None = None  # one device's link; None takes no time
    between: LinkSpec | None = None  # a node's NIC; None is one large node
    node_devices: int = 8
    # Transfers on one wire: one after the other, or all at once with an equal share.
    sharing: Literal["fifo", "fair"] = "fifo"
    layer_groups: int = 1  # in which the KV of a prompt goes while it is computed

    def __post_init__(self) -> None:
        groups, devices = self.layer_groups, self.node_devices
        require(groups >= 1, "layer_groups: expected >= 1", groups)
        require(devices >= 1, "node_devices: expected >= 1", devices)
        size = self.kv_bytes_per_token
        require(size >= 0, "kv_bytes_per_token: expected >= 0", size)
        known = self.sharing in ("fifo", "fair")
        require(known, "sharing: expected fifo or fair", self.sharing)

    def hop(self, transfer: Transfer) -> Hop:
        """Return the wire that a transfer takes, and for how long."""
        size = self.kv_bytes_per_token * transfer.context
        ends = transfer.src, transfer.dst
        if ends not in self._routes:
            self._routes[ends] = self._route(*ends)
        link, lanes, wire = self._routes[ends]
        parts = self.layer_groups if transfer.step else 1
        seconds = link.transfer_s(size / parts, lanes) if link else 0.0
        return Hop((seconds,) * parts, size, wire, self.sharing == "fair")

    @functools.cached_property
    def _routes(self) -> dict[tuple[int, int], Route]:
        """A cache of the routes asked for, by (src, dst)."""
        return {}

    def _route(self, src: int, dst: int) -> Route:
        node = self._node(src)
        if self.between is not None and node != self._node(dst):
            return self.between, 1, (-1, node)
        if self.inside is None:
            return None, 1, ()
        return self.inside, self.deployment.lanes(src, dst), (-2, dst)

    def _node(self, instance: int) -> int:
        """Return the node of an instance's first device. Instances are in order."""
        before = self.deployment.instances[:instance]
        return sum(spec.devices for spec in before) // self.node_devices
