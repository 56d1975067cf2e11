"""Searches the deployment that serves the most requests on given devices.

    python -m experiments.placement_search --model=opt-66b --hardware=a100 \\
        --devices=32 --slo=2.5,0.15 --workload=sharegpt --out=runs/placement

--slo is TTFT_S,TPOT_S. Algorithms: high and low are DistServe's two (OSDI'24, section
4); joint takes any numbers of instances, and colocated systems too. Durations are
DistServe's measured coefficients where its profile has the model on an a100, and a
roofline otherwise; KV moves over the links inside a node.

OPT-66B with high and low takes 22.0 and 82.5 s on 96 cores in the paper (Fig. 12).
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from disagg_jax.formats import PLACEMENT
from disagg_jax.metrics import SLO
from disagg_jax.search.placement import ALGORITHMS, PlacementProblem, PlacementSearch
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.workers import worker_pool
from experiments.cli.command import command, own_flags
from experiments.cli.flags import expect_used
from experiments.configs.named_simulations import placement_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.placement.report import report
from experiments.runs.folder import plain, run_folder, write_text

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "A name of disagg_jax/sim/model_shape.py.",
    required=True,
    allow_override=True,
)
_DEVICE = flags.DEFINE_string("hardware", "a100", "A device, such as a100 or h100.")
_DEVICES = flags.DEFINE_integer("devices", None, "How many there are.", required=True)
_SLO = flags.DEFINE_string(
    "slo", None, "TTFT_S,TPOT_S: targets in seconds.", required=True
)
_WORKLOAD = flags.DEFINE_string(
    "workload", "sharegpt", "sharegpt, humaneval, longbench or fixed:PROMPTxOUTPUT."
)
_ALGORITHM = flags.DEFINE_enum(
    "algorithm", "all", [*ALGORITHMS, "all"], "Which search; all is high and low."
)
_RATE = flags.DEFINE_float("rate", None, "Requests/s to serve; else the devices count.")
_TARGET = flags.DEFINE_float("target", 0.9, "Joint attainment to reach.")
_REQUESTS = flags.DEFINE_integer(
    "num_requests", 1000, "Of a run, for up to a node.", allow_override=True
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs at each rate.", allow_override=True)
_TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "Of goodputs, relative.")
_MARGIN = flags.DEFINE_float("margin", 0.1, "By which the bounds of pruning are wider.")
_EXHAUSTIVE = flags.DEFINE_bool("exhaustive", False, "Search all candidates in full.")
_WHOLE = flags.DEFINE_bool("whole", False, "Simulate the answer of high as a whole.")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes; one a core by default.", allow_override=True
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder for placement.json.", allow_override=True
)


def run(
    problem: PlacementProblem,
    algorithms: Sequence[str],
    workers: int | None = None,
    out: pathlib.Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    *,
    prune: bool = True,
    whole: bool = False,
    about: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Searches; returns the report and what is in placement.json.

    Args:
      workers: processes; None is one a core.
      out: folder for placement.json.
      prune, whole: see `PlacementSearch`.
      about: more for placement.json: what a command was asked. It replaces nothing of
        another; a notebook's cell, changed and run again, has none and does.

    Raises:
      ValueError: on bad input, before any work.
    """
    start = time.perf_counter()
    workers = workers or os.cpu_count() or 1
    asked = about or {"problem": plain(problem), "algorithms": list(algorithms)}
    with run_folder(out, asked, "placement.json", replace=about is None):
        with worker_pool(workers) as mapper:
            search = PlacementSearch(
                problem=problem,
                mapper=mapper,
                progress=progress,
                prune=prune,
                whole=whole,
            )
            found = search.run(algorithms)
        seconds = time.perf_counter() - start
        found |= {"wall_s": seconds, "workers": workers, **(about or {})}
        if out is not None:
            content = json.dumps(PLACEMENT.write(found), indent=1)
            write_text(out / "placement.json", content + "\n")
    return f"{report(found)}\n{seconds:.1f} s with {workers} workers", found


def _check_flags() -> None:
    """Raise ValueError on a flag that has no effect beside the others."""
    algorithm, got = _ALGORITHM.value, f"--algorithm={_ALGORITHM.value}"
    high = algorithm in ("high", "all")
    expect_used(high, _WHOLE, expected="--algorithm=high or all", got=got)
    bounds = "--algorithm=low, joint or all"  # of pairs, by their phases
    expect_used(algorithm != "high", _MARGIN, expected=bounds, got=got)
    prunes = not _EXHAUSTIVE.value
    expect_used(prunes, _MARGIN, expected="no --exhaustive", got="--exhaustive")


@command
def main() -> None:
    start = time.perf_counter()

    def progress(text: str) -> None:
        elapsed = time.perf_counter() - start
        print(f"[{elapsed:6.1f} s] {text}", file=sys.stderr, flush=True)

    _check_flags()
    problem = PlacementProblem.of(
        placement_simulation(_MODEL.value, _DEVICE.value),
        _DEVICES.value,
        workload=get_workload(_WORKLOAD.value),
        slo=SLO.parse(_SLO.value),
        plan=SearchPlan(
            target=_TARGET.value,
            growth=1.25,
            tolerance=_TOLERANCE.value,
            max_rates=30,
        ),
        rate_rps=_RATE.value,
        num_requests=_REQUESTS.value,
        seeds=tuple(range(_SEEDS.value)),
        margin=_MARGIN.value,
    )
    chosen = ("high", "low") if _ALGORITHM.value == "all" else (_ALGORITHM.value,)
    text, _ = run(
        problem,
        chosen,
        _WORKERS.value,
        pathlib.Path(_OUT.value) if _OUT.value else None,
        progress,
        prune=not _EXHAUSTIVE.value,
        whole=_WHOLE.value,
        about={"flags": own_flags()},
    )
    print(text)


if __name__ == "__main__":
    app.run(main)
