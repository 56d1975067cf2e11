"""Shows the five stages of one request, in each system of a run.

    python -m experiments.one_request --run=runs/tiny
    python -m experiments.one_request --run=runs/tiny --rate=40 --request=12

Where its time went: waiting for its prompt's turn, the prompt, the way of its KV,
waiting for a place among the decodes, its decode steps; and when each token came.
Without --rate each system is shown at the highest rate that it passes at, without
--request it is the one that took the median time in the first system. Writes
one_request.png into the run directory.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.request import Status, Timeline
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from experiments.report.draw import draw
from experiments.report.panel import STAGE_COLOURS, STAGE_LEGEND, Bar, Bars
from experiments.report.stages import stage_table
from experiments.runs.request_rows import to_timeline
from experiments.runs.saved_run import SavedRun

FLAGS = Flags()
_RUN = FLAGS.string("run", REQUIRED, "A run directory of goodput_sweep.")
_TARGET = FLAGS.string("target", None, "tight or relaxed; by default the run's first.")
_RATE = FLAGS.float("rate", None, "Requests/s per device, as in table.txt.")
_REQUEST = FLAGS.integer("request", None, "Its number in the run.")


def find(
    path: pathlib.Path,
    rate_rps: float | None = None,
    request: int | None = None,
    target: str | None = None,
) -> dict[str, Timeline]:
    """Return one request's timeline by system and rate, as "vllm_v0 at 40 requests/s".

    A system that passes at no rate is left out, as its programs did not run.

    Args:
      rate_rps: per device; None is the highest that each system passes at.
      request: its id; None is one that took the median time in the first system.
      target: of the run, tight or relaxed; None is the first.

    Raises:
      ValueError: if there is no such run or request; says what there is.
    """
    run = SavedRun(path)
    systems = {point.system for point in run.kept(target)[1]}
    found: dict[str, Timeline] = {}
    for system in (name for name in run.config()["systems"] if name in systems):
        picked = run.pick(system, rate_rps, None, target)
        rows = map(to_timeline, run.requests(picked.point))
        done = {t.request.id: t for t in rows if t.status is Status.FINISHED}
        if request is None:
            middle = statistics.median_low(map(metrics.e2e_s, done.values()))
            request = next(id for id, t in done.items() if metrics.e2e_s(t) == middle)
        require(
            request in done, f"--request: expected one that {system} finished", request
        )
        found[f"{system} at {picked.rate_rps} requests/s"] = done[request]
    return found


def table(found: Mapping[str, Timeline]) -> str:
    """Write the milliseconds of each stage."""
    request = next(iter(found.values())).request
    title = f"request {request.id}, {request.prompt_tokens} prompt tokens"
    return "\n".join([title, *stage_table(found)])


def bars(found: Mapping[str, Timeline]) -> Bars:
    """Return a bar of stages for each system, with a tick for each token."""
    request = next(iter(found.values())).request

    def bar(name: str, timeline: Timeline) -> Bar:
        start_s = timeline.request.arrival_s

        def ms(stamp_s: float) -> float:
            return (stamp_s - start_s) * 1e3

        spans = [
            (ms(begin), ms(end), STAGE_COLOURS[stage.removesuffix("_s")])
            for stage, begin, end in metrics.stage_spans_s(timeline)
        ]
        return Bar(label=name, spans=spans, ticks=[*map(ms, timeline.token_s)])

    return Bars(
        title=f"{request.prompt_tokens} prompt tokens, {request.max_tokens} output "
        "tokens",
        x="time since the request arrived (ms)",
        bars=[bar(name, timeline) for name, timeline in found.items()],
        legend=STAGE_LEGEND,
        ticks="a token",
    )


def plot(found: Mapping[str, Timeline], about: str, path: pathlib.Path) -> None:
    """Draw the bars.

    Args:
      about: the run, as `said` has it.
    """
    request = next(iter(found.values())).request
    draw([bars(found)], f"request {request.id}; {about}", path, dpi=110)


def said(path: pathlib.Path) -> str:
    """Name the model, the device, the requests and the seed of a run."""
    run = SavedRun(path)
    config, starts = run.config(), run.read_json("env.json") or [{}]
    _, (first, *_) = run.kept(None)
    devices = dict.fromkeys(starts[-1].get("devices", ["a device that is not known"]))
    return (
        f"{config['model']} on {' and '.join(devices)}, "
        f"{len(run.requests(first))} requests a run, seed {config['seed']}"
    )


@command(FLAGS)
def main() -> None:
    path = pathlib.Path(_RUN.value)
    found = find(path, _RATE.value, _REQUEST.value, _TARGET.value)
    plot(found, said(path), path / "one_request.png")
    print(f"{table(found)}\n\n{path}/one_request.png")


if __name__ == "__main__":
    main()
