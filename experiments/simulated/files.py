"""The files of one simulated run: its requests, its summary and its picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from disagg_jax.metrics import SLO
from disagg_jax.metrics.latency import Stages, stages_s, tpot_s, ttft_s
from disagg_jax.request import Status, Timeline
from disagg_jax.runlog import EventLog, chrome_trace
from experiments.report.draw import draw
from experiments.runs.folder import whole, write_json, write_text
from experiments.simulated.report import latency_panels
from experiments.simulated.served import Served

FILES = ("requests.csv", "summary.json", "latencies.png")  # of a run
STAGES = tuple(field.name for field in dataclasses.fields(Stages))
COLUMNS = (
    *("request_id", "arrival_s", "prompt_tokens", "output_tokens"),
    *("ttft_s", "tpot_s", *STAGES, "error"),
)


def write_requests(
    path: pathlib.Path, timelines: Sequence[Timeline], extra_tokens: int
) -> None:
    """Write a row for each request; floats read back as they were.

    Args:
      extra_tokens: that the simulation added to each output.
    """
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


def write_run(
    out: pathlib.Path, served: Served, slo: SLO, title: str, extra_tokens: int
) -> dict[str, Any]:
    """Write `FILES` into the folder `out`; return the summary."""
    out.mkdir(exist_ok=True)
    requests, summary, picture = (out / name for name in FILES)
    write_requests(requests, served.run.timelines, extra_tokens)
    found = served.summary(slo)
    write_json(summary, found)
    draw(latency_panels(served, slo), title, picture)
    return found


def write_timeline(path: pathlib.Path, served: Served, log: EventLog) -> None:
    """Write a run as a timeline that Perfetto opens."""
    timelines = served.run.timelines
    drawn = chrome_trace(served.case.deployment, log.lines, timelines)
    write_text(path, json.dumps(drawn))
