"""A link whose transfers go on side by side, each at an equal share of its speed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class SharedLink:
    """Processor sharing: n transfers on it each advance at 1/n of the link's speed.

    With Poisson arrivals and fixed sizes D at utilisation rho the mean time on the link
    is D / (1 - rho), whatever the sizes' distribution (M/G/1 processor sharing).
    """

    now_s: float = 0.0
    # Transfer -> seconds it would still take alone; in order of submission.
    left_s: dict[int, float] = dataclasses.field(default_factory=dict[int, float])

    def add(self, now_s: float, transfer: int, alone_s: float) -> None:
        """A transfer that takes `alone_s` on an empty link starts."""
        self._advance(now_s)
        self.left_s[transfer] = alone_s

    def remove(self, now_s: float, transfer: int) -> None:
        """A transfer is done, or dropped."""
        self._advance(now_s)
        del self.left_s[transfer]

    def next_end(self) -> tuple[int, float] | None:
        """The transfer that ends first, and when, if none is added before."""
        if not self.left_s:
            return None
        transfer = min(self.left_s, key=lambda each: self.left_s[each])
        return transfer, self.now_s + self.left_s[transfer] * len(self.left_s)

    def _advance(self, now_s: float) -> None:
        if self.left_s:
            share_s = (now_s - self.now_s) / len(self.left_s)
            for transfer in self.left_s:
                self.left_s[transfer] -= share_s
        self.now_s = now_s
