"""A part of a run on a device: what it is, where it runs, what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

from experiments.cli.progress import ENDLESS, Deadline
from experiments.device.sizes import DeviceSizes
from experiments.runs.folder import read_json, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a part runs, and how long it may."""

    sizes: DeviceSizes
    out: pathlib.Path  # the folder of the run
    deadline: Deadline = ENDLESS  # after which the part begins nothing more

    def kept(self, part: str) -> Kept:
        """Return what a part of that name has found before."""
        return Kept(self.out / f"{part}.found.json")


class Found(NamedTuple):
    """What a part came to."""

    result: str  # in a phrase
    left_out: str = ""  # what there was no time for
    wrong: bool = False  # whether something that was checked does not hold


class Kept:
    """What a part has found so far, in a file: a part that is resumed goes on there."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._found: dict[str, Any] = read_json(path) or {}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __setitem__(self, name: str, found: Any) -> None:
        self._found[name] = found
        write_json(self._path, self._found)


def _anywhere(sizes: DeviceSizes) -> str:
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to do on a device. It prints what it finds as soon as it is there.

    Attributes:
      problem: says why it cannot run; "" if it can. It may not ask JAX for devices.
      weight: share of the time, relative to other parts.
    """

    name: str
    about: str
    run: Callable[[Bench], Found]
    problem: Callable[[DeviceSizes], str] = _anywhere
    weight: float = 1.0


@contextlib.contextmanager
def printed_to(path: pathlib.Path) -> Iterator[None]:
    """Write all that is printed into a new file too, at once."""
    with path.open("w") as file:
        with contextlib.redirect_stdout(_Both(sys.stdout, file)):
            yield


class _Both:
    """Two streams as one."""

    def __init__(self, *streams: TextIO):
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()  # a process that is killed leaves all that it said
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()
