"""A short sweep on the virtual clock, with the step times of the profile."""

from __future__ import annotations

import dataclasses

from disagg_jax.calibration.step_times import step_times_of
from disagg_jax.formats import STEP_TIMES
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.cost.measured_profile import profile_from_json
from experiments import goodput_sweep
from experiments.configs.config import Config
from experiments.device.calibration import PROFILE, study
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import DeviceSizes
from experiments.runs.folder import read_json, write_json
from experiments.sweep.serving import build_engines, load_model

_TIMES = "step_times.json"
_REQUESTS, _SEEDS, _EXECUTED = 100, 2, 20


def config_of(sizes: DeviceSizes) -> Config:
    """Return a sweep of the systems that were calibrated."""
    base = study(sizes)
    return dataclasses.replace(
        base,
        workload=dataclasses.replace(base.workload, num_requests=_REQUESTS),
        search=SearchPlan(growth=1.4, tolerance=0.15),
        num_seeds=_SEEDS,
        executed_requests=_EXECUTED,
    )


def run(bench: Bench) -> Found:
    """Search the goodput of each system; programs run at the rates that pass.

    Without a profile its programs are timed first, in a folder of another name.
    """
    config, times = config_of(bench.sizes), bench.out / _TIMES
    profile = read_json(bench.out / PROFILE)
    if profile is not None:
        found = profile_from_json(profile)
        engines = build_engines(config, load_model(config))
        seconds: dict[str, float] = {}
        for engine in engines.values():
            seconds |= step_times_of(found, engine)
        write_json(times, STEP_TIMES.write({"seconds": seconds}))
    out = bench.out / ("sweep" if profile is not None else "sweep_timed")
    given = None if profile is None else str(times)
    text = goodput_sweep.run(config, out, given, 1, bench.deadline)
    print(text)
    summary = read_json(out / "summary.json") or {"missing": ["all systems"]}
    return Found(text.partition("\n")[0], "; ".join(summary.get("missing", [])))


PART = Part(name="sweep", about="goodput of two systems, emulated", run=run, weight=2)
