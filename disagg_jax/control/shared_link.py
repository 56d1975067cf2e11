"""A link whose transfers advance side by side, each at an equal share of its speed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class SharedLink:
    """Processor sharing: each of n transfers advances at 1/n of the link's speed.

    The link counts the seconds of service to each transfer on it. The count at which a
    transfer ends is known when it is added, whatever is added later. So transfers that
    should end together do so exactly.

    With Poisson arrivals and fixed sizes D at utilisation rho the mean time on the link
    is D / (1 - rho), whatever the sizes' distribution (M/G/1 processor sharing).
    """

    now_s: float = 0.0
    served_s: float = 0.0  # service of a transfer present since the link was idle
    # Transfer -> (its start, the `served_s` at its end) of each of its parts, in order
    # of submission. The parts follow one another in the transfer's one share.
    parts: dict[int, list[tuple[float, float]]] = dataclasses.field(
        default_factory=dict[int, list[tuple[float, float]]]
    )

    def add(self, now_s: float, transfer: int, alone_s: float) -> None:
        """Add a transfer, or a part of one, that takes `alone_s` on an idle link."""
        self._advance(now_s)
        parts = self.parts.setdefault(transfer, [])
        before_s = parts[-1][1] if parts else self.served_s
        parts.append((now_s, before_s + alone_s))

    def next_end(self) -> tuple[int, float] | None:
        """Return the transfer that (or whose part) ends first, and when.

        Adding or dropping a transfer changes both.
        """
        if not self.parts:
            return None
        transfer = self._first()
        left_s = max(0.0, self.parts[transfer][0][1] - self.served_s)
        return transfer, self.now_s + left_s * len(self.parts)

    def finish(self, now_s: float) -> tuple[int, float]:
        """Remove the transfer of `next_end`, which ends now; return (it, arrival)."""
        transfer = self._first()
        began_s, self.served_s = self.parts[transfer].pop(0)
        self.now_s = now_s
        if not self.parts[transfer]:
            del self.parts[transfer]
        return transfer, began_s

    def drop(self, now_s: float, transfer: int) -> None:
        """Remove all parts of a transfer; the others get its share."""
        self._advance(now_s)
        self.parts.pop(transfer, None)

    def _first(self) -> int:
        return min(self.parts, key=lambda transfer: self.parts[transfer][0][1])

    def _advance(self, now_s: float) -> None:
        if self.parts:
            self.served_s += (now_s - self.now_s) / len(self.parts)
        else:
            self.served_s = 0.0  # small numbers keep small differences
        self.now_s = now_s
