"""Clients that wait: each sends its next request when its last one has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disagg_jax.errors import require
from disagg_jax.request import Request, Timeline


class ClosedLoop:
    """`Followers` for a number of clients that take requests from one list.

    Clients have no think time: a client's next request arrives when its last one ends,
    served or refused. The arrival times in the list are not used.

    Raises:
      ValueError: if there is no client.
    """

    def __init__(self, requests: Sequence[Request], clients: int):
        require(clients >= 1, "clients: expected >= 1", clients)
        self._requests, self._clients = requests, clients
        self._sent = 0

    def first(self) -> list[Request]:
        """Return the requests that the clients send at time 0."""
        return self._send(self._clients, 0.0)

    def __call__(
        self, now_s: float, timelines: Sequence[Timeline], ended: Sequence[Timeline]
    ) -> list[Request]:
        """Return the requests that follow those that ended in this turn."""
        return self._send(len(ended), now_s)

    def _send(self, n: int, now_s: float) -> list[Request]:
        sent = self._requests[self._sent : self._sent + n]
        self._sent += len(sent)
        return [dataclasses.replace(request, arrival_s=now_s) for request in sent]
