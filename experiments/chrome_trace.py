"""A run of a sweep as a timeline that opens in Perfetto (ui.perfetto.dev).

    python -m experiments.chrome_trace --run=runs/tiny --system=disaggregated
    python -m experiments.chrome_trace --run=runs/tiny --system=vllm --rate=20 --seed=1

One lane for each device, each link and each request. Without --rate it is the run at
the highest rate that passes.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from disagg_jax.chrome_trace import chrome_trace
from disagg_jax.deployment import Deployment
from disagg_jax.expect import expect
from experiments.request_rows import to_timeline
from experiments.run_dir import Point, SavedRun

_RUN = flags.DEFINE_string("run", None, "A run directory of goodput_sweep.")
_SYSTEM = flags.DEFINE_string("system", None, "Which of its systems.")
# Other experiments have flags of these names too, and a test may import several.
_RATE = flags.DEFINE_float(
    "rate", None, "Requests/s per device, as in table.txt.", allow_override=True
)
_SEED = flags.DEFINE_integer(
    "seed", None, "Of the run; by default the first.", allow_override=True
)
_OUT = flags.DEFINE_string("out", "trace.json", "File to write.", allow_override=True)


def draw(
    path: pathlib.Path, system: str, rate_rps: float | None, seed: int | None
) -> dict[str, Any]:
    """The trace of one run in a run directory; see `chrome_trace`.

    Args:
      rate_rps: per device; None is the highest that passes.
      seed: None is the first.

    Raises:
      ValueError: if there is no such run; says what there is.
    """
    run = SavedRun(path)
    config = run.read_json("config.json")
    expect(config is not None, "--run: expected a run directory", str(path))
    names = sorted(config["systems"])
    expect(system in names, f"--system: expected one of {names}", system)
    deployment = Deployment.parse(config["systems"][system]["deployment"])
    rates = _rates(run, system, deployment.devices)
    rate = _passing(run, system, rates) if rate_rps is None else _shown(rate_rps)
    expect(rate in rates, f"--rate: expected one of {list(rates)}", rate)
    seeds = {config["seed"] + point.replica: point for point in rates[rate]}
    seed = config["seed"] if seed is None else seed
    expect(seed in seeds, f"--seed: expected one of {list(seeds)}", seed)
    about = {
        "run": str(path),
        "system": system,
        "rate_rps_per_device": float(rate),
        "seed": seed,
        "clock": config["clock"],
        "durations": "live" if config["clock"] == "wall" else config["durations"],
        "executed": run.load(seeds[seed])["executed"],
    }
    timelines = [to_timeline(row) for row in run.requests(seeds[seed])]
    return chrome_trace(deployment, run.events(seeds[seed]), timelines, about)


def _rates(run: SavedRun, system: str, devices: int) -> dict[str, list[Point]]:
    """The system's points by their rate per device."""
    found: dict[str, list[Point]] = {}
    for point in run.points():
        if point.system == system:
            found.setdefault(_shown(point.rate_rps / devices), []).append(point)
    return found


def _passing(run: SavedRun, system: str, rates: Mapping[str, object]) -> str:
    """The rate per device that a system is judged by."""
    expected = f"--rate: expected one of {list(rates)}, or a run with one that passes"
    summary = run.read_json("summary.json")
    expect(summary is not None, expected, "no summary.json")
    found = summary["systems"][system]
    if "throughput" in found:
        return _shown(found["throughput"]["best_rps_per_device"])
    rate = found["goodput"]["pass_rps_per_device"]
    expect(rate is not None, expected, rate)
    return _shown(rate)


def _shown(rate_rps: float) -> str:
    """Rates are tried with four digits, before they are divided by the devices."""
    return f"{rate_rps:.6g}"


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    try:
        path = pathlib.Path(_RUN.value or "")
        trace = draw(path, _SYSTEM.value or "", _RATE.value, _SEED.value)
        pathlib.Path(_OUT.value or "").write_text(json.dumps(trace))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{trace['otherData']}\n{_OUT.value}: open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    flags.mark_flags_as_required(["run", "system"])
    app.run(main)
