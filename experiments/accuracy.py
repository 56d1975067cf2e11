"""How far the simulator is from the engine: DistServe's Table 2, for us.

    python -m experiments.calibrate --out=runs/profile.json
    python -m experiments.accuracy --profile=runs/profile.json

Every system serves the same requests on the engine, with live durations, and in the
simulator, with those of a profile that was taken before, in another process. A
shared machine does not keep its speed; so probes run between the engine's steps, and
the simulator's machine is slower by as much as those were in that run than when the
profile was taken ("slower", of decodes and of steps with prompts). "as profiled" is the
difference without that. Probes say nothing of what the profile is wrong about.

At each rate: attainment on both sides, and the errors of the percentiles. Attainment
may differ by 2 points, or by what it changes over 2 % of the rate. Of a difference,
"durations" is what goes if the simulator is given the durations that the engine had in
that run, in place of the profile's; what stays is "scheduling". "alike" are the
decisions of the two runs that are equal.

Below, every step that ran on the engine against its prediction; programs alone, before
and after all runs, against the profile, which is how far the machine has moved; and
the engine against itself on the same requests, which is how far live durations repeat.

Writes accuracy.txt, accuracy.json and accuracy.png. A killed run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_jax.calibration.machine_speed import choose_probes
from disagg_jax.calibration.measure import grid, measure, typical_s
from disagg_jax.calibration.profile_keys import read_profile, step_times_of
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import run_alone
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_to_json
from experiments.accuracy_study import report
from experiments.accuracy_study.paired_runs import Twin
from experiments.accuracy_study.report import Result
from experiments.cli import host_devices
from experiments.cli.command import command, progress_to_stderr
from experiments.cli.flags import REQUIRED, Flags, expect_once
from experiments.configs.config import Config, override, to_json
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import read_by
from experiments.runs.folder import sole_use, write_json, write_text
from experiments.runs.run_dir import RunDir
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    Progress,
    Server,
    check_modelled,
    devices_needed,
    resolve_slo,
)
from experiments.sweep.weights import load_model
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
_OUT = FLAGS.string("out", "runs/accuracy", "Folder.")

# Durations are live, rates are --factors, and step sizes are those of the papers.
_UNREAD = read_by(
    "experiments.goodput_sweep",
    not_by="experiments.accuracy",
    keys=(
        *("durations", "cost", "timing_repeats", "execute_all", "criterion"),
        *("rates", "search.growth", "search.tolerance", "search.max_rates"),
        *("step_tokens", "tune"),
    ),
)


def run(
    config: Config, profile_path: str, factors: Sequence[float], out: pathlib.Path
) -> Result:
    """Serves and simulates all points.

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
    host_devices.provide(devices_needed(config))
    check_modelled(config)
    model = load_model(config)
    profile = read_profile(profile_path, model.config)
    record = {**to_json(config), "profile": profile_to_json(profile)}
    with sole_use(out):
        run_dir = RunDir(out, {**record, "factors": list(factors)})
        return _run(config, model, profile, factors, run_dir)


def _run(
    config: Config,
    model: Model,
    profile: CalibratedProfile,
    factors: Sequence[float],
    run_dir: RunDir,
) -> Result:
    out = run_dir.path
    progress = progress_to_stderr()
    twins = _twins(config, model, profile, run_dir, progress)
    before = _once(out / "moved_before.json", lambda: _moved(twins, profile))
    target = config.search.target
    rates = {
        twin.name: [_round(twin.knee_rps(target) * f) for f in sorted(factors)]
        for twin in twins
    }
    _serve_all(twins, rates, progress)
    after = _once(out / "moved_after.json", lambda: _moved(twins, profile))
    return report.compare(
        twins, rates, target=target, profile=profile, moved=(before, after)
    )


def _twins(
    config: Config,
    model: Model,
    profile: CalibratedProfile,
    run_dir: RunDir,
    progress: Progress,
) -> list[Twin]:
    source = RequestSource.load(config, model)
    if why := source.why_dependent:
        raise ValueError(f"requests: expected independent runs, got {why}")
    shared: dict[Any, PlacedModel] = {}
    servers = {
        name: Server(config, system, model, shared)
        for name, system in config.systems.items()
    }
    first = next(iter(servers.values()))
    for server in servers.values():
        source.check(server.memory)
        server.prepare(progress)
    times = [step_times_of(profile, server.engine) for server in servers.values()]
    known = {key: time_s for found in times for key, time_s in found.items()}
    slo = resolve_slo(config, first, source, known)
    for server in servers.values():
        server.tune(slo, source, known)
    live = config.durations == "live" and config.clock == "virtual"
    return [
        Twin.of(
            name,
            server,
            source,
            slo,
            profile,
            run_dir,
            # Pools of their own, or the probes would write into the requests' blocks.
            choose_probes([_engine(config, name, model, shared)]) if live else {},
        )
        for name, server in servers.items()
    ]


def _engine(
    config: Config, name: str, model: Model, shared: dict[Any, PlacedModel]
) -> Engine:
    """Another one of a system, with the same programs."""
    return Server(config, config.systems[name], model, shared).engine


def _serve_all(
    twins: Sequence[Twin], rates: Mapping[str, Sequence[float]], progress: Progress
) -> None:
    """Every point, and one of each system once more."""
    points = [
        (twin, point)
        for twin in twins
        for point in [
            *(point for rate in rates[twin.name] for point in twin.points(rate)),
            twin.again(rates[twin.name]),
        ]
    ]
    for i, (twin, point) in enumerate(points, 1):
        progress(f"{point.name} ({i} of {len(points)})")
        twin.serve(point)


def _once(path: pathlib.Path, measure_ratio: Callable[[], float]) -> float:
    """What was measured when the runs were made, also if they go on later."""
    if not path.exists():
        write_json(path, measure_ratio())
    return float(json.loads(path.read_text()))


def _moved(twins: Sequence[Twin], profile: CalibratedProfile) -> float:
    """How long programs take alone now, over the profile; the median of all."""
    engines = [twin.server.engine for twin in twins]
    probes = grid(engines)
    parts = measure(probes, 3, lambda e, w: run_alone(e, w)[0], lambda _: None)
    ratios: list[float] = []
    for key, (engine, work) in probes.items():
        known = step_times_of(profile, engine)
        predicted_s = sum(known[part] for part in engine.part_keys(work))
        measured_s = sum(typical_s(parts[key]))
        ratios.append(measured_s / predicted_s)
    return statistics.median(ratios)


def _round(rate_rps: float) -> float:
    return float(f"{rate_rps:.4g}")


@command(FLAGS)
def main() -> None:
    host_devices.one_thread_each()
    given = [
        f"workload.num_requests={_REQUESTS.value}",
        f"num_seeds={_SEEDS.value}",
    ]
    expect_once(_REQUESTS, "workload.num_requests", _SET.value)
    expect_once(_SEEDS, "num_seeds", _SET.value)
    config = override(get_config(_CONFIG.value), given)
    config = override(config, _SET.value, _UNREAD)
    config = dataclasses.replace(config, durations="live")
    factors, out = (
        [float(text) for text in _FACTORS.value],
        pathlib.Path(_OUT.value),
    )
    result = run(config, _PROFILE.value, factors, out)
    text = report.text(result)
    write_text(out / "accuracy.txt", text + "\n")
    write_json(out / "accuracy.json", report.to_json(result))
    report.plot(result, out / "accuracy.png")
    print(f"{text}\n\n{out}/accuracy.png")


if __name__ == "__main__":
    main()
