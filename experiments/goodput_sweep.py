"""Finds the goodput of every system, side by side: the main job.

    python -m experiments.goodput_sweep
    python -m experiments.goodput_sweep --config=smollm2_humaneval --out=runs/smollm2
    python -m experiments.goodput_sweep --set workload.num_requests=300 --seed=7
    python -m experiments.goodput_sweep --set criterion=sarathi_serve
    python -m experiments.goodput_sweep --systems=vllm_v0,my_systems:mine
    python -m experiments.goodput_sweep --placement=runs/placement/placement.json

By a tight and a relaxed target side by side (`Config.relaxed`), each with step sizes of
its own. Programs are timed in alternating rounds until their medians are steady; runs
are simulated from these medians, in a process for each core. Programs run on the first
100 requests of the first seed at each system's highest passing rate, which must give
the timelines of the medians; of these runs the requests (`requests.jsonl`, with tokens)
and the event logs are kept, of all others the metrics (`points/`). `--set
execute_all=true` runs programs, and keeps requests, everywhere.

After 4, 8 and 16 seeds (`Config.first_seeds`) it looks whether every system is
resolved, and stops. The search is repeated by each half of the rounds of timing: if
another system is ahead, the table says that these timings do not settle it.

A second table, of the main job alone, has the same systems with an 8B model on 4 H100s,
simulated with the step times of a serving engine, beside the goodputs of this machine,
and what a prompt costs in a step with decodes on both. `--set hardware_table=false`
leaves it out.

Writes a run directory and prints a table. Started again with the same --out and config,
it resumes after an interrupt (one Ctrl-C, or SIGTERM), a kill or a full disk: it says
how many points it found, and compiles programs only where some are still to run. If the
run has ended, it prints the table and does nothing else. While it runs, no other run
may use the directory. With --minutes it begins nothing more after that time, writes
what it has, and says what is missing; the same command goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from disagg_jax.calibration.step_times import (
    StepTimes,
    check_step_times,
    measure_step_times,
)
from disagg_jax.deployment import Deployment
from disagg_jax.engine.engine import Engine
from disagg_jax.formats import PLACEMENT, STEP_TIMES
from disagg_jax.progress import Progress
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.sim.workers import Mapper
from experiments.cli import host_devices
from experiments.cli.command import command
from experiments.cli.flags import Flags, expect_once
from experiments.cli.progress import (
    ENDLESS,
    Deadline,
    MinutesFlag,
    ProgressLines,
    to_stderr,
)
from experiments.cli.workers import Workers, open_workers
from experiments.configs.config import Config
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import Need, no_effect
from experiments.configs.override import override
from experiments.runs.folder import plain, sole_use, write_text
from experiments.runs.run_dir import RunDir, environment
from experiments.runs.saved_run import SavedRun
from experiments.sweep import report
from experiments.sweep.hardware import hardware_table
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    build_engines,
    check_modelled,
    compile_engines,
    instance_memory,
    load_model,
    most_devices,
    step_durations,
)
from experiments.sweep.settled import goodputs, verdict
from experiments.sweep.sweep import OutOfTime, Sweep
from experiments.sweep.targets import resolve_targets
from models.load import Model

FLAGS = Flags()
_CONFIG = FLAGS.string(
    "config", "tiny", f"A named config: {', '.join(sorted(CONFIGS))}."
)
_SET = FLAGS.multi_string("set", [], "Overrides, key=value; may be repeated.")
_SYSTEMS = FLAGS.list(
    "systems", None, "To compare; one of your own is module:attribute."
)
_OUT = FLAGS.string("out", None, "Run directory; default runs/CONFIG.")
_SEED = FLAGS.integer("seed", None, "Short for --set seed=N.")
_STEP_TOKENS = FLAGS.list(
    "step_tokens", None, "Short for --set step_tokens=N,...: step sizes to compare."
)
_PLACEMENT = FLAGS.string(
    "placement", None, "placement.json of a placement search: its answers run too."
)
_STEP_TIMES = FLAGS.string(
    "step_times", None, "step_times.json of another run, instead of timing programs."
)
_MINUTES = MinutesFlag(FLAGS, "looks and rates")
_WORKERS = FLAGS.workers()


def run(
    config: Config,
    out: pathlib.Path,
    step_times_file: str | None,
    workers: Workers | None = None,
    deadline: Deadline = ENDLESS,
) -> str:
    """Run a sweep and return its table; of a run that has ended, only return it.

    Args:
      workers: processes for runs that need no engine; see `open_workers`.
      deadline: after which nothing more is begun.

    Raises:
      ValueError, FileNotFoundError: on bad input, before any work.
    """
    if workers is not None and not _may_leave(config):
        expected = "executed=passing and durations=table"
        got = f"executed={config.executed} and durations={config.durations}"
        raise no_effect("--workers", workers, expected=expected, got=got)
    if step_times_file and config.durations == "modelled":
        expected, got = "durations=table or live", "durations=modelled"
        raise no_effect("--step_times", step_times_file, expected=expected, got=got)
    asked = _asked(config, step_times_file)
    before = SavedRun(out)
    if (table := before.table_of(asked)) is not None:
        to_stderr(f"{out}: this run has ended; nothing is run")
        return table
    before.expect_resumable()
    host_devices.provide(most_devices(config))
    check_modelled(config)
    given = _read_step_times(step_times_file) if step_times_file else None
    model = load_model(config)
    source = RequestSource.load(config, model)
    for system in config.systems.values():
        source.check(
            instance_memory(config, Deployment.parse(system.deployment), model.config)
        )
    engines = build_engines(config, model)
    if given is not None:
        for engine in engines.values():
            check_step_times(engine, given.seconds, streams=config.streams)
    if source.trace is not None:
        asked["trace"] = source.trace  # a resumed run must find the same
    with sole_use(out):
        run_dir = RunDir(out, asked)
        return _run(config, run_dir, model, source, engines, given, workers, deadline)


def _run(
    config: Config,
    run_dir: RunDir,
    model: Model,
    source: RequestSource,
    engines: Mapping[str, Engine],
    given: StepTimes | None,
    workers: Workers | None,
    deadline: Deadline,
) -> str:
    progress = ProgressLines()
    if found := _found(config, run_dir):
        progress(found)

    @functools.cache
    def compile_system(name: str) -> None:
        compile_engines({name: engines[name]}, progress)

    step = progress.step
    times = _step_times(config, run_dir, engines, given, compile_system, step)
    with open_workers(workers if _may_leave(config) else 1) as mapper:
        sweeps = [
            Sweep(
                config=config,
                model=model,
                source=source,
                served=target.served,
                timed=target.timed,
                durations=target.durations,
                slo=target.slo,
                choices=target.choices,
                criteria=target.criteria,
                too_slow_s=target.too_slow_s,
                run_dir=run_dir,
                progress=progress,
                compile_system=compile_system,
                step=step,
                out_of_time=deadline.passed,
                target=target.name,
                mapper=mapper,
            )
            for target in resolve_targets(config, engines, times.seconds, source)
        ]
        found, missing = _search(sweeps)
        if not found:
            return _nothing(run_dir)
        timing = _timing(times)
        settled: dict[str, Any] = {}
        if _has_halves(config, times, sweeps):
            if deadline.passed():
                missing.append("whether the timings settle who is ahead")
            else:
                settled = _settled(config, engines, times, sweeps, mapper, step)
        hardware = _saved_hardware(run_dir)
        if hardware is None and config.has_hardware_table:
            if not deadline.passed():
                seconds = step_durations(config, engines, times.seconds)
                requests, stop = source(1.0), deadline.passed
                hardware = hardware_table(config, seconds, requests, mapper, step, stop)
            if hardware is None:
                missing.append("the systems on other hardware")
    for name, summary in found.items():
        summary |= {"step_times": timing, "settled": settled.get(name)}
    run_dir.write_requests(point for sweep in sweeps for point in sweep.points())
    summary = found[""] if "" in found else {"targets": found}
    if hardware is not None:
        summary |= {"hardware_table": hardware}
    if missing:
        summary |= {"missing": missing}
    run_dir.write_json("summary.json", summary)
    device = jax.devices()[0].device_kind
    report.plot(summary, device, run_dir.path / "attainment.png")
    text = report.table(summary)
    write_text(run_dir.path / "table.txt", text + "\n")
    return text


def _search(sweeps: Sequence[Sweep]) -> tuple[dict[str, Any], list[str]]:
    """Return the summary of each target, and what there was no time for."""
    found: dict[str, Any] = {}
    for sweep in sweeps:
        with contextlib.suppress(OutOfTime):
            found[sweep.target] = sweep.run()
    return found, [said for sweep in sweeps for said in sweep.missing]


def _saved_hardware(run_dir: RunDir) -> dict[str, Any] | None:
    """Return the second table of a run that is resumed, if it was made."""
    return (run_dir.read_json("summary.json") or {}).get("hardware_table")


def _nothing(run_dir: RunDir) -> str:
    return (
        f"--minutes are spent before any system was looked at: {len(run_dir.points())} "
        "points are kept, and the same command goes on from them"
    )


def _asked(config: Config, step_times_file: str | None) -> dict[str, Any]:
    """Return what decides the result of a run, as far as it is known before any work.

    A trace is told by its bytes, so that it need not be read, nor a model for it. The
    file of a link may change, so what it says is kept.
    """
    asked = {**plain(config), "step_times_file": step_times_file}
    trace = pathlib.Path(config.workload.trace)
    if config.workload.source == "trace" and trace.is_file():
        with trace.open("rb") as file:
            asked["trace_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if config.link.endswith(".json"):
        asked["link_figures"] = plain(get_link(config.link))
    return asked


def _found(config: Config, run_dir: RunDir) -> str:
    """Say how many points of a run that is resumed are done; "" without any."""
    found = len(run_dir.points())
    if not found:
        return ""
    if not config.rates:
        return f"{found} points found; the search goes on from them"
    rates, targets = len(config.rates), len(config.targets)
    total = targets * len(config.systems) * rates * config.num_seeds
    most = "at most " if len(config.looks) > 1 else ""
    return f"{found} of {most}{total} points found"


def _may_leave(config: Config) -> bool:
    """Return whether runs need no engine, so that other processes can make them."""
    return config.executed != "all" and config.durations == "table"


def _has_halves(config: Config, times: StepTimes, sweeps: Sequence[Sweep]) -> bool:
    """Return whether halves of the timings can be searched by.

    They cannot where rates are given, or programs run everywhere.
    """
    searched = not config.rates and config.executed == "passing"
    return searched and times.halves is not None and sweeps[0].good.target is not None


def _settled(
    config: Config,
    engines: Mapping[str, Engine],
    times: StepTimes,
    sweeps: Sequence[Sweep],
    mapper: Mapper,
    step: Progress,
) -> dict[str, dict[str, Any]]:
    """Return whether two halves of the timings have the same winner, by target."""
    assert times.halves is not None
    halves: dict[str, list[dict[str, float]]] = {sweep.target: [] for sweep in sweeps}
    part, done = "searches by halves of the rounds of timing", 0
    total = len(times.halves) * len(sweeps) * len(engines)
    step(part, done, total, "")
    for half in times.halves:
        targets = resolve_targets(config, engines, half.seconds, sweeps[0].source)
        for sweep, target in zip(sweeps, targets, strict=True):
            begin = {name: sweep.goodput_rps(name) for name in target.timed}
            found: dict[str, float] = {}
            for name, rps in goodputs(config, target, sweep.source, begin, mapper):
                found[name], done = rps, done + 1
                step(part, done, total, "")
            halves[target.name].append(found)
    return {name: verdict(found) for name, found in halves.items()}


def _timing(times: StepTimes) -> dict[str, Any] | None:
    """Return how the step times were taken; None where there are none."""
    if not times.rounds:
        return None
    return {
        "rounds": min(map(len, times.rounds.values())),
        "unsteady_share": times.unsteady,
        "steady": times.is_steady,
    }


def _step_times(
    config: Config,
    run_dir: RunDir,
    engines: Mapping[str, Engine],
    given: StepTimes | None,
    compile_system: Callable[[str], None],
    step: Progress,
) -> StepTimes:
    """Return the times to use: given, of the run that is resumed, or taken now.

    They are empty if durations are modelled. Only to take them, programs are compiled.
    """
    if config.durations == "modelled":
        return StepTimes(rounds={})
    saved = run_dir.read_json("step_times.json")
    if saved is not None:
        return _parse_step_times(saved)
    if given is not None:
        times, measured = given, None
    else:
        for name in engines:
            compile_system(name)
        times = measure_step_times(
            list(engines.values()),
            config.timing_repeats,
            step,
            streams=config.streams,
        )
        measured = environment()
    content = {"seconds": times.seconds, "rounds": times.rounds, "measured": measured}
    run_dir.write_json("step_times.json", STEP_TIMES.write(content))
    return times


def _parse_step_times(record: Mapping[str, Any]) -> StepTimes:
    """Return the times in a `step_times.json`; one made by hand may have medians."""
    content = STEP_TIMES.read(record)
    if "rounds" in content:
        rounds = {key: [*map(float, each)] for key, each in content["rounds"].items()}
    else:
        rounds = {key: [float(time_s)] for key, time_s in content["seconds"].items()}
    return StepTimes(rounds=rounds)


def _read_step_times(path: str) -> StepTimes:
    try:
        return _parse_step_times(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--step_times: expected the step_times.json of a run, got '{path}': "
            f"{error!r}"
        ) from error


def _read_placement(path: str) -> dict[str, Any]:
    try:
        return PLACEMENT.read(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--placement: expected the placement.json of a search, got '{path}': "
            f"{error}"
        ) from error


def _unused_options() -> dict[str, tuple[Need, ...]]:
    """Return options of a config that a flag leaves without effect."""
    if not (path := _STEP_TIMES.value):
        return {}
    need = Need("no --step_times", lambda _: False, lambda _: f"--step_times={path}")
    return {"timing_repeats": (need,)}


@command(FLAGS)
def main() -> None:
    host_devices.one_thread_each()
    changes = list(_SET.value)
    for flag in (_SEED, _STEP_TOKENS):
        expect_once(flag, flag.name, changes)
    if _SEED.value is not None:
        changes.append(f"seed={_SEED.value}")
    if _STEP_TOKENS.value:
        changes.append(f"step_tokens={','.join(_STEP_TOKENS.value)}")
    base = get_config(_CONFIG.value)
    if _SYSTEMS.value is not None:
        base = base.with_systems(_SYSTEMS.value)
    config = override(base, changes, _unused_options())
    if _PLACEMENT.value:
        config = config.with_placements(_read_placement(_PLACEMENT.value))
    config = config.by_step_tokens()
    out = pathlib.Path(_OUT.value or f"runs/{_CONFIG.value}")
    deadline = _MINUTES.start()
    print(run(config, out, _STEP_TIMES.value, _WORKERS.value, deadline))
    print(f"\nrun directory: {out}")


if __name__ == "__main__":
    main()
