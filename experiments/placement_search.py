"""Searches the deployment that serves the most requests on given devices.

    python -m experiments.placement_search --model=opt-66b --hardware=a100 \\
        --devices=32 --slo=2.5,0.15 --workload=sharegpt --out=runs/placement

--slo is TTFT_S,TPOT_S. Algorithms: high and low are DistServe's two (OSDI'24, section
4); joint takes any numbers of instances, and colocated systems too. Durations are
DistServe's measured coefficients where its profile has the model on an a100, and a
roofline otherwise, or those of --cost; KV moves over the links inside a node.

OPT-66B with high and low takes 22.0 and 82.5 s on 96 cores in the paper (Fig. 12).
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Role
from disagg_jax.errors import require
from disagg_jax.formats import PLACEMENT
from disagg_jax.metrics import SLO
from disagg_jax.scheduling import SYSTEMS, get_system
from disagg_jax.search.placement import ALGORITHMS, PlacementProblem, PlacementSearch
from disagg_jax.search.rates import SearchPlan
from experiments.cli.command import command, progress_to_stderr
from experiments.cli.flags import REQUIRED, Flags, expect_used
from experiments.cli.names import DEVICE, MODEL
from experiments.cli.workers import Workers, open_workers
from experiments.configs.named_simulations import COSTS, placement_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.placement.report import report
from experiments.runs.folder import plain, run_folder, write_text

FLAGS = Flags()
_MODEL = FLAGS.string("model", REQUIRED, MODEL)
_DEVICE = FLAGS.string("hardware", "a100", f"a100 is a100-80g. {DEVICE}")
_COST = FLAGS.string(
    "cost", None, f"Step times: {', '.join(COSTS)}, or module:attribute."
)
_DEVICES = FLAGS.integer("devices", REQUIRED, "How many there are.")
_SLO = FLAGS.string("slo", REQUIRED, "TTFT_S,TPOT_S: targets in seconds.")
_WORKLOAD = FLAGS.string(
    "workload", "sharegpt", "sharegpt, humaneval, longbench or fixed:PROMPTxOUTPUT."
)
_ALGORITHM = FLAGS.enum(
    "algorithm", "all", [*ALGORITHMS, "all"], "Which search; all is high and low."
)
_SYSTEMS = FLAGS.list(
    "systems",
    [name for name in SYSTEMS if name != "disaggregated_chunked"],
    "One of prefill and decode instances; those of colocated ones take part in joint. "
    "One of your own is module:attribute.",
)
_RATE = FLAGS.float("rate", None, "Requests/s to serve; else the devices count.")
_TARGET = FLAGS.float("target", 0.9, "Joint attainment to reach.")
_REQUESTS = FLAGS.integer("num_requests", 1000, "Of a run, for up to a node.")
_SEEDS = FLAGS.integer("seeds", 1, "Runs at each rate.")
_TOLERANCE = FLAGS.float("tolerance", 0.05, "Of goodputs, relative.")
_MARGIN = FLAGS.float("margin", 0.1, "By which the bounds of pruning are wider.")
_EXHAUSTIVE = FLAGS.boolean("exhaustive", False, "Search all candidates in full.")
_WHOLE = FLAGS.boolean("whole", False, "Simulate the answer of high as a whole.")
_WORKERS = FLAGS.workers()
_OUT = FLAGS.string("out", None, "Folder for placement.json.")


def run(
    problem: PlacementProblem,
    algorithms: Sequence[str],
    workers: Workers | None = None,
    out: pathlib.Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    *,
    prune: bool = True,
    whole: bool = False,
    about: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Searches; returns the report and what is in placement.json.

    Args:
      workers: None is a process for each core.
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
        with open_workers(workers) as mapper:
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


@command(FLAGS)
def main() -> None:
    _check_flags()
    systems = {name: get_system(name) for name in _SYSTEMS.value}
    apart = [name for name, roles in systems.items() if Role.COLOCATED not in roles]
    expected = "--systems: expected one of prefill and decode instances"
    require(len(apart) == 1, expected, _SYSTEMS.value)
    problem = PlacementProblem.of(
        placement_simulation(_MODEL.value, _DEVICE.value, _COST.value),
        _DEVICES.value,
        systems,
        apart[0],
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
        progress_to_stderr(),
        prune=not _EXHAUSTIVE.value,
        whole=_WHOLE.value,
        about={"flags": FLAGS.asked()},
    )
    print(text)


if __name__ == "__main__":
    main()
