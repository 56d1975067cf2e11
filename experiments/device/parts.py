"""All parts, in the order in which they run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from experiments.cli import host_devices
from experiments.cli.progress import Deadline
from experiments.device import (
    calibration,
    device_tests,
    handoff,
    kernels,
    steps,
    sweep,
    tokens,
)
from experiments.device.part import Bench, Found, Part, printed_to
from experiments.device.sizes import Devices, DeviceSizes

_MODULES = (device_tests, tokens, kernels, calibration, steps, handoff, sweep)
PARTS: Mapping[str, Part] = {module.PART.name: module.PART for module in _MODULES}


def look() -> Devices:
    """Return the devices; a bare host is split into two."""
    host_devices.provide(2)
    return Devices.look()


def run_part(
    name: str, sizes: DeviceSizes, out: pathlib.Path, minutes: float | None
) -> Found:
    """Run a part; what it prints is in `out`/NAME.txt too."""
    host_devices.provide(2)
    with printed_to(out / f"{name}.txt"):
        return PARTS[name].run(Bench(sizes=sizes, out=out, deadline=Deadline(minutes)))
