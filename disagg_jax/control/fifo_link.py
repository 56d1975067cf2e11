"""A link that carries one transfer at a time, in the order of their arrival."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass(slots=True)
class FifoLink:
    """A queue of transfers; the first one is on the link.

    Only the first has an end. The others are timed in their turn, since the transfers
    before them may be dropped.
    """

    began_s: float = 0.0  # start of the first transfer in the queue
    # (transfer, its duration in seconds)
    queue: collections.deque[tuple[int, float]] = dataclasses.field(
        default_factory=collections.deque[tuple[int, float]]
    )

    def add(self, now_s: float, transfer: int, alone_s: float) -> None:
        """Queue a transfer, or a part of one, that takes `alone_s` seconds."""
        if not self.queue:
            self.began_s = now_s
        self.queue.append((transfer, alone_s))

    def next_end(self) -> tuple[int, float] | None:
        """Return the transfer on the link and when it (or its part) ends."""
        if not self.queue:
            return None
        transfer, alone_s = self.queue[0]
        return transfer, self.began_s + alone_s

    def finish(self, now_s: float) -> tuple[int, float]:
        """Remove the transfer of `next_end`, which ends now; return (it, start)."""
        began_s, self.began_s = self.began_s, now_s
        transfer, _ = self.queue.popleft()
        return transfer, began_s

    def drop(self, now_s: float, transfer: int) -> None:
        """Remove all parts of a transfer; the transfers behind it move up."""
        if self.queue and self.queue[0][0] == transfer:
            self.began_s = now_s
        kept = [part for part in self.queue if part[0] != transfer]
        self.queue = collections.deque(kept)
