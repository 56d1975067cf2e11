"""The folder of a run: one run at a time, whole files, and how they were made."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from disagg_jax.formats import RUN
from disagg_jax.sim import DeviceCost, Simulation
from disagg_jax.sim.cost.measured_profile import profile_to_json
from disagg_jax.workload import TraceWorkload
from experiments.cli.command import command_line

_RECORDS = {".lock", "config.json", "env.json"}
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


@contextlib.contextmanager
def sole_use(path: pathlib.Path) -> Iterator[None]:
    """Make the folder `path`, and keep other runs out of it.

    The lock ends with its process, also by a kill, so a killed run can be resumed.

    Raises:
      ValueError: if another run is there, or `path` cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+")
    except OSError as error:
        raise ValueError(f"--out: cannot write to '{path}': {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another run"
            raise ValueError(
                f"--out: '{path}' is in use by {holder}; expected another folder, or "
                "that run to end first"
            ) from None
        except OSError as error:
            print(
                f"'{path}' cannot be locked ({error.strerror}): make sure that no "
                "other run uses it",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {platform.node()} since {_now()} "
            f"({command_line()})"
        )
        file.flush()
        yield


@contextlib.contextmanager
def run_folder(
    path: pathlib.Path | None, config: Any, result: str, *, replace: bool = False
) -> Iterator[None]:
    """Hold the folder of a run that writes `result` (`sole_use`, `record_start`).

    Args:
      path: None where nothing is written.

    Raises:
      ValueError: if another run is there, or `path` cannot be written, or holds the
        results of another config and is not to be replaced.
    """
    if path is None:
        yield
        return
    with sole_use(path):
        unknown = (path / result).exists() and not (path / "config.json").exists()
        if unknown and not replace:
            raise ValueError(
                f"--out: '{path}' holds {result} of another run; expected a folder "
                "without"
            )
        # A run that was killed before it wrote a result has nothing to lose.
        empty = all(entry.name in _RECORDS for entry in path.iterdir())
        record_start(path, config, environment(), replace=replace or empty)
        yield


def record_start(
    path: pathlib.Path, config: Any, ran_in: Any, *, replace: bool = False
) -> None:
    """Write `config.json`, and an entry of `env.json` for each start.

    Args:
      replace: whether to replace the files of another config.

    Raises:
      ValueError: if `path` holds a run of another format, or of another config,
        naming what differs.
    """
    config = json.loads(json.dumps(config, allow_nan=False))
    before = read_json(path / "config.json")
    if before is not None:
        before = RUN.read(before)
    # A key without a value, of a flag that is newer than the folder, is no difference.
    other = before is not None and bool(differences(before, config))
    if other and not replace:
        keys = ", ".join(each.key for each in differences(before, config))
        raise ValueError(
            f"--out: '{path}' holds a run of another config ({keys}); expected an "
            "empty directory, or the same config to resume"
        )
    starts = [] if other else read_json(path / "env.json") or []
    write_json(path / "config.json", RUN.write(config))
    write_json(path / "env.json", [*starts, ran_in])


def environment() -> dict[str, Any]:
    """Return where and when this runs; `run_dir.environment` adds the devices."""
    return {
        "date": _now(),
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def commit() -> str | None:
    """Return the checkout's commit, marked where files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A place at which two JSON values differ; a side that lacks it is None."""

    key: str  # dotted
    a: Any
    b: Any


def differences(a: Any, b: Any, prefix: str = "") -> list[Difference]:
    """Return the places at which two JSON values differ, in the order of their keys."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [
            found
            for key in keys
            for found in differences(a.get(key), b.get(key), f"{prefix}{key}.")
        ]
    return [] if a == b else [Difference(prefix.rstrip("."), a, b)]


# -- content ------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return JSON data: dataclasses by type and fields, functions by name.

    Infinities become None, a simulation's model and costs their names, and the rows of
    a trace their number and a digest.
    """
    if isinstance(value, DeviceCost):
        return value.name
    if isinstance(value, Simulation):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"type": "Simulation", **plain(fields | {"model": value.model.name})}
    if isinstance(value, TraceWorkload):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        digest = hashlib.sha256(repr(value.rows).encode()).hexdigest()
        rows = {"count": len(value.rows), "sha256": digest}
        return {"type": "TraceWorkload", **plain(fields | {"rows": rows})}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **plain(fields)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__name__)
        owner = getattr(value, "__self__", None)  # the object of a bound method
        return name if owner is None else {"function": name, "of": plain(owner)}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def profile_record(simulation: Simulation) -> dict[str, Any]:
    """Return the content of a simulation's profiles, for a config; {} of none.

    The file that a name stands for may change.
    """
    engine, profile = simulation.engine, simulation.cost.profile
    found = {} if engine is None else {"engine": plain(engine)}
    return found if profile is None else {**found, "profile": profile_to_json(profile)}


# -- files ----------------------------------------------------------------------------


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary file that replaces `path` once it is whole."""
    if path.exists() and not path.is_file():  # a device or a pipe has no other name
        yield path
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the one that a user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text)


def write_json(path: pathlib.Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Return the content of a JSON file, or None if there is no file."""
    return json.loads(path.read_text()) if path.exists() else None
