"""Clients that wait: each sends its next request when its last one has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disagg_jax.errors import require
from disagg_jax.request import Request, Status, Timeline


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
        self._seen = 0  # timelines
        self._open: list[Timeline] = []  # of requests that have not ended

    def first(self) -> list[Request]:
        """Return the requests that the clients send at time 0."""
        return self._send(self._clients, 0.0)

    def __call__(self, now_s: float, timelines: Sequence[Timeline]) -> list[Request]:
        """Return the requests that follow those that ended since the last call."""
        self._open += timelines[self._seen :]
        self._seen = len(timelines)
        before = len(self._open)
        self._open = [t for t in self._open if t.status is Status.ACTIVE]
        return self._send(before - len(self._open), now_s)

    def _send(self, n: int, now_s: float) -> list[Request]:
        sent = self._requests[self._sent : self._sent + n]
        self._sent += len(sent)
        return [dataclasses.replace(request, arrival_s=now_s) for request in sent]
