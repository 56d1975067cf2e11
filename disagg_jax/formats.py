"""Format numbers of the files that the project writes and reads again.

Raise a number when a name or a shape in that kind of file changes, and `oldest` too
where files from before are not worth reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from disagg_jax.errors import require

Value = TypeVar("Value")
_KEY = "format"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The form of one kind of file."""

    name: str
    number: int
    oldest: int = 0  # that is still read; files from before there were numbers are 0
    command: str  # makes such a file

    def write(self, content: Mapping[str, Value]) -> dict[str, Value | int]:
        """Return `content` with the number before it."""
        return {_KEY: self.number, **content}

    def number_of(self, record: Mapping[str, object]) -> int:
        """Return the number of a file; 0 if it is from before there were numbers."""
        number = record.get(_KEY, 0)
        return number if isinstance(number, int) else 0

    def read(self, record: Mapping[str, Value]) -> dict[str, Value]:
        """Return what `write` was given.

        Raises:
          ValueError: if the number is newer than this program or too old.
        """
        came = record.get(_KEY, 0)
        known = type(came) is int and self.oldest <= came <= self.number
        expected = f"{self.name}: expected format {self.oldest} to {self.number}"
        require(known, f"{expected}, as made by {self.command}", came)
        return {key: value for key, value in record.items() if key != _KEY}


ENGINE_PROFILE = Format(
    name="engine profile", number=1, command="python -m experiments.fit_engine"
)
EVENT_LOG = Format(
    name="event log",
    number=3,
    oldest=3,  # before, a step told how far into the pool its decodes read
    command="python -m experiments.goodput_sweep",
)
MAPS = Format(
    name="maps.json",
    number=1,
    oldest=1,  # before, every cell had the rows of its trace in it
    command="python -m experiments.compare_systems --out=FOLDER",
)
PLACEMENT = Format(
    name="placement.json",
    number=1,
    command="python -m experiments.placement_search --out=FOLDER",
)
# Of calibrated profiles those before 3 are not read: see `measured_profile`.
PROFILE = Format(name="profile", number=3, command="python -m experiments.calibrate")
# Of all files in a run directory; it stands in config.json, which is written first and
# read before any work. So raise it together with those of the files in it.
RUN = Format(
    name="run directory",
    number=3,
    command="the command in its env.json, with another --out",
)
STEP_TIMES = Format(
    name="step_times.json",
    number=3,
    oldest=3,  # as for profiles
    command="python -m experiments.goodput_sweep",
)
