"""A run of a sweep as a timeline that opens in Perfetto (ui.perfetto.dev).

    python -m experiments.chrome_trace --run=runs/tiny --system=disaggregated
    python -m experiments.chrome_trace --run=runs/tiny --system=vllm_v0 --rate=20

One lane for each device, each link and each request. Without --rate it is the run at
the highest rate that passes.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import app, flags

from disagg_jax.runlog.chrome_trace import chrome_trace
from experiments.cli.command import command
from experiments.runs.folder import write_text
from experiments.runs.request_rows import to_timeline
from experiments.runs.run_dir import SavedRun

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
    picked = run.pick(system, rate_rps, seed)
    config = run.config()
    about = {
        "run": str(path),
        "system": picked.point.system,
        "rate_rps_per_device": float(picked.rate_rps),
        "seed": picked.seed,
        "clock": config["clock"],
        "durations": "live" if config["clock"] == "wall" else config["durations"],
        "executed": run.load(picked.point)["executed"],
    }
    timelines = [to_timeline(row) for row in run.requests(picked.point)]
    deployment, events = picked.deployment, run.events(picked.point)
    return chrome_trace(deployment, events, timelines, about)


@command
def main() -> None:
    path = pathlib.Path(_RUN.value or "")
    trace = draw(path, _SYSTEM.value or "", _RATE.value, _SEED.value)
    write_text(pathlib.Path(_OUT.value or ""), json.dumps(trace))
    print(f"{trace['otherData']}\n{_OUT.value}: open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    flags.mark_flags_as_required(["run", "system"])
    app.run(main)
