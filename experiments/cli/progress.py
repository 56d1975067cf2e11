"""How far a command is, how long is left, and the time that it may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from disagg_jax.errors import require
from experiments.cli.flags import Flags

Clock = Callable[[], float]
_EVERY_S = 5.0  # between two lines about one part


def to_stderr(line: str) -> None:
    """Print a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


class ProgressLines:
    """Prints lines with the seconds since it was made, and what is left of a part."""

    def __init__(
        self,
        show: Callable[[str], None] = to_stderr,
        clock: Clock = time.perf_counter,
        every_s: float = _EVERY_S,
    ):
        self._show, self._clock, self._every_s = show, clock, every_s
        self._start_s = clock()
        self._part = ""
        self._part_start_s = self._shown_s = self._start_s

    def __call__(self, text: str) -> None:
        self._show(f"[{self._clock() - self._start_s:6.1f} s] {text}")

    def step(self, part: str, done: int, total: int, text: str = "") -> None:
        """Say that `done` of `total` steps of a part are done.

        A part's first and last steps are always said, others at most every few seconds.
        What is left is estimated by the steps that are done: call with 0 at the start.
        """
        now_s = self._clock()
        first = part != self._part or not done
        if first:
            self._part, self._part_start_s = part, now_s
        if first or done == total or now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            spent_s = now_s - self._part_start_s
            left = time_text(spent_s / done * (total - done)) if done else ""
            said = [part, text, f"about {left} left" if left else ""]
            self(f"{done}/{total} {', '.join(each for each in said if each)}")


def time_text(seconds: float) -> str:
    """Write a time to come, roughly; '' for none."""
    if seconds < 1:
        return ""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Deadline:
    """The time at which a command begins nothing more.

    Raises:
      ValueError: unless `minutes` is above 0, or None for no end.
    """

    def __init__(self, minutes: float | None, clock: Clock = time.perf_counter):
        ok = minutes is None or minutes > 0
        require(ok, "--minutes: expected > 0", minutes)
        self.minutes = minutes
        self._clock = clock
        self._end_s = None if minutes is None else clock() + 60 * minutes

    def passed(self) -> bool:
        """Return whether the time is spent."""
        return self._end_s is not None and self._clock() >= self._end_s

    @property
    def left_s(self) -> float | None:
        """Return the seconds until then, 0 at least; None for no end."""
        return None if self._end_s is None else max(0.0, self._end_s - self._clock())


ENDLESS = Deadline(None)


class MinutesFlag:
    """The flag `--minutes`, in a command's namespace `own`."""

    def __init__(self, own: Flags, left_out: str):
        self.flag = own.float(
            "minutes",
            None,
            f"After which nothing more is begun: {left_out} are left out, and named.",
        )

    def start(self) -> Deadline:
        """Return the deadline, counted from now."""
        return Deadline(self.flag.value)
