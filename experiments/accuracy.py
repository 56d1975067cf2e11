"""How far the simulator is from the engine: DistServe's Table 2, for us.

    python -m experiments.calibrate --out=runs/profile.json
    python -m experiments.accuracy --profile=runs/profile.json

Every system serves the same requests on the engine, with live durations, and in the
simulator, with the durations of a profile that was taken before, in another process. A
shared machine does not keep its speed, so probes run between the engine's steps, and
the simulated machine is slower by the probes' times in that run over their times in the
calibration ("slower", of decodes and of steps with prompts). "as profiled" is the
difference without that. Probes do not show where the profile is wrong, and they run
only if they ran in the calibration.

At each rate: attainment on both sides, and the errors of the percentiles. Attainment
may differ by 2 points, or by its change over 2 % of the rate. The part of a difference
that goes away with the durations of the engine's run in place of the profile's is
"durations"; the rest is "scheduling". "alike" is the share of equal decisions.

Below: every step of the engine's runs against its prediction; programs alone, before
and after all runs, against the profile, which shows how far the machine has moved; and
the engine against itself on the same requests, which shows how far live durations
repeat.

The engine serves all systems at the rates nearest to their goodputs first. With
--minutes it begins no more points after that time, and reports the rates at which all
seeds of a system are done.

Writes accuracy.txt, accuracy.json and accuracy.png. A run that was killed, or whose
time was spent, goes on where it was by the same command.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from disagg_jax.calibration.machine_speed import choose_probes
from disagg_jax.calibration.profile_keys import StepKey, read_profile
from disagg_jax.calibration.step_times import step_times_of
from disagg_jax.calibration.timing import grid, measure, time_alone, typical_s
from disagg_jax.engine.attention.registry import choose_kernel
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_to_json
from experiments.accuracy_study import report
from experiments.accuracy_study.paired_runs import PairedRun
from experiments.accuracy_study.report import Result
from experiments.cli import host_devices
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags, expect_once
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.configs.config import Config
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import read_by
from experiments.configs.override import override
from experiments.runs.folder import plain, sole_use, write_json, write_text
from experiments.runs.run_dir import RunDir
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    Progress,
    build_engine,
    build_engines,
    check_modelled,
    compile_engines,
    load_model,
    most_devices,
    resolve_slo,
    serve_with,
    step_durations,
    tune_systems,
)
from models.load import Model

FLAGS = Flags()
_PROFILE = FLAGS.string("profile", REQUIRED, "What experiments.calibrate wrote.")
_CONFIG = FLAGS.string(
    "config", "tiny", f"Systems and workload: {', '.join(sorted(CONFIGS))}."
)
_SET = FLAGS.multi_string("set", [], "Overrides of the config, key=value.")
_REQUESTS = FLAGS.integer("requests", 1000, "Of each run.", lower_bound=10)
_SEEDS = FLAGS.integer("seeds", 3, "Runs of a point.")
_FACTORS = FLAGS.list(
    "factors",
    ["0.6", "0.8", "0.9", "0.97", "1.03", "1.1", "1.25"],
    "Rates, over the simulated goodput of each system.",
)
_MINUTES = MinutesFlag(FLAGS, "points")
_OUT = FLAGS.string("out", "runs/accuracy", "Folder.")

# Durations are live, rates are --factors, and step sizes are those of the papers.
_UNREAD = read_by(
    "experiments.goodput_sweep",
    not_by="experiments.accuracy",
    keys=(
        *("durations", "cost", "timing_repeats", "execute_all", "criterion"),
        *("rates", "search.growth", "search.tolerance", "search.max_rates"),
        *("step_tokens", "tune"),
        *("first_seeds", "relaxed", "executed_requests"),
    ),
)


def run(
    config: Config,
    profile_path: str,
    factors: Sequence[float],
    out: pathlib.Path,
    deadline: Deadline = ENDLESS,
) -> Result | None:
    """Serve and simulate all points.

    Args:
      deadline: after which no point is begun. The result is then of the rates that are
        done, and None if none is.

    Raises:
      ValueError, FileNotFoundError: on bad input, before any work.
    """
    if not config.workload.ignore_eos:
        raise ValueError(
            "workload.ignore_eos: expected true, for the simulator to know lengths"
        )
    if config.streams or config.link:
        raise ValueError(
            "streams and link: expected none, as the simulator's transfers are those "
            f"of the profile, got streams={config.streams} and link={config.link}"
        )
    if len(factors) < 2 or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"factors: expected two or more > 0, got {list(factors)}")
    host_devices.provide(most_devices(config))
    check_modelled(config)
    model = load_model(config)
    chosen = choose_kernel(config.attention, jax.devices()[0], model.config)
    profile = read_profile(profile_path, model.config, chosen.kernel.name)
    record = {**plain(config), "profile": profile_to_json(profile)}
    with sole_use(out):
        run_dir = RunDir(out, {**record, "factors": list(factors)})
        return _run(config, model, profile, sorted(factors), run_dir, deadline)


def _run(
    config: Config,
    model: Model,
    profile: CalibratedProfile,
    factors: Sequence[float],
    run_dir: RunDir,
    deadline: Deadline,
) -> Result | None:
    out = run_dir.path
    progress = ProgressLines()
    pairs = _pairs(config, model, profile, run_dir, progress)
    before = _once(out / "moved_before.json", lambda: _moved(pairs, profile))
    target = config.search.target
    knees = {pair.name: pair.knee_rps(target) for pair in pairs}
    rates = {
        name: [float(f"{knee_rps * factor:.4g}") for factor in factors]
        for name, knee_rps in knees.items()
    }
    # The nearest to the goodput first, on a logarithmic scale.
    order = sorted(range(len(factors)), key=lambda i: abs(math.log(factors[i])))
    missing = _serve_all(pairs, rates, order, progress, deadline)
    after = None
    if not missing:
        after = _once(out / "moved_after.json", lambda: _moved(pairs, profile))
    done = {pair.name: pair.done(rates[pair.name]) for pair in pairs}
    if not any(done.values()):
        return None
    return report.compare(
        [pair for pair in pairs if done[pair.name]],
        done,
        target=target,
        profile=profile,
        moved=(before, after),
        config=config,
        missing=missing,
    )


def _pairs(
    config: Config,
    model: Model,
    profile: CalibratedProfile,
    run_dir: RunDir,
    progress: Progress,
) -> list[PairedRun]:
    source = RequestSource.load(config, model)
    if why := source.why_dependent:
        raise ValueError(f"requests: expected independent runs, got {why}")
    shared: dict[Any, PlacedModel] = {}
    engines = build_engines(config, model, shared)
    for engine in engines.values():
        source.check(engine.memory)
    compile_engines(engines, progress)
    times = [step_times_of(profile, engine) for engine in engines.values()]
    known = {key: time_s for found in times for key, time_s in found.items()}
    durations = step_durations(config, engines, known)
    slo = resolve_slo(config, next(iter(durations.values())), source)
    tuned = tune_systems(config, durations, slo, source)
    live = config.durations == "live" and config.clock == "virtual"
    return [
        PairedRun(
            name=name,
            server=serve_with(config, engine, tuned[name][0], known),
            source=source,
            slo=slo,
            seeds=config.seeds,
            profile=profile,
            run_dir=run_dir,
            # On an engine with pools of its own: probes write into the blocks.
            probes=choose_probes(
                [build_engine(config, config.systems[name], model, shared)]
            )
            if live and profile.probes
            else {},
        )
        for name, engine in engines.items()
    ]


def _serve_all(
    pairs: Sequence[PairedRun],
    rates: Mapping[str, Sequence[float]],
    order: Sequence[int],
    progress: ProgressLines,
    deadline: Deadline,
) -> int:
    """Run the engine at every point, and once more at one point of each system.

    Systems take turns, so that each has as many rates if the time is spent.

    Args:
      order: of the rates: their places in the lists.

    Returns:
      How many points there was no time for.
    """
    points = [
        *(
            (pair, point)
            for i in order
            for pair in pairs
            for point in pair.points(rates[pair.name][i])
        ),
        *((pair, pair.again(rates[pair.name])) for pair in pairs),
    ]
    missing = [(pair, point) for pair, point in points if not pair.has(point)]
    if found := len(points) - len(missing):
        progress(f"{found} of {len(points)} points found")
    for i, (pair, point) in enumerate(missing):
        if deadline.passed():
            return len(missing) - i
        progress.step("points", i, len(missing), f"now {point.name}")
        pair.serve(point)
    progress.step("points", len(missing), len(missing))
    return 0


def _once(path: pathlib.Path, measure_ratio: Callable[[], float]) -> float:
    """Return the ratio in a file, or measure and write it; runs may go on later."""
    if not path.exists():
        write_json(path, measure_ratio())
    return float(json.loads(path.read_text()))


def _moved(pairs: Sequence[PairedRun], profile: CalibratedProfile) -> float:
    """Return the median time of programs alone now, over the profile's."""
    works = grid(pair.server.engine for pair in pairs)
    measured = measure(works, 3, time_alone)
    ratios: list[float] = []
    for key, turns in measured.items():
        if isinstance(key, StepKey):
            profiled_s = sum(profile.layouts[key.layout].stages_s(key.program))
        else:
            profiled_s = profile.transfers[key.src, key.dst].time_s(key.blocks)
        ratios.append(sum(typical_s(turns)) / profiled_s)
    return statistics.median(ratios)


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    host_devices.one_thread_each()
    given = [f"workload.num_requests={_REQUESTS.value}", f"num_seeds={_SEEDS.value}"]
    expect_once(_REQUESTS, "workload.num_requests", _SET.value)
    expect_once(_SEEDS, "num_seeds", _SET.value)
    config = override(get_config(_CONFIG.value), given)
    config = override(config, _SET.value, _UNREAD)
    config = dataclasses.replace(config, durations="live")
    factors = [float(text) for text in _FACTORS.value]
    out = pathlib.Path(_OUT.value)
    result = run(config, _PROFILE.value, factors, out, deadline)
    if result is None:
        print(
            "--minutes are spent before all seeds of a rate were done; the points that "
            "are done are kept, and the same command goes on from them"
        )
        return
    text = report.text(result)
    write_text(out / "accuracy.txt", text + "\n")
    write_json(out / "accuracy.json", report.to_json(result))
    report.plot(result, out / "accuracy.png")
    print(f"{text}\n\n{out}/accuracy.png")


if __name__ == "__main__":
    main()
