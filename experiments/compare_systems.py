"""Says when not to disaggregate: who wins, over lengths and over targets.

    python -m experiments.compare_systems --out=runs/compare

Simulates every system on equal devices with equal arrivals in each cell of two maps,
prompt length x output length at fixed targets, and TTFT target x TPOT target for a
fixed workload, and prints the winner, its goodput per device, its margin with a 95 %
interval, the parameters that each system was given and why, and the cells in which
colocated systems clearly win. The two systems that are compared, the best
disaggregated and the best colocated one, get more seeds until they are told apart
(--seeds). OUT gets maps.txt, maps.png and maps.json.

Any two systems can be compared. If all are colocated, or all disaggregated, it says
which of them wins where:

    python -m experiments.compare_systems --systems=vllm_v1,sarathi_serve --devices=2 \\
        --set systems.vllm_v1.deployment=colocated:tp2

Durations are a roofline's of --model on --hardware, or those of the simulation that
--config names (experiments/configs/named_simulations.py). A model or a device of your
own is a .json file (models/lookup.py); a system, a router, a model or a cost model of
your own is named by module:attribute. One pair of targets gives one answer, and bars as
picture:

    python -m experiments.compare_systems --map=targets --ttfts=0.5 --tpots=0.04 \\
        --model=config.json --hardware=h100 --trace=FILE.csv --out=runs/answer

It also prints all layouts that were tried, and the fewest devices on which each system
serves the trace's own rate, or --rate, within the targets, with TTFT, TPOT and the
share of good requests there.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from disagg_jax.deployment import Deployment
from disagg_jax.formats import MAPS
from disagg_jax.metrics.attainment import SLO
from disagg_jax.progress import Progress, Stop, never, silent
from disagg_jax.scheduling import Policy, find_system, get_system
from disagg_jax.scheduling.system import System
from disagg_jax.scheduling.tuning import has_rule, step_size, tile_multiples
from disagg_jax.search.cells import Grid as Cells
from disagg_jax.search.cells import compare, counted
from disagg_jax.search.comparison import (
    KNOWN,
    POLICIES,
    ComparisonSpec,
    judge,
    system_searches,
)
from disagg_jax.search.fewest import Demand, fewest_devices, fewest_search
from disagg_jax.search.layouts import dropped, with_all_layouts
from disagg_jax.search.maps import Map, lengths_map, slos_map
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.engines import EngineProfile
from disagg_jax.sim.simulation import Simulation
from disagg_jax.sim.workers import Mapper
from disagg_jax.workload.workload import TraceWorkload, Workload
from experiments.cli.command import command
from experiments.cli.flags import Flags, expect_used
from experiments.cli.progress import MinutesFlag, ProgressLines
from experiments.cli.simulation_flags import SimulationFlags
from experiments.cli.trace_flags import TraceFlags
from experiments.cli.workers import Workers, open_workers
from experiments.comparison import report
from experiments.comparison.report import Grid
from experiments.comparison.serving import RateAnswer
from experiments.configs.options import no_effect, shown
from experiments.configs.override import assign
from experiments.configs.paper_workloads import get_workload
from experiments.runs.folder import (
    plain,
    profile_record,
    run_folder,
    write_json,
    write_text,
)
from experiments.runs.run_dir import environment

_COMMAND = "python -m experiments.compare_systems"
_TILE = 128  # rows of a matmul's tile, where the hardware is not asked

FLAGS = Flags()
_SIMULATED = SimulationFlags(FLAGS)
_DEVICES = FLAGS.integer("devices", 4, "For each system.")
_SYSTEMS = FLAGS.list(
    "systems",
    list(POLICIES),
    "To compare, by default with that of --engine; one of your own is "
    "module:attribute.",
)
_SET = FLAGS.multi_string(
    "set",
    [],
    "systems.NAME.deployment=DEPLOYMENT, instead of all ways to use the devices, or "
    "systems.NAME.policies.ROLE.PARAMETER=VALUE; may be repeated.",
)
_BUDGETS = FLAGS.list(
    "budgets",
    [],
    "Step sizes in tokens to try for every system (chunk, token budget, L_m, cap of a "
    "prefill batch); the best is taken. By default each paper's rule chooses one.",
)
_MAP = FLAGS.enum("map", "both", ["lengths", "targets", "both"], "Which map.")
_PROMPTS = FLAGS.list("prompts", ["512", "1024", "2048", "4096"], "Mean tokens.")
_OUTPUTS = FLAGS.list("outputs", ["16", "64", "256"], "Mean tokens.")
_SIGMA = FLAGS.float("sigma", 0.5, "Of the logarithm of lengths; 0: all are equal.")
_MAX_TOKENS = FLAGS.integer(
    "max_tokens",
    8192,
    "Prompt and output of a request: the simulation's context limit, in the place of "
    "that of --config.",
)
_SLO = FLAGS.string("slo", "0.5,0.04", "TTFT_S,TPOT_S of the map of lengths.")
_TTFTS = FLAGS.list("ttfts", ["0.25", "0.5", "1"], "Seconds.")
_TPOTS = FLAGS.list("tpots", ["0.02", "0.04", "0.08"], "Seconds.")
_WORKLOAD = FLAGS.string(
    "workload",
    "longbench",
    "Of the map of targets: sharegpt, humaneval, longbench or fixed:PROMPTxOUTPUT.",
)
_TRACE = FLAGS.string(
    "trace",
    None,
    "Instead: a trace of Azure, BurstGPT, Mooncake, Bailian, splitwise-sim, Vidur or "
    "ShareGPT, or a CSV with named columns. Requests longer than max_tokens or the "
    "simulation's context are left out and counted.",
)
_TRACE_FILE = TraceFlags(FLAGS)
_TARGET = FLAGS.float("target", 0.9, "Joint attainment to reach.")
_TOLERANCE = FLAGS.float("tolerance", 0.08, "Of goodputs, relative.")
_REQUESTS = FLAGS.integer(
    "num_requests",
    200,
    "Of a run, at least; more where the targets are long for so few.",
)
_MOST_REQUESTS = FLAGS.integer(
    "max_requests",
    2500,
    "Of a run, at most. Short prompts and long targets ask for more without end; cells "
    "that would need more are marked, and their goodputs are too high.",
)
_SEEDS = FLAGS.list(
    "seeds",
    ["4", "8", "16"],
    "Runs at each rate: the first number for all systems. Each further one, of three "
    "at most, is for the best of either kind while they are not told apart. A short "
    "trace has rows for fewer.",
)
_RATE = FLAGS.float(
    "rate", None, "Requests/s that devices are counted for; by default the trace's own."
)
_MAX_DEVICES = FLAGS.integer(
    "max_devices", 64, "Of one system, for the rate; no more are tried."
)
_MINUTES = MinutesFlag(FLAGS, "cells, more seeds and the last tables")
_WORKERS = FLAGS.workers()
_OUT = FLAGS.string("out", None, "Folder for maps.{txt,png,json}.")

T = TypeVar("T")


def numbers(name: str, texts: Sequence[str], kind: Callable[[str], T]) -> tuple[T, ...]:
    """The values of a list flag.

    Raises:
      ValueError: naming the flag, if they are no such numbers.
    """
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        raise ValueError(
            f"{name}: expected numbers joined by commas, got '{','.join(texts)}'"
        ) from None


def _check_flags() -> None:
    """Raise ValueError on a flag that has no effect beside the others."""
    lengths, targets = (_MAP.value in (name, "both") for name in ("lengths", "targets"))
    used, got = expect_used, f"--map={_MAP.value}"
    of_lengths = (_PROMPTS, _OUTPUTS, _SIGMA, _SLO)
    used(lengths, *of_lengths, expected="--map=lengths or both", got=got)
    of_targets = (_TTFTS, _TPOTS, _WORKLOAD, _TRACE)
    used(targets, *of_targets, expected="--map=targets or both", got=got)
    trace = f"--trace={_TRACE.value}"
    used(_TRACE.value is None, _WORKLOAD, expected="no --trace", got=trace)
    config = _SIMULATED.config
    caps = lengths or _TRACE.value is not None or config is None
    expected = "a map of lengths, a trace, or no --config"
    got = f"{got} and --config={config}"
    used(caps, _MAX_TOKENS, expected=expected, got=got)
    single = not lengths and len(_TTFTS.value) == len(_TPOTS.value) == 1
    expected, got = "--map=targets with one --ttfts and one --tpots", "several cells"
    used(single, _RATE, _MAX_DEVICES, expected=expected, got=got)
    rated = _TRACE.value is not None or _RATE.value is not None
    used(rated, _MAX_DEVICES, expected="a --trace or a --rate", got="neither")


def _simulation() -> tuple[Simulation, tuple[int, ...]]:
    """Return what is simulated, and the step sizes to choose from."""
    given = _SIMULATED.config is None or FLAGS.values["max_tokens"].present
    simulation = _SIMULATED.read(_MAX_TOKENS.value if given else None)
    hardware, engine = _SIMULATED.hardware, simulation.engine
    tile = max(_TILE, hardware.tile_rows) if hardware else _TILE
    return simulation, tile_multiples(tile, engine.token_budget if engine else None)


def asked_systems(
    names: Sequence[str],
    assignments: Sequence[str],
    budgets: Sequence[int],
    engine: EngineProfile | None = None,
) -> dict[str, System]:
    """Return the systems of these names, changed as `--set` says.

    A system without a deployment of its own is tried on all.

    Args:
      engine: whose limits the systems have where `--set` says nothing.

    Raises:
      ValueError: on an unknown name or key, or on a step size that is chosen anyway.
    """
    found = [find_system(name, KNOWN) for name in names]
    known = {name: get_system(name, KNOWN) for name in found}
    if engine is not None:
        known = {name: engine.limit(policies) for name, policies in known.items()}
    given = {n: System(deployment="", policies=known[n]) for n in found}
    changed = {"systems": given}
    for assignment in assignments:
        changed = assign(changed, assignment)
    for name, system in changed["systems"].items():
        for role, policy in system.policies.items():
            key = f"systems.{name}.policies.{role}"
            _check_step(key, given[name].policies[role], policy, budgets)
    return changed["systems"]


def _check_step(
    key: str, before: Policy, policy: Policy, budgets: Sequence[int]
) -> None:
    """Raise ValueError if the step size was set, and tuning sets it again."""
    declared = step_size(policy)
    if declared is None or not (has_rule(policy) or budgets):
        return
    size = getattr(policy, declared.parameter)
    if size != getattr(before, declared.parameter):
        got = f"--budgets={shown(tuple(budgets))}" if budgets else "the paper's rule"
        name = f"--set {key}.{declared.parameter}"
        raise no_effect(name, size, expected=f"--budgets={size}", got=got)


def _spec() -> ComparisonSpec:
    simulation, sizes = _simulation()
    budgets = numbers("budgets", _BUDGETS.value, int)
    engine, names = simulation.engine, _SYSTEMS.value
    if engine is not None and not _SYSTEMS.present:
        names = list(dict.fromkeys([*names, engine.system]))
    systems = asked_systems(names, _SET.value, budgets, engine)
    return ComparisonSpec(
        simulation=simulation,
        devices=_DEVICES.value,
        systems={name: system.policies for name, system in systems.items()},
        placed={
            name: Deployment.parse(system.deployment)
            for name, system in systems.items()
            if system.deployment
        },
        sizes=sizes,
        budgets=budgets,
        plan=SearchPlan(
            target=_TARGET.value,
            growth=1.2,
            tolerance=_TOLERANCE.value,
            max_rates=30,
        ),
        num_requests=_REQUESTS.value,
        max_requests=max(_REQUESTS.value, _MOST_REQUESTS.value)
        if not FLAGS.values["max_requests"].present
        else _MOST_REQUESTS.value,
        looks=numbers("seeds", _SEEDS.value, int),
    )


def _maps(simulation: Simulation) -> list[Map]:
    maps = {"lengths": _lengths, "targets": _targets}
    return [
        make(simulation) for name, make in maps.items() if _MAP.value in (name, "both")
    ]


def _lengths(simulation: Simulation) -> Map:
    return lengths_map(
        numbers("prompts", _PROMPTS.value, int),
        numbers("outputs", _OUTPUTS.value, int),
        _SIGMA.value,
        SLO.parse(_SLO.value),
        min(_MAX_TOKENS.value, simulation.max_context),
    )


def _targets(simulation: Simulation) -> Map:
    return slos_map(
        numbers("ttfts", _TTFTS.value, float),
        numbers("tpots", _TPOTS.value, float),
        *_workload(simulation),
    )


def _workload(simulation: Simulation) -> tuple[Workload, str]:
    if _TRACE.value is None:
        return get_workload(_WORKLOAD.value), _WORKLOAD.value
    longest = min(_MAX_TOKENS.value, simulation.max_context)
    trace = _TRACE_FILE.open(_TRACE.value)
    workload = TraceWorkload.fitting(trace, longest)
    return workload, pathlib.Path(_TRACE.value).name


def run(
    spec: ComparisonSpec,
    maps: Sequence[Map],
    command: str = _COMMAND,
    workers: Workers | None = None,
    out: pathlib.Path | None = None,
    progress: Progress = silent,
    about: Mapping[str, Any] | None = None,
    *,
    stop: Stop = never,
    rate_rps: float | None = None,
    max_devices: int = 64,
) -> tuple[str, list[Grid]]:
    """Compares all systems in all cells; returns the report and what was found.

    Args:
      command: by which it can be repeated.
      out: folder for maps.{txt,png,json}; for a trace, lengths.png too.
      stop: whether the time is spent.
      rate_rps: of a single cell: to find the fewest devices for; None is the trace's
        own rate, if it has times.
      max_devices: of a system, for that rate.
      about: more for maps.json: what a command was asked. It replaces nothing of
        another; a notebook's cell, changed and run again, has none and does.

    Raises:
      ValueError, OSError: on bad input, before any work.
    """
    workers = workers or os.cpu_count() or 1
    start = time.perf_counter()
    ran_in = environment()  # now, as files may change while this runs
    asked = about or plain(spec)
    with run_folder(out, asked, "maps.json", replace=about is None):
        with open_workers(workers) as mapper:
            grids = compare(spec, maps, mapper, progress, stop)
            left_out = _unfinished(maps, grids)
            maps, grids = _begun(maps, grids)
            served = None
            if report.is_single(maps, grids):
                single = _Single(spec, maps[0], mapper, progress)
                if lacking := single.complete_layouts(grids[0], stop):
                    left_out.append(f"goodputs of {lacking} layouts")
                if stop():
                    left_out.append("the devices that a rate needs")
                else:
                    served = single.served(grids[0], rate_rps, max_devices)
        seconds = time.perf_counter() - start
        text = "\n\n".join(
            [
                f"# {command}   commit {ran_in['commit']}\n"
                f"# {seconds:.1f} s with {workers} workers on {ran_in['cpus']} cores, "
                f"load average {ran_in['load_average'][0]:.1f} at the start",
                report.text(spec, maps, grids, served, left_out),
            ]
        )
        if out is not None:
            content = {
                **report.record(spec, maps, grids, served, left_out),
                "wall_s": seconds,
                "workers": workers,
                "environment": ran_in,
                **(about or {}),
            }
            write_json(out / "maps.json", MAPS.write(content))
            write_text(out / "maps.txt", text + "\n")
            report.plot(spec, maps, grids, out / "maps.png")
            _plot_traces(maps, out)
    return text, list(grids)


def _begun(
    maps: Sequence[Map], grids: Sequence[Cells]
) -> tuple[list[Map], list[Cells]]:
    """Return the maps of which some cell was searched."""
    kept = [(one, grid) for one, grid in zip(maps, grids, strict=True) if grid]
    return [one for one, _ in kept], [grid for _, grid in kept]


def _unfinished(maps: Sequence[Map], grids: Sequence[Cells]) -> list[str]:
    """Name what there was no time for."""
    said: list[str] = []
    for each, grid in zip(maps, grids, strict=True):
        if lacking := len(each.cells) - len(grid):
            said.append(f"{lacking} of {len(each.cells)} cells of the map {each.name}")
        few = [one for one in map(judge, grid.values()) if one.wants_seeds]
        if few:
            said.append(f"more seeds in {len(few)} undecided cells")
    return said


class _Single:
    """What is asked of a single cell besides its winner."""

    def __init__(
        self, spec: ComparisonSpec, each: Map, mapper: Mapper, progress: Progress
    ):
        self._spec, self._mapper, self._progress = spec, mapper, progress
        ((self._at, self._cell),) = each.cells.items()
        self._searches = system_searches(spec, self._cell)

    def complete_layouts(self, grid: Cells, stop: Stop) -> int:
        """Find the goodputs of all layouts; return of how many there was no time."""
        if not stop():
            grid[self._at] = with_all_layouts(
                grid[self._at], self._searches, self._mapper, self._progress, stop
            )
        return sum(len(list(dropped(one))) for one in grid[self._at])

    def served(
        self, grid: Cells, rate_rps: float | None, max_devices: int
    ) -> RateAnswer | None:
        """Find the devices that a rate needs, by default the trace's own."""
        workload = self._cell.workload
        own_rps = workload.rate_rps if isinstance(workload, TraceWorkload) else None
        rate = rate_rps or own_rps
        if rate is None:
            return None
        demand = Demand.of(self._cell, rate, self._searches[0], max_devices)
        tasks = [
            fewest_search(self._spec, self._cell, demand, search, one)
            for search, one in zip(self._searches, grid[self._at], strict=True)
        ]
        part = f"devices for {rate:.4g} requests/s"
        results = self._mapper(fewest_devices, tasks)
        found = tuple(counted(results, part, len(tasks), self._progress))
        return RateAnswer(demand=demand, own=rate_rps is None, found=found)


def _plot_traces(maps: Sequence[Map], out: pathlib.Path) -> None:
    """Of a map whose cells share a trace, its lengths."""
    for each in maps:
        workload = next(iter(each.cells.values())).workload
        if isinstance(workload, TraceWorkload):
            report.plot_lengths(workload, out / "lengths.png")


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    _check_flags()
    spec = _spec()
    text, _ = run(
        spec,
        _maps(spec.simulation),
        " ".join([_COMMAND, *sys.argv[1:]]),
        _WORKERS.value,
        pathlib.Path(_OUT.value) if _OUT.value else None,
        ProgressLines().step,
        {"flags": FLAGS.asked(), **profile_record(spec.simulation)},
        stop=deadline.passed,
        rate_rps=_RATE.value,
        max_devices=_MAX_DEVICES.value,
    )
    print(text)


if __name__ == "__main__":
    main()
