"""Simulates a trace on a deployment: one row for each request.

    python -m experiments.simulate --trace=FILE.csv --config=opt13b_a100 \\
        --deployment=prefill:tp2,decode:tp1 --out=runs/simulated

FILE is a CSV file with columns for arrival (arrival_s or arrival_ms), prompt
(prompt_tokens or prompt_len) and output (output_tokens or output_len), or a trace of
Azure, BurstGPT, Mooncake, Bailian, splitwise-sim, Vidur or ShareGPT, which may be
gzipped. Rows of one tick of a coarse clock are spread over it, but with --ties=keep.
A file without times needs --rate. Requests over the simulation's context limit are
refused: --max_context raises it. A deployment reads like prefill:tp2,decode:tp1 or
2xprefill:tp1,1xdecode:tp2pp2 or colocated:tp1. What is simulated is a --config of
experiments/configs/named_simulations.py, or --model on --hardware by a --cost model;
--system names whose policies serve.

OUT/trace.json says how the trace was read. OUT must hold no other run; it gets
config.json and env.json too.
OUT/requests.csv has, for each request, ttft_s, tpot_s and the five stages, floats in
full; where a request was refused they are empty, and `error` says why.
--chrome_trace=FILE.json writes the run as a timeline that Perfetto opens: a lane for
each device, link and request.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from disagg_jax.deployment import Deployment, Role
from disagg_jax.metrics.latency import Stages, stages_s, tpot_s, ttft_s
from disagg_jax.request import Status, Timeline
from disagg_jax.runlog import EventLog, chrome_trace
from disagg_jax.scheduling import get_system
from disagg_jax.sim.simulation import Simulation
from disagg_jax.workload.traces.read import Trace
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags, expect_used
from experiments.cli.simulation_flags import SimulationFlags
from experiments.cli.trace_flags import TraceFlags
from experiments.configs.named_simulations import trace_requests
from experiments.runs.folder import plain, run_folder, whole, write_json, write_text

FLAGS = Flags()
_TRACE = FLAGS.string("trace", REQUIRED, "Arrivals and lengths.")
_SIMULATED = SimulationFlags(FLAGS)
_SYSTEM = FLAGS.string(
    "system", None, "Whose policies serve; one of your own is module:attribute."
)
_DEPLOYMENT = FLAGS.string("deployment", REQUIRED, "Which instances serve.")
_OUT = FLAGS.string("out", REQUIRED, "Folder for requests.csv.")

_RATE = FLAGS.float(
    "rate",
    None,
    "Requests/s, to which the trace's time is stretched; without times, Poisson's.",
    lower_bound=1e-9,
)
_MAX_CONTEXT = FLAGS.integer(
    "max_context",
    None,
    "Prompt and output of a request, in tokens; by default the simulation's limit.",
    lower_bound=1,
)
_TRACE_FILE = TraceFlags(FLAGS)

_STREAMED = FLAGS.integer(
    "streamed_groups",
    None,
    "Layer groups in which KV leaves while its prompt is computed; 0: all of it after.",
    lower_bound=0,
)

_CHROME_TRACE = FLAGS.string(
    "chrome_trace", None, "File for the run as a timeline, see ui.perfetto.dev."
)

STAGES = tuple(field.name for field in dataclasses.fields(Stages))
COLUMNS = (
    *("request_id", "arrival_s", "prompt_tokens", "output_tokens"),
    *("ttft_s", "tpot_s", *STAGES, "error"),
)


def write(path: pathlib.Path, timelines: Sequence[Timeline], extra_tokens: int) -> None:
    """Writes a row for each request; floats read back as they were."""
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for timeline in timelines:
            request = timeline.request
            output = request.max_tokens - extra_tokens
            asked = (request.id, request.arrival_s, request.prompt_tokens, output)
            rows.writerow((*asked, *_latencies_s(timeline), timeline.error))


def _latencies_s(timeline: Timeline) -> tuple[float | str, ...]:
    if timeline.status is not Status.FINISHED:
        return ("",) * (2 + len(STAGES))
    stages = dataclasses.astuple(stages_s(timeline))
    return (ttft_s(timeline), tpot_s(timeline), *stages)


def _record(
    trace: Trace, simulation: Simulation, deployment: Deployment
) -> dict[str, Any]:
    """What the results follow from."""
    file = pathlib.Path(_TRACE.value).read_bytes()
    return {
        "trace": trace.facts,
        "trace_sha256": hashlib.sha256(file).hexdigest(),
        "rate_rps": _RATE.value,
        "config": _SIMULATED.config,
        "system": _SYSTEM.value,
        "simulation": plain(simulation),
        "deployment": str(deployment),
    }


@command(FLAGS)
def main() -> None:
    simulation = _SIMULATED.read(_MAX_CONTEXT.value)
    if _SYSTEM.value is not None:
        policies = get_system(_SYSTEM.value)
        simulation = dataclasses.replace(simulation, policies=policies)
    deployment = Deployment.parse(_DEPLOYMENT.value)
    if _STREAMED.value is not None:
        same = _STREAMED.value == simulation.streamed_groups
        expect_used(
            same or bool(deployment.of(Role.PREFILL)),
            _STREAMED,
            expected="prefill and decode instances",
            got=f"--deployment={deployment}",
        )
        simulation = dataclasses.replace(simulation, streamed_groups=_STREAMED.value)
    simulated = simulation.build(deployment)
    trace = _TRACE_FILE.open(_TRACE.value)
    requests = trace_requests(trace, simulation, _RATE.value)
    out = pathlib.Path(_OUT.value)
    picture = pathlib.Path(_CHROME_TRACE.value) if _CHROME_TRACE.value else None
    log = EventLog() if picture else None
    if picture:
        picture.touch()  # fails now rather than after the run
    record = _record(trace, simulation, deployment)
    with run_folder(out, record, "requests.csv"):
        done = simulated.run(requests, observer=log)
        timelines = done.timelines
        write_json(out / "trace.json", trace.facts)
        write(out / "requests.csv", timelines, simulation.extra_tokens)
    if picture and log:
        drawn = chrome_trace(deployment, log.lines, timelines)
        write_text(picture, json.dumps(drawn))
    print(trace)
    refused = sum(t.status is not Status.FINISHED for t in timelines)
    print(f"{len(timelines)} requests, {refused} refused: {out / 'requests.csv'}")
    busy = done.busy_shares(deployment)
    for i, (spec, stages) in enumerate(zip(deployment.instances, busy, strict=True)):
        shares = ", ".join(f"{share:.1%}" for share in stages)
        print(f"instance {i}, {spec}: busy {shares}")
    if simulation.mark:
        print(simulation.mark)


if __name__ == "__main__":
    main()
