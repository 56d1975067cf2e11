"""Measure the engine's steps and KV transfers, and fit a cost model to them.

    python -m experiments.calibrate
    python -m experiments.calibrate --model=smollm2-135m --out=runs/smollm2.json
    python -m experiments.calibrate --show=runs/smollm2.json
    python -m experiments.calibrate --model=llama-3-8b --deployment=colocated:tp1 \\
        --deployment=prefill:tp1,decode:tp1 --set memory.tokens_per_device=32768

The grid is every program that the systems of a config compile: prefills, chunks beside
decodes, and decodes, by tokens, rows and context; and every size of a transfer between
two meshes. The simulator takes the measured median of a program, and the fit where a
program was not measured (`experiments.accuracy`, `sim/cost/measured.py`).

Two errors are printed. Held out, which the profile keeps: random loads, on no grid,
that were timed in the same rounds, against the simulator's predictions; with the aim.
Left out: every fifth program in turn, against a fit of the others by the terms that the
simulator uses (`disagg_jax/sim/cost/step_time_terms.py`).

A few programs, the probes, also run now and then between the others; by them a later
run can tell how much slower the machine has become
(`disagg_jax/calibration/machine_speed.py`). An accelerator of its own needs none:
`--nospeed_probes`.

Programs run alone. At the end each system serves `--requests` of the config's lengths.
The time of the steps of a kind there, over the time of their programs alone, is printed
as in service, and the simulator multiplies by it
(`experiments/accuracy_study/serving_factor.py`).

With --minutes it begins nothing more after that time: the profile is of the rounds that
were taken, if they are 3 or more, and has the serving factors of the systems that
served. It says what it lacks.

With tp > 1 on host devices the times would be contention, not speed.
Takes 2 to 4 minutes for the systems of `tiny` on 2 cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

from disagg_jax.calibration.measure import calibrate, left_out_errors
from disagg_jax.calibration.profile_keys import device_name
from disagg_jax.deployment import Deployment
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_from_json, profile_to_json
from experiments.accuracy_study.serving_factor import serve_each, with_serving_factors
from experiments.cli import host_devices
from experiments.cli.command import command, command_line
from experiments.cli.flags import Flags, expect_once, expect_used
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.configs.config import Config
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import read_by
from experiments.configs.override import override
from experiments.report.table import align
from experiments.runs.folder import sole_use, write_json
from experiments.runs.run_dir import environment
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    build_engines,
    check_modelled,
    compile_engines,
    load_model,
    most_devices,
    serve_with,
)
from models.config import ModelConfig

# Mean relative errors for loads that the fit did not have.
AIMS = {"prefill": 0.05, "decode": 0.03, "mixed": 0.07, "chunk": 0.07}

FLAGS = Flags()
_CONFIG = FLAGS.string("config", "tiny", f"Its systems: {', '.join(sorted(CONFIGS))}.")
_MODEL = FLAGS.string(
    "model", None, f"Instead of the config's, with random weights. {ENGINE_MODEL}"
)
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
_SPEED_PROBES = FLAGS.boolean(
    "speed_probes", True, "Run probes, which tell a shared machine's speed."
)
_MINUTES = MinutesFlag(FLAGS, "rounds of timing and systems that serve")
_SHOW = FLAGS.string("show", None, "Only print the errors of this profile.")
_OUT = FLAGS.string("out", None, "The profile; default experiments/profiles/NAME.json.")

# Programs are timed live, at the step sizes that the policies have.
_UNREAD = read_by(
    "experiments.goodput_sweep",
    not_by="experiments.calibrate",
    keys=(
        *("clock", "durations", "cost", "timing_repeats", "execute_all", "criterion"),
        *("rates", "search", "slo", "num_seeds", "step_tokens", "tune"),
        *("first_seeds", "relaxed", "executed_requests"),
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


def provenance_of(model: ModelConfig, config: Config) -> dict[str, str]:
    """Return what a profile is of, and how it was made."""
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
        "method": "medians of rounds of timing, each program alone; in service: "
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
    """Return the serving factors by layout and kind."""
    rows = [("layout", "kind", "in service")]
    for layout, times in sorted(profile.layouts.items()):
        for kind, factor in sorted(times.serving_factor.items()):
            rows.append((str(layout), kind, f"{factor - 1:+.1%}"))
    return "\n".join(align(rows, right=(2,)))


def run(
    config: Config,
    rounds: int,
    count: int,
    max_drift: float,
    speed_probes: bool = True,
    deadline: Deadline = ENDLESS,
) -> CalibratedProfile:
    """Build the engines of all systems and measure them.

    Args:
      deadline: after which nothing more is begun; the profile's provenance says what is
        `left out`.

    Raises:
      ValueError, FileNotFoundError: on bad input or too little memory, before any work.
      ValueError: if the time did not suffice for a fit.
    """
    progress = ProgressLines()
    host_devices.provide(most_devices(config))
    # Its own runs may have modelled durations; here programs are timed anyway.
    config = dataclasses.replace(config, clock="virtual", durations="live")
    check_modelled(config)
    if config.streams:
        raise ValueError("streams: expected false: transfers are measured whole")
    model = load_model(config)
    source = RequestSource.load(config, model)
    engines = build_engines(config, model)
    for engine in engines.values():
        source.check(engine.memory)
    compile_engines(engines, progress)
    profile = calibrate(
        list(engines.values()),
        name=f"{model.config.name}-{device_name()}".replace(" ", "-").lower(),
        provenance={
            **provenance_of(model.config, config),
            "attention": next(iter(engines.values())).programs.attention.kernel.name,
        },
        rounds=rounds,
        count=count,
        max_drift=max_drift,
        progress=progress.step,
        speed_probes=speed_probes,
        stop=deadline.passed,
    )
    servers = {
        name: serve_with(config, engine, config.systems[name].policies, {})
        for name, engine in engines.items()
    }
    asked = (list(servers.values()), source, profile)
    served = list(serve_each(*asked, progress.step, deadline.passed))
    profile = with_serving_factors(profile, itertools.chain(*served))
    missing = [f"{name} in service" for name in list(servers)[len(served) :]]
    if (taken := int(profile.provenance["rounds"])) < rounds:
        missing.insert(0, f"{rounds - taken} of {rounds} rounds of timing")
    left_out = {"left out": "; ".join(missing)} if missing else {}
    return dataclasses.replace(profile, provenance={**profile.provenance, **left_out})


def show(path: str) -> str:
    """Return the tables of the profile in a file.

    Raises:
      ValueError: if the file is no profile.
    """
    try:
        profile = profile_from_json(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--show: expected a profile of this command, got '{path}': {error!r}"
        ) from error
    about = [f"{profile.name}: {profile.mark}"] if profile.mark else []
    return "\n\n".join([*about, table(profile), service_table(profile)])


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    host_devices.one_thread_each()
    asked = (_CONFIG, _MODEL, _DEPLOYMENT, _SET, _ROUNDS, _UNSEEN, _REQUESTS)
    shown = f"--show={_SHOW.value}"
    expect_used(
        not _SHOW.value,
        *(*asked, _MAX_DRIFT, _SPEED_PROBES, _MINUTES.flag, _OUT),
        expected="no --show",
        got=shown,
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
        profile = run(
            config,
            _ROUNDS.value,
            _UNSEEN.value,
            _MAX_DRIFT.value,
            _SPEED_PROBES.value,
            deadline,
        )
        out = file or folder / f"{profile.name}.json"
        write_json(out, profile_to_json(profile))
    print(f"{table(profile)}\n\n{service_table(profile)}")
    said = profile.provenance
    if "left out" in said:
        print(f"\nNOT FINISHED, as --minutes were spent; it lacks {said['left out']}")
    print(f"\n{said['rounds']} rounds, drift {said['drift']}; {out}")


if __name__ == "__main__":
    main()
