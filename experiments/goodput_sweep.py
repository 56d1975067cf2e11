"""Finds the goodput of every system, side by side: the main job.

    python -m experiments.goodput_sweep
    python -m experiments.goodput_sweep --config=smollm2_humaneval --out=runs/smollm2
    python -m experiments.goodput_sweep --set workload.num_requests=300 --seed=7
    python -m experiments.goodput_sweep --set criterion=sarathi_serve
    python -m experiments.goodput_sweep --systems=vllm_v0,my_systems:mine
    python -m experiments.goodput_sweep --placement=runs/placement/placement.json

Writes a run directory and prints a table. Started again with the same --out and config,
it resumes after an interrupt (one Ctrl-C, or SIGTERM), a kill or a full disk. While it
runs, no other run may use the directory.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.calibration.step_times import check_step_times, measure_step_times
from disagg_jax.deployment import Deployment
from disagg_jax.engine.engine import Engine
from disagg_jax.formats import PLACEMENT, STEP_TIMES
from experiments.cli import host_devices
from experiments.cli.command import command, progress_to_stderr
from experiments.cli.flags import Flags, expect_once
from experiments.configs.config import Config
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import Need, no_effect
from experiments.configs.override import override
from experiments.runs.folder import plain, sole_use, write_text
from experiments.runs.run_dir import RunDir, environment
from experiments.sweep import report
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    Progress,
    build_engines,
    check_modelled,
    compile_engines,
    instance_memory,
    load_model,
    most_devices,
    resolve_criteria,
    resolve_slo,
    serve_with,
    step_durations,
    tune_systems,
)
from experiments.sweep.sweep import Sweep
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


def run(config: Config, out: pathlib.Path, step_times_file: str | None) -> str:
    """Run a sweep and return its table.

    Raises:
      ValueError, FileNotFoundError: on bad input, before any work.
    """
    host_devices.provide(most_devices(config))
    check_modelled(config)
    if step_times_file and config.durations == "modelled":
        expected, got = "durations=table or live", "durations=modelled"
        raise no_effect("--step_times", step_times_file, expected=expected, got=got)
    given = _read_step_times(step_times_file) if step_times_file else None
    model = load_model(config)
    source = RequestSource.load(config, model)
    for system in config.systems.values():
        source.check(
            instance_memory(
                config, Deployment.parse(system.deployment), model.config.layers
            )
        )
    engines = build_engines(config, model)
    record = {**plain(config), "step_times_file": step_times_file}
    if source.trace is not None:
        record["trace"] = source.trace  # a resumed run must find the same
    with sole_use(out):
        run_dir = RunDir(out, record)
        return _run(config, run_dir, model, source, engines, given)


def _run(
    config: Config,
    run_dir: RunDir,
    model: Model,
    source: RequestSource,
    engines: Mapping[str, Engine],
    given: dict[str, float] | None,
) -> str:
    progress = progress_to_stderr()
    compile_engines(engines, progress)
    step_times = _step_times(config, run_dir, list(engines.values()), given, progress)
    durations = step_durations(config, engines, step_times)
    first = next(iter(durations.values()))
    slo = resolve_slo(config, first, source)
    tuned = {name: (system.policies, []) for name, system in config.systems.items()}
    if config.tune and not config.step_tokens:
        tuned = tune_systems(config, durations, slo, source)
    served = {
        name: serve_with(config, engine, tuned[name][0], step_times)
        for name, engine in engines.items()
    }
    summary = Sweep(
        config=config,
        model=model,
        source=source,
        served=served,
        durations=first,
        slo=slo,
        choices={name: reasons for name, (_, reasons) in tuned.items() if reasons},
        criteria=resolve_criteria(config, slo, first, source),
        run_dir=run_dir,
        progress=progress,
    ).run()
    run_dir.write_json("summary.json", summary)
    report.plot(summary, run_dir.path / "attainment.png")
    text = report.table(summary)
    write_text(run_dir.path / "table.txt", text + "\n")
    return text


def _step_times(
    config: Config,
    run_dir: RunDir,
    engines: Sequence[Engine],
    given: dict[str, float] | None,
    progress: Progress,
) -> dict[str, float]:
    """Return the medians to use: given, of the run that is resumed, or taken now.

    They are empty if durations are modelled.
    """
    if config.durations == "modelled":
        return {}
    saved = run_dir.read_json("step_times.json")
    if saved is not None:
        return STEP_TIMES.read(saved)["seconds"]
    seconds = given
    if given is not None:
        for engine in engines:
            check_step_times(engine, given, streams=config.streams)
    if seconds is None:
        seconds = measure_step_times(
            engines, config.timing_repeats, progress, streams=config.streams
        )
    content = {"seconds": seconds, "measured": environment() if not given else None}
    run_dir.write_json("step_times.json", STEP_TIMES.write(content))
    return seconds


def _read_step_times(path: str) -> dict[str, float]:
    try:
        record = json.loads(pathlib.Path(path).read_text())
        seconds = STEP_TIMES.read(record)["seconds"]
        return {str(key): float(value) for key, value in seconds.items()}
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
    print(run(config, out, _STEP_TIMES.value))
    print(f"\nrun directory: {out}")


if __name__ == "__main__":
    main()
