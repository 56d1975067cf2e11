"""Measures the engine's steps and KV transfers, and fits a cost model to them.

    python -m experiments.calibrate
    python -m experiments.calibrate --model=smollm2-135m --out=runs/smollm2.json
    python -m experiments.calibrate --show=experiments/profiles/m32_cpu.json
    python -m experiments.calibrate --model=llama-3-8b --deployment=colocated:tp1 \\
        --deployment=prefill:tp1,decode:tp1 --set memory.blocks_per_device=2048

The grid is every program that the systems of a config compile: prefills, chunks beside
decodes, and decodes, by tokens, rows and context; and every size of a transfer between
two meshes. The simulator takes the measured median of a program, and the fit where a
program was not measured (`experiments.accuracy`, `sim/cost/measured.py`).

Two errors are printed, and are in the profile. Held out: random loads, on no grid, that
were timed in the same rounds, against what the simulator predicts for them; with the
aim. Left out: every fifth program in turn, against a fit of the others; by the form
that the simulator uses (terms), and by DistServe's and a roofline's
(`disagg_jax/calibration/fit.py`).

A few programs also run now and then between the others: probes, by which a later run
can tell how much slower the machine has become
(`disagg_jax/calibration/machine_speed.py`).

Programs run alone. At the end each system serves `--requests` of the config's lengths:
what the steps of a kind take there, over what they take alone, is printed as in
service, and the simulator counts with it
(`experiments/accuracy_study/serving_factor.py`).

With tp > 1 on host devices that would be contention, not speed.
Takes 2 to 4 minutes for the systems of `tiny` on 2 cores.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from disagg_jax.calibration.machine_speed import Speedometer, choose_probes
from disagg_jax.calibration.measure import (
    Progress,
    drift,
    fit_profile,
    grid,
    left_out_errors,
    measure,
    prediction_errors,
    unseen,
)
from disagg_jax.calibration.profile_keys import TimeParts, device_name
from disagg_jax.deployment import Deployment
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import run_alone
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_from_json, profile_to_json
from disagg_jax.work import Task
from experiments.accuracy_study.serving_factor import serve_each, with_service
from experiments.cli import host_devices
from experiments.cli.command import command, command_line, progress_to_stderr
from experiments.cli.flags import Flags, expect_once, expect_used
from experiments.configs.config import Config, override
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import read_by
from experiments.report.table import align
from experiments.runs.folder import sole_use, write_json
from experiments.runs.run_dir import environment
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import Server, check_modelled, devices_needed
from experiments.sweep.weights import load_model
from models.config import ModelConfig

# Mean relative errors for work that was not used (issue 6; facts/latency.md).
AIMS = {"prefill": 0.05, "decode": 0.03, "mixed": 0.07, "chunk": 0.07}

FLAGS = Flags()
_CONFIG = FLAGS.string("config", "tiny", f"Its systems: {', '.join(sorted(CONFIGS))}.")
_MODEL = FLAGS.string("model", None, "Instead of the config's, with random weights.")
_DEPLOYMENT = FLAGS.multi_string(
    "deployment", [], "Instead of the config's, for the systems with its roles."
)
_SET = FLAGS.multi_string("set", [], "Overrides of the config, key=value.")
_ROUNDS = FLAGS.integer("rounds", 9, "Rounds behind a median.", lower_bound=3)
_UNSEEN = FLAGS.integer(
    "unseen", 12, "Random loads of each kind and instance.", lower_bound=1
)
_REQUESTS = FLAGS.integer(
    "requests", 150, "That each system serves at the end.", lower_bound=10
)
_MAX_DRIFT = FLAGS.float(
    "max_drift", 0.3, "How much slower the device may become while it is measured."
)
_SHOW = FLAGS.string("show", None, "Only print the errors of this profile.")
_OUT = FLAGS.string("out", None, "The profile; default experiments/profiles/NAME.json.")

# Programs are timed live, at the step sizes that the policies have.
_UNREAD = read_by(
    "experiments.goodput_sweep",
    not_by="experiments.calibrate",
    keys=(
        *("clock", "durations", "cost", "timing_repeats", "execute_all", "criterion"),
        *("rates", "search", "slo", "num_seeds", "step_tokens", "tune"),
    ),
)


def on_deployments(config: Config, deployments: Sequence[str]) -> Config:
    """`config` with its systems on other deployments, where these have their roles.

    Raises:
      ValueError: if no system has the roles of one of them.
    """
    systems = {}
    for text in deployments:
        roles = {spec.role for spec in Deployment.parse(text).instances}
        fitting = {
            f"{name}@{text}": dataclasses.replace(system, deployment=text)
            for name, system in config.systems.items()
            if roles == set(system.policies)
        }
        if not fitting:
            raise ValueError(
                f"--deployment: expected the roles of one of "
                f"{', '.join(config.systems)}, got '{text}'"
            )
        systems |= fitting
    return dataclasses.replace(config, systems=systems) if systems else config


def calibrate(
    engines: Sequence[Engine],
    time_parts: TimeParts,
    *,
    name: str,
    provenance: dict[str, str],
    rounds: int,
    count: int,
    max_drift: float,
    progress: Progress,
) -> CalibratedProfile:
    """Measures and fits.

    Args:
      time_parts: runs work alone; see `run_alone`.
      count: random loads of each kind and instance that are held out.

    Raises:
      ValueError: if the device changed while it was measured.
    """
    model, memory = engines[0].config, engines[0].instances[0].model.memory
    speedometer = Speedometer(choose_probes(engines), time_parts)

    def watched(engine: Engine, work: Task) -> Sequence[float]:
        speedometer.tick()
        return time_parts(engine, work)

    known, others = grid(engines), unseen(engines, count, seed=0)
    # In the same rounds, or what the device does meanwhile would be held against the
    # predictions.
    everything = {**known, **dict(enumerate(others))}
    found = measure(everything, rounds, watched, progress)
    changed = drift(found.values())
    if abs(changed - 1) > max_drift:
        raise ValueError(
            "the device changed while it was measured: expected at most "
            f"{max_drift:.0%} between the first and the last rounds, got "
            f"{changed - 1:+.0%}; run it again, or raise --max_drift"
        )
    profile = fit_profile(
        {key: found[key] for key in known},
        name=name,
        block_tokens=memory.block_tokens,
        block_bytes=model.kv_bytes_per_token * memory.block_tokens,
        provenance={**provenance, "drift": f"{changed - 1:+.1%}"},
        probes=speedometer.medians_s(),
    )
    errors = prediction_errors(profile, others, [found[i] for i in range(len(others))])
    held_out = {kind: statistics.fmean(map(abs, e)) for kind, e in errors.items()}
    return dataclasses.replace(profile, held_out=held_out)


def provenance_of(model: ModelConfig, config: Config, rounds: int) -> dict[str, str]:
    """What a profile is of, and how it was made."""
    now = environment()
    return {
        "model": model.name,
        "dtype": model.dtype,
        "device": device_name(),
        "devices": f"{len(now['devices'])} x {now['backend']}, {now['cpus']} cores",
        "date": now["date"],
        "commit": now["commit"] or "none",
        "jax": now["packages"]["jax"],
        "python": now["python"],
        "command": command_line(),
        "load_average": " ".join(f"{load:.2f}" for load in now["load_average"]),
        "systems": "; ".join(
            f"{name} on {system.deployment}" for name, system in config.systems.items()
        ),
        "memory": f"{config.memory}",
        "method": f"medians of {rounds} rounds, each program alone; in service: "
        f"{config.workload.num_requests} requests of each system, prompts "
        f"{config.workload.prompt_tokens}, outputs {config.workload.output_tokens}",
    }


def table(profile: CalibratedProfile) -> str:
    """Return the errors by kind, beside the aim."""
    left_out = left_out_errors(profile)
    rows = [("kind", "held out", "aim", "", "left out: terms")]
    for kind, error in sorted(profile.held_out.items()):
        aim, left = AIMS.get(kind), left_out.get(kind)
        rows.append(
            (
                kind,
                f"{error:.1%}",
                f"<= {aim:.0%}" if aim else "",
                "" if aim is None else "ok" if error <= aim else "MISSED",
                f"{left:.1%}" if left is not None else "",
            )
        )
    return "\n".join(align(rows, right=(1, 4)))


def service_table(profile: CalibratedProfile) -> str:
    """What steps take in serving over what they take alone, by layout and kind."""
    rows = [("layout", "kind", "in service")]
    for (tp, pp), times in sorted(profile.layouts.items()):
        for kind, factor in sorted(times.in_service.items()):
            rows.append((f"tp{tp}pp{pp}", kind, f"{factor - 1:+.1%}"))
    return "\n".join(align(rows, right=(2,)))


def run(config: Config, rounds: int, count: int, max_drift: float) -> CalibratedProfile:
    """Builds the engines of all systems and measures them.

    Raises:
      ValueError, FileNotFoundError: on bad input or what does not fit, before any work.
    """
    progress = progress_to_stderr()
    host_devices.provide(devices_needed(config))
    # Its own runs may have modelled durations; here programs are timed anyway.
    config = dataclasses.replace(config, clock="virtual", durations="live")
    check_modelled(config)
    if config.streams:
        raise ValueError("streams: expected false: transfers are measured whole")
    model = load_model(config)
    source = RequestSource.load(config, model)
    shared: dict[Any, PlacedModel] = {}
    servers = [
        Server(config, system, model, shared) for system in config.systems.values()
    ]
    for server in servers:
        source.check(server.memory)
    for server in servers:
        server.prepare(progress)
    profile = calibrate(
        [server.engine for server in servers],
        lambda engine, work: run_alone(engine, work)[0],
        name=f"{model.config.name}-{device_name()}".replace(" ", "-").lower(),
        provenance=provenance_of(model.config, config, rounds),
        rounds=rounds,
        count=count,
        max_drift=max_drift,
        progress=progress,
    )
    progress(f"serving {config.workload.num_requests} requests on each system")
    return with_service(profile, serve_each(servers, source, profile))


def show(path: str) -> str:
    """The tables of a profile that is there.

    Raises:
      ValueError: if it is no profile.
    """
    try:
        profile = profile_from_json(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--show: expected a profile of this command, got '{path}': {error!r}"
        ) from error
    return f"{table(profile)}\n\n{service_table(profile)}"


@command(FLAGS)
def main() -> None:
    host_devices.one_thread_each()
    asked = (_CONFIG, _MODEL, _DEPLOYMENT, _SET, _ROUNDS, _UNSEEN, _REQUESTS)
    shown = f"--show={_SHOW.value}"
    expect_used(
        not _SHOW.value, *asked, _MAX_DRIFT, _OUT, expected="no --show", got=shown
    )
    if _SHOW.value:
        print(show(_SHOW.value))
        return
    config = get_config(_CONFIG.value)
    if _MODEL.value:
        config = dataclasses.replace(config, model=_MODEL.value, weights="random")
    given = [
        f"workload.num_requests={_REQUESTS.value}",
        "workload.ignore_eos=true",
        "num_seeds=1",
    ]
    expect_once(_MODEL, "model", _SET.value)
    expect_once(_REQUESTS, "workload.num_requests", _SET.value)
    config = override(on_deployments(config, _DEPLOYMENT.value), given)
    config = override(config, _SET.value, _UNREAD)
    file = pathlib.Path(_OUT.value) if _OUT.value else None
    if file is not None and file.is_dir():
        raise ValueError(f"--out: expected a file, got the folder '{file}'")
    folder = file.parent if file else pathlib.Path(__file__).parent / "profiles"
    with sole_use(folder):
        profile = run(config, _ROUNDS.value, _UNSEEN.value, _MAX_DRIFT.value)
        out = file or folder / f"{profile.name}.json"
        write_json(out, profile_to_json(profile))
    print(f"{table(profile)}\n\n{service_table(profile)}")
    print(f"\ndrift {profile.provenance['drift']}; {out}")


if __name__ == "__main__":
    main()
