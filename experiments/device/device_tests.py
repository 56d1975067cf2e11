"""The tests that need an accelerator, by pytest."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import DeviceSizes

_ROOT = pathlib.Path(__file__).parents[2]
_MARKS = ("gpu", "tpu")  # of tests; also what JAX calls the devices
_NEEDS = ("pytest", "hypothesis", "xdist")
_NO_TESTS = 5  # pytest's status where none was selected


def problem(sizes: DeviceSizes) -> str:
    """Return what the tests would need."""
    if sizes.devices.platform not in _MARKS:
        return f"tests are marked gpu or tpu, this is a {sizes.devices.platform}"
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    return "" if (_ROOT / "tests").is_dir() else "the tests are not there"


def run(bench: Bench) -> Found:
    """Run them in a process of their own: this one does not start JAX."""
    mark = bench.sizes.devices.platform
    command = [sys.executable, "-m", "pytest", "-m", mark, "-q", "-p"]
    command += ["no:cacheprovider", "tests"]
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=bench.deadline.left_s,
        )
    except subprocess.TimeoutExpired as late:
        # Bytes, whatever was asked for.
        output = late.output.decode() if isinstance(late.output, bytes) else ""
        print(output)
        return Found("not finished", left_out="tests that had not run")
    print(done.stdout)
    said = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
    right = done.returncode in (0, _NO_TESTS)
    return Found(said[-1].strip("= "), wrong=not right)


PART = Part(
    name="tests",
    about="the tests that need a GPU or TPU",
    run=run,
    problem=problem,
    weight=3,
)
