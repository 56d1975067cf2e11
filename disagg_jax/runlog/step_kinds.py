"""Step kinds: how long each stage worked on prompts, on decodes, or on both at once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment
from disagg_jax.work import Done, Event, Step, StepLoad, TruncateSpan, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageShares:
    """Shares of a run's time in which a pipeline stage worked, by kind of step."""

    prefill: float  # prompts, or parts of them, alone
    mixed: float  # prompts beside decodes
    decode: float  # decodes alone

    @property
    def busy(self) -> float:
        """Return the share of the time in which the stage worked."""
        return self.prefill + self.mixed + self.decode


class StepKinds:
    """An observer for `serve` that adds up the time of steps with prompts.

    It is for runs on the virtual clock, without interventions.
    """

    def __init__(self) -> None:
        self._in_flight: dict[int, tuple[int, str]] = {}  # instance and kind of a step
        self._free_s: dict[tuple[int, int], float] = {}  # by (instance, stage)
        self._seconds: collections.defaultdict[tuple[int, int, str], float] = (
            collections.defaultdict(float)
        )

    def __call__(
        self, now_s: float, events: Sequence[Event], works: Sequence[Work]
    ) -> None:
        for event in events:
            if isinstance(event, Done) and event.work in self._in_flight:
                self._count(*self._in_flight.pop(event.work), event)
        for work in works:
            if isinstance(work, Step):
                self._in_flight[work.id] = work.instance, _kind(work.load)
            elif isinstance(work, TruncateSpan):  # of decodes; a Done need not follow
                self._in_flight.pop(work.work, None)

    def _count(self, instance: int, kind: str, event: Done) -> None:
        """Add a step to each stage, from its end on the stage before, in turn."""
        start_s = event.start_s
        for stage, end_s in enumerate((*event.stage_ends_s, event.end_s)):
            start_s = max(start_s, self._free_s.get((instance, stage), 0.0))
            self._seconds[instance, stage, kind] += end_s - start_s
            self._free_s[instance, stage] = start_s = end_s

    def shares(self, deployment: Deployment, run: Run) -> list[list[StageShares]]:
        """Return the shares of each stage of each instance in the run it observed.

        Steps of decodes alone have what is left of the stage's work: of a span that was
        cut, no event tells the whole time.
        """
        return [
            [self._of(i, stage, busy, run.end_s) for stage, busy in enumerate(stages)]
            for i, stages in enumerate(run.busy_shares(deployment))
        ]

    def _of(self, instance: int, stage: int, busy: float, end_s: float) -> StageShares:
        def share(kind: str) -> float:
            seconds = self._seconds.get((instance, stage, kind), 0.0)
            return seconds / end_s if end_s else 0.0

        prefill, mixed = share("prefill"), share("mixed")
        decode = max(0.0, busy - prefill - mixed)  # not below by rounding
        return StageShares(prefill=prefill, mixed=mixed, decode=decode)


def _kind(load: StepLoad) -> str:
    if not load.chunks:
        return "decode"
    return "mixed" if load.decodes else "prefill"
