"""The five stages of one request, in each system of a run.

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

import matplotlib
import matplotlib.figure
from absl import app, flags

from disagg_jax import metrics
from disagg_jax.errors import require
from disagg_jax.request import Status, Timeline
from experiments.cli.command import command
from experiments.report.table import align
from experiments.runs.request_rows import to_timeline
from experiments.runs.run_dir import SavedRun
from experiments.sweep.report import STAGE_COLOURS, STAGES

_RUN = flags.DEFINE_string(
    "run", None, "A run directory of goodput_sweep.", allow_override=True
)
_RATE = flags.DEFINE_float(
    "rate", None, "Requests/s per device, as in table.txt.", allow_override=True
)
_REQUEST = flags.DEFINE_integer("request", None, "Its number in the run.")


def find(
    path: pathlib.Path, rate_rps: float | None = None, request: int | None = None
) -> dict[str, Timeline]:
    """One request's timeline by system and rate, such as "vllm_v0 at 40 requests/s".

    Args:
      rate_rps: per device; None is the highest that each system passes at.
      request: its id; None is one that took the median time in the first system.

    Raises:
      ValueError: if there is no such run or request; says what there is.
    """
    run = SavedRun(path)
    config = run.config()
    found: dict[str, Timeline] = {}
    for system in config["systems"]:
        picked = run.pick(system, rate_rps, seed=None)
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
    """Milliseconds of each stage."""
    request = next(iter(found.values())).request
    rows = [
        (
            name,
            *(
                f"{getattr(metrics.stages_s(timeline), f'{stage}_s') * 1e3:.2f}"
                for stage in STAGES
            ),
            f"{metrics.ttft_s(timeline) * 1e3:.2f}",
            f"{metrics.tpot_s(timeline) * 1e3:.2f}",
        )
        for name, timeline in found.items()
    ]
    head = ("ms", *(stage.replace("_", " ") for stage in STAGES), "TTFT", "TPOT")
    title = f"request {request.id}, {request.prompt_tokens} prompt tokens"
    return "\n".join([title, *align([head, *rows], right=range(1, len(head)))])


def plot(found: Mapping[str, Timeline], path: pathlib.Path) -> None:
    """A bar of stages for each system, a tick for each token."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = matplotlib.figure.Figure(
            figsize=(9, 1.4 + 0.7 * len(found)), layout="constrained"
        )
        axes = figure.subplots()
        for i, timeline in enumerate(found.values()):
            start_s = timeline.request.arrival_s
            for name, begin, end in metrics.stage_spans_s(timeline):
                colour = STAGE_COLOURS[STAGES.index(name.removesuffix("_s"))]
                width = (end - begin) * 1e3
                axes.barh(i, width, left=(begin - start_s) * 1e3, color=colour)
            stamps = [(stamp - start_s) * 1e3 for stamp in timeline.token_s]
            axes.plot(stamps, [i] * len(stamps), "|", color="black", ms=7)
        for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
            axes.barh([0], [0], color=colour, label=stage.replace("_", " "))
        axes.plot([], [], "|", color="black", ms=7, label="a token")
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        request = next(iter(found.values())).request
        axes.set(xlabel="time since the request arrived (ms)")
        axes.set_title(
            f"request {request.id}: {request.prompt_tokens} prompt tokens, "
            f"{request.max_tokens} output tokens",
            fontsize=9,
        )
        figure.legend(fontsize=7.5, loc="outside lower center", ncols=6)
        figure.savefig(path, dpi=110, metadata={"Software": None})


@command
def main() -> None:
    path = pathlib.Path(_RUN.value or "")
    found = find(path, _RATE.value, _REQUEST.value)
    plot(found, path / "one_request.png")
    print(f"{table(found)}\n\n{path}/one_request.png")


if __name__ == "__main__":
    flags.mark_flag_as_required("run")
    app.run(main)
