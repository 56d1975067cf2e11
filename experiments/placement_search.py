"""Searches the deployment that serves the most requests on given devices.

    python -m experiments.placement_search --model=opt-66b --hardware=a100 \\
        --devices=32 --slo=2.5,0.15 --workload=sharegpt --out=runs/placement
    python -m experiments.placement_search --model=llama-3-8b --devices=8 \\
        --hardware=prefill=h100,decode=a100-80g --slo=0.5,0.04 --trace=FILE.csv

--slo is TTFT_S,TPOT_S. Algorithms: high and low are DistServe's two (OSDI'24, section
4); joint takes any numbers of instances, and colocated systems too. --systems names any
of either kind: two colocated ones, say, or two of prefill and decode instances.

Durations are DistServe's measured coefficients where its profile has the model on an
a100, and a roofline otherwise, or those of --cost; with --engine, a roofline with the
overheads of that engine, and its limits for all systems. KV moves over the links inside
a node. Where each role has devices of its own kind, they count alike, colocated systems
have no part, and KV moves over --link.

Copies of a unit are independent; the answer is also simulated as one deployment with
all their instances (--whole): so 2 prefill + 2 decode is held against two copies of 1 +
1. --rate asks for as many copies as that takes; a trace's own rate is printed.

OPT-66B with high and low takes 22.0 and 82.5 s on 96 cores in the paper (Fig. 12).
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.deployment import Role
from disagg_jax.errors import require
from disagg_jax.formats import PLACEMENT
from disagg_jax.metrics import SLO
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.scheduling import get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.search.placement import (
    ALGORITHMS,
    PLACED,
    PlacementProblem,
    PlacementSearch,
)
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.engines import EngineProfile
from disagg_jax.sim.simulation import Simulation
from disagg_jax.workload import TraceWorkload, Workload
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags, expect_used
from experiments.cli.names import DEVICE, ENGINE, LINK, MODEL, PROFILE
from experiments.cli.progress import MinutesFlag, ProgressLines
from experiments.cli.trace_flags import TraceFlags
from experiments.cli.workers import Workers, open_workers
from experiments.configs.named_simulations import (
    COSTS,
    devices_by_role,
    placement_simulation,
)
from experiments.configs.paper_workloads import get_workload
from experiments.placement.report import report
from experiments.runs.folder import plain, profile_record, run_folder, write_text

FLAGS = Flags()
_MODEL = FLAGS.string("model", REQUIRED, MODEL)
_DEVICE = FLAGS.string(
    "hardware",
    "a100",
    f"For all, or prefill=DEVICE,decode=DEVICE. a100 is a100-80g. {DEVICE}",
)
_LINK = FLAGS.string(
    "link",
    None,
    "That KV takes; by default the devices' own, and 200gb between unlike ones. "
    f"{LINK}",
)
_COST = FLAGS.string(
    "cost", None, f"Step times: {', '.join(COSTS)}; {PROFILE}, or module:attribute."
)
_ENGINE = FLAGS.string(
    "engine",
    None,
    f"Whose overheads and limits instances have, by a roofline; by default none. "
    f"{ENGINE}",
)
_DEVICES = FLAGS.integer("devices", REQUIRED, "How many there are.")
_SLO = FLAGS.string("slo", REQUIRED, "TTFT_S,TPOT_S: targets in seconds.")
_WORKLOAD = FLAGS.string(
    "workload", "sharegpt", "sharegpt, humaneval, longbench or fixed:PROMPTxOUTPUT."
)
_TRACE = FLAGS.string(
    "trace", None, "Instead: a trace, of the formats that compare_systems reads."
)
_TRACE_FILE = TraceFlags(FLAGS)
_MAX_TOKENS = FLAGS.integer(
    "max_tokens",
    8192,
    "Prompt and output of a request of the trace; longer ones are left out.",
    lower_bound=2,
)
_ALGORITHM = FLAGS.enum(
    "algorithm",
    "all",
    [*ALGORITHMS, "all"],
    "Which search; all is high and low, and joint where all systems are colocated.",
)
_SYSTEMS = FLAGS.list(
    "systems",
    list(PLACED),
    "Any number, by default with that of --engine. Those of prefill and decode "
    "instances take part in every search, colocated ones in joint. One of your own is "
    "module:attribute.",
)
_SYSTEM = FLAGS.string(
    "system",
    None,
    "Only this one, in the place of --systems; a colocated one in joint.",
)
_RATE = FLAGS.float("rate", None, "Requests/s to serve; else the devices count.")
_TARGET = FLAGS.float("target", 0.9, "Joint attainment to reach.")
_REQUESTS = FLAGS.integer("num_requests", 1000, "Of a run, for up to a node.")
_SEEDS = FLAGS.integer("seeds", 1, "Runs at each rate.")
_TOLERANCE = FLAGS.float("tolerance", 0.05, "Of goodputs, relative.")
_MARGIN = FLAGS.float("margin", 0.1, "By which the bounds of pruning are wider.")
_EXHAUSTIVE = FLAGS.boolean("exhaustive", False, "Search all candidates in full.")
_WHOLE = FLAGS.boolean(
    "whole", True, "Simulate answers as a whole: phases together, copies as one."
)
_MINUTES = MinutesFlag(FLAGS, "candidates")
_WORKERS = FLAGS.workers()
_OUT = FLAGS.string("out", None, "Folder for placement.json.")


def run(
    problem: PlacementProblem,
    algorithms: Sequence[str],
    workers: Workers | None = None,
    out: pathlib.Path | None = None,
    progress: Progress = silent,
    *,
    prune: bool = True,
    whole: bool = False,
    stop: Stop = never,
    about: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Searches; returns the report and what is in placement.json.

    Args:
      workers: None is a process for each core.
      out: folder for placement.json.
      prune, whole, stop: see `PlacementSearch`.
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
                stop=stop,
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
    bounds = "--algorithm=low, joint or all"  # of pairs, by their phases
    expect_used(algorithm != "high", _MARGIN, expected=bounds, got=got)
    prunes = not _EXHAUSTIVE.value
    expect_used(prunes, _MARGIN, expected="no --exhaustive", got="--exhaustive")
    trace = f"--trace={_TRACE.value}"
    expect_used(_TRACE.value is None, _WORKLOAD, expected="no --trace", got=trace)
    traced = _TRACE.value is not None
    of_trace = (_MAX_TOKENS, *_TRACE_FILE.holders)
    expect_used(traced, *of_trace, expected="a --trace", got="none")
    alone = f"--system={_SYSTEM.value}"
    expect_used(_SYSTEM.value is None, _SYSTEMS, expected="no --system", got=alone)


def _systems(engine: EngineProfile | None) -> dict[str, Mapping[Role, Policy]]:
    """Return the systems to place, with the limits of the engine."""
    names = _SYSTEMS.value if _SYSTEM.value is None else [_SYSTEM.value]
    if engine is not None and not (_SYSTEMS.present or _SYSTEM.present):
        names = [*names, engine.system]
    systems = {name: get_system(name) for name in names}
    if engine is not None:
        systems = {name: engine.limit(policies) for name, policies in systems.items()}
    prefill, decode = devices_by_role(_DEVICE.value)
    if prefill != decode and not (_SYSTEMS.present or _SYSTEM.present):
        systems = {n: s for n, s in systems.items() if Role.COLOCATED not in s}
    colocated = [name for name, roles in systems.items() if Role.COLOCATED in roles]
    expected = f"systems: expected no colocated one on --hardware={_DEVICE.value}"
    require(prefill == decode or not colocated, expected, names)
    return systems


def _algorithms(problem: PlacementProblem) -> tuple[str, ...]:
    if _ALGORITHM.value != "all":
        return (_ALGORITHM.value,)
    return ("high", "low") if problem.apart else ("joint",)


def _traffic(max_context: int) -> tuple[Workload, list[str]]:
    """Return the workload, and what is said about a trace."""
    if _TRACE.value is None:
        return get_workload(_WORKLOAD.value), []
    workload = TraceWorkload.fitting(_TRACE_FILE.open(_TRACE.value), max_context)
    rate = workload.rate_rps
    own = [f"the trace's own rate: {rate:.4g} requests/s"] if rate else []
    return workload, [*workload.notes, *own]


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    _check_flags()
    context = {"max_context": _MAX_TOKENS.value} if _TRACE.value is not None else {}
    simulation = placement_simulation(
        *(_MODEL.value, _DEVICE.value, _COST.value, _LINK.value, _ENGINE.value),
        **context,
    )
    systems = _systems(simulation.engine)
    workload, notes = _traffic(simulation.max_context)
    problem = PlacementProblem.of(
        simulation,
        _DEVICES.value,
        systems,
        workload=workload,
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
    text, _ = run(
        problem,
        _algorithms(problem),
        _WORKERS.value,
        pathlib.Path(_OUT.value) if _OUT.value else None,
        ProgressLines().step,
        prune=not _EXHAUSTIVE.value,
        whole=_WHOLE.value,
        stop=deadline.passed,
        about={"flags": FLAGS.asked(), **profile_record(simulation)},
    )
    print("\n".join([_simulated(simulation), *notes, text]))


def _simulated(simulation: Simulation) -> str:
    """Name the model, its devices and the link between them."""
    model, cost, other = simulation.model, simulation.cost, simulation.prefill_cost
    devices = f"prefill {other.name}, decode {cost.name}" if other else cost.name
    return f"{model.name}: {devices}, KV over {simulation.wires}"


if __name__ == "__main__":
    main()
