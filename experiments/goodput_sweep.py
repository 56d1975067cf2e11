"""Goodput of every system, side by side: the main job.

    python -m experiments.goodput_sweep
    python -m experiments.goodput_sweep --config=smollm2_humaneval --out=runs/smollm2
    python -m experiments.goodput_sweep --set workload.num_requests=300 --seed=7
    python -m experiments.goodput_sweep --set criterion=sarathi_serve
    python -m experiments.goodput_sweep --placement=runs/placement/placement.json

Writes a run directory and prints a table. Started again with the same --out and config,
it goes on where it was: after an interrupt (one Ctrl-C, or SIGTERM), a kill or a full
disk. While it runs, no other run may use the directory.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from disagg_jax.deployment import Deployment
from disagg_jax.engine.executor import check_step_times, measure_step_times
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.formats import PLACEMENT, STEP_TIMES
from experiments.cli import host_devices
from experiments.cli.command import command, progress_to_stderr
from experiments.cli.flags import Flags, expect_once
from experiments.configs.config import Config, override, to_json
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.options import Need, no_effect
from experiments.runs.folder import sole_use, write_text
from experiments.runs.run_dir import RunDir, environment
from experiments.sweep import report
from experiments.sweep.request_source import RequestSource
from experiments.sweep.serving import (
    Progress,
    Server,
    check_modelled,
    devices_needed,
    instance_memory,
    resolve_criteria,
    resolve_slo,
)
from experiments.sweep.sweep import Sweep
from experiments.sweep.weights import load_model
from models.load import Model

FLAGS = Flags()
_CONFIG = FLAGS.string(
    "config", "tiny", f"A named config: {', '.join(sorted(CONFIGS))}."
)
_SET = FLAGS.multi_string("set", [], "Overrides, key=value; may be repeated.")
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
    """Runs a sweep; returns its table.

    Raises:
      ValueError, FileNotFoundError: on bad input, before any work.
    """
    host_devices.provide(devices_needed(config))
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
    shared: dict[Any, PlacedModel] = {}
    servers = {
        name: Server(config, system, model, shared)
        for name, system in config.systems.items()
    }
    record = {**to_json(config), "step_times_file": step_times_file}
    if source.trace is not None:
        record["trace"] = source.trace  # a resumed run must find the same
    with sole_use(out):
        run_dir = RunDir(out, record)
        return _run(config, run_dir, model, source, servers, given)


def _run(
    config: Config,
    run_dir: RunDir,
    model: Model,
    source: RequestSource,
    servers: Mapping[str, Server],
    given: dict[str, float] | None,
) -> str:
    progress = progress_to_stderr()
    for server in servers.values():
        server.prepare(progress)
    step_times = _step_times(config, run_dir, servers, given, progress)
    first = next(iter(servers.values()))
    slo = resolve_slo(config, first, source, step_times)
    tune = config.tune and not config.step_tokens
    choices = {
        name: server.tune(slo, source, step_times)
        for name, server in servers.items()
        if tune
    }
    summary = Sweep(
        config=config,
        model=model,
        source=source,
        servers=servers,
        step_times=step_times,
        slo=slo,
        choices={name: said for name, said in choices.items() if said},
        criteria=resolve_criteria(config, slo, first, source, step_times),
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
    servers: Mapping[str, Server],
    given: dict[str, float] | None,
    progress: Progress,
) -> dict[str, float]:
    """The medians to use: given, of the run that is resumed, or taken now.

    None where a formula says all durations.
    """
    if config.durations == "modelled":
        return {}
    saved = run_dir.read_json("step_times.json")
    if saved is not None:
        return STEP_TIMES.read(saved)["seconds"]
    seconds = given
    if given is not None:
        for server in servers.values():
            check_step_times(server.engine, given, streams=config.streams)
    if seconds is None:
        engines = [server.engine for server in servers.values()]
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
    """Options of a config that a flag leaves without effect."""
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
    config = override(get_config(_CONFIG.value), changes, _unused_options())
    if _PLACEMENT.value:
        config = config.with_placements(_read_placement(_PLACEMENT.value))
    config = config.by_step_tokens()
    out = pathlib.Path(_OUT.value or f"runs/{_CONFIG.value}")
    print(run(config, out, _STEP_TIMES.value))
    print(f"\nrun directory: {out}")


if __name__ == "__main__":
    main()
