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

from disagg_jax.runlog.chrome_trace import chrome_trace
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from experiments.runs.folder import write_text
from experiments.runs.request_rows import to_timeline
from experiments.runs.saved_run import SavedRun

FLAGS = Flags()
_RUN = FLAGS.string("run", REQUIRED, "A run directory of goodput_sweep.")
_SYSTEM = FLAGS.string("system", REQUIRED, "Which of its systems.")
_TARGET = FLAGS.string("target", None, "tight or relaxed; by default the run's first.")
_RATE = FLAGS.float("rate", None, "Requests/s per device, as in table.txt.")
_SEED = FLAGS.integer("seed", None, "Of the run; by default the first.")
_OUT = FLAGS.string("out", "trace.json", "File to write.")


def draw(
    path: pathlib.Path,
    system: str,
    rate_rps: float | None,
    seed: int | None,
    target: str | None = None,
) -> dict[str, Any]:
    """The trace of one run in a run directory; see `chrome_trace`.

    Args:
      rate_rps: per device; None is the highest that passes.
      seed: None is the first.
      target: of the run, tight or relaxed; None is the first.

    Raises:
      ValueError: if there is no such run; says what there is.
    """
    run = SavedRun(path)
    picked = run.pick(system, rate_rps, seed, target)
    config = run.config()
    about = {
        "run": str(path),
        "system": picked.point.system,
        **({"target": picked.point.target} if picked.point.target else {}),
        "rate_rps_per_device": float(picked.rate_rps),
        "seed": picked.seed,
        "clock": config["clock"],
        "durations": "live" if config["clock"] == "wall" else config["durations"],
        "executed": run.load(picked.point)["executed"],
    }
    timelines = [to_timeline(row) for row in run.requests(picked.point)]
    deployment, events = picked.deployment, run.events(picked.point)
    return chrome_trace(deployment, events, timelines, about)


@command(FLAGS)
def main() -> None:
    path = pathlib.Path(_RUN.value)
    trace = draw(path, _SYSTEM.value, _RATE.value, _SEED.value, _TARGET.value)
    write_text(pathlib.Path(_OUT.value), json.dumps(trace))
    print(f"{trace['otherData']}\n{_OUT.value}: open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
