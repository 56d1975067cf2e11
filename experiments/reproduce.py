"""Reproduces figures and tables of DistServe and its peers in the simulator.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --figure=fig8a
    python -m experiments.reproduce --all

Each figure is our curve over the paper's digitised points, and rows that state the
paper's claim, our number with its 95 % interval across seeds, and why they differ. With
--all it writes experiments/reports/reproduction.md and its pictures (under ten minutes
on two cores); one figure alone goes to runs/reproduction. Progress is on stderr.
After --minutes no other figure is begun, and the report names those left out.
--engine gives rooflines the overheads of a serving engine.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from disagg_jax.errors import require
from disagg_jax.sim.engines import get_engine
from experiments.cli.command import command
from experiments.cli.flags import Flags, expect_used
from experiments.cli.names import ENGINE
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.papers import FIGURES
from experiments.papers.figure import Drawn, Lab
from experiments.report.draw import draw
from experiments.report.table import markdown
from experiments.runs.folder import commit, sole_use, write_text

FLAGS = Flags()
_FIGURE = FLAGS.string("figure", None, "One of --list.")
_ALL = FLAGS.boolean("all", False, "Every figure.")
_LIST = FLAGS.boolean("list", False, "Names the figures.")
_NUM_REQUESTS = FLAGS.integer(
    "num_requests", None, "Of each run, instead of each figure's own number."
)
_SEEDS = FLAGS.integer("seeds", 5, "Runs of each point.")
_WORKERS = FLAGS.workers()
_OUT = FLAGS.string(
    "out",
    None,
    "Folder; default experiments/reports with --all and no --engine, else "
    "runs/reproduction.",
)
_ENGINE = FLAGS.string(
    "engine",
    None,
    "Whose overheads and share of memory simulations have in figures whose durations "
    f"are all a roofline's; the policies stay the papers'. {ENGINE}",
)
_SEARCH_TIMES = FLAGS.string(
    "search_times", None, 'JSON for fig12: {"Low" or "High": {GPUs: seconds}}.'
)

_MINUTES = MinutesFlag(FLAGS, "figures")

REPORTS = pathlib.Path(__file__).parent / "reports"
_COLUMNS = ("claim", "paper", "ours, 95 % over seeds", "why they differ", "run")
_PREAMBLE = """\
# Published figures, reproduced

Made by `python -m experiments.reproduce {flags}`; do not edit. Everything is simulated.
Intervals are Student t, 95 %, across seeds; all systems see the same requests at the
same seed, and ratios are paired by seed. DistServe's points were read from the vector
drawings of arXiv 2401.09670 v3 (experiments/profiles/distserve_figures.json), those of
the other papers are numbers in their text: hollow markers. "As shipped" is DistServe's
own simulator: its rules, free links, no KV memory, and a slower engine for vLLM than
for itself. "One engine" gives both sides the same step times, KV memory and links. rps
is requests/s; per GPU unless said.
"""


def run(
    names: Sequence[str],
    lab: Lab,
    out: pathlib.Path,
    flags_used: str,
    deadline: Deadline = ENDLESS,
) -> list[str]:
    """Make figures, their pictures and `out`/reproduction.md; return its lines.

    Args:
      deadline: after which no other figure is begun; the lines name those left out.

    Raises:
      ValueError: on an unknown figure, before any work.
    """
    for name in names:
        require(name in FIGURES, f"--figure: expected one of {sorted(FIGURES)}", name)
    version = commit() or "no checkout"
    lines = _PREAMBLE.format(flags=flags_used).splitlines()
    with sole_use(out):
        (out / "figures").mkdir(exist_ok=True)
        for i, name in enumerate(names):
            if deadline.passed():
                left_out = ", ".join(names[i:])
                lines += ["", f"Left out, as --minutes were spent: {left_out}."]
                break
            figure = FIGURES[name]
            lab.progress(f"{name}: {figure.title}")
            drawn = figure.make(lab)
            if drawn.panels:
                picture = out / "figures" / f"{name}.png"
                notes = [*runs_of(drawn), *checked(drawn)]
                draw(drawn.panels, figure.title, picture, notes=notes)
            lines += _section(name, drawn, version, lab)
        write_text(out / "reproduction.md", "\n".join(lines) + "\n")
    return lines


def runs_of(drawn: Drawn) -> list[str]:
    """Name what was run for a figure once: systems, models, devices, N and seeds."""
    parts = dict.fromkeys(p for claim in drawn.claims for p in claim.runs.split("; "))
    runs = [part for part in parts if part != "-" and not part.endswith("as above")]
    return ["; ".join(runs)] if runs else []


def checked(drawn: Drawn) -> list[str]:
    """Return how far a figure's durations were from measurements, a line for each."""
    lines = (line for said in drawn.checked for line in said.splitlines())
    return list(dict.fromkeys(lines))


def _section(name: str, drawn: Drawn, version: str, lab: Lab) -> list[str]:
    title, reads, command = FIGURES[name].title, FIGURES[name].reads, f"--figure={name}"
    if "seeds" in reads:
        command += f" --seeds={lab.seeds}"
    if "num_requests" in reads and lab.num_requests is not None:
        command += f" --num_requests={lab.num_requests}"
    said = checked(drawn)
    if "engine" in reads and lab.engine is not None:
        command += f" --engine={lab.engine}"
        said.append("Why they differ is said of the same figure without an engine.")
    lines = ["", f"## {title}", ""]
    if drawn.panels:
        lines += [f"![{title}](figures/{name}.png)", ""]
    if said:
        lines += ["  \n".join(said), ""]
    made = f"`{command}` at {version}"
    rows = [
        (c.claim, c.paper, c.ours, c.why, f"{c.runs}; {made}") for c in drawn.claims
    ]
    return [*lines, *markdown([_COLUMNS, *rows])]


def read_search_times(path: str) -> Mapping[str, Mapping[str, float]]:
    """Read the seconds of a placement search, by algorithm and number of GPUs.

    Raises:
      ValueError: naming the file, if it is something else.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
        return {
            algorithm: {str(int(n)): float(s) for n, s in times.items()}
            for algorithm, times in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'--search_times: expected {{"Low": {{GPUs: seconds}}}} in JSON, got '
            f"'{path}': {error!r}"
        ) from error


def _names() -> list[str]:
    """Return the figures that the flags ask for."""
    one: str | None = _FIGURE.value
    if _ALL.value == (one is not None):
        raise ValueError("expected one of --figure=NAME, --all and --list")
    return list(FIGURES) if one is None else [one]


def _check_flags(names: Sequence[str]) -> None:
    """Raise ValueError on a flag that none of the figures reads."""
    if not set(names) <= FIGURES.keys():
        return  # `run` says so
    read = {what for name in names for what in FIGURES[name].reads}
    for flag in (_NUM_REQUESTS, _SEEDS, _WORKERS, _SEARCH_TIMES, _ENGINE):
        readers = [name for name, each in FIGURES.items() if flag.name in each.reads]
        expected = f"--all or --figure={' or '.join(readers)}"
        got = f"--figure={','.join(names)}"
        expect_used(flag.name in read, flag, expected=expected, got=got)


def _lab() -> Lab:
    lab = Lab(
        num_requests=_NUM_REQUESTS.value,
        seeds=_SEEDS.value,
        workers=_WORKERS.value,
        progress=ProgressLines(),
        engine=_ENGINE.value,
    )
    if lab.engine is not None:
        get_engine(lab.engine)  # raises now if there is none
    if _SEARCH_TIMES.value is None:
        return lab
    times = read_search_times(_SEARCH_TIMES.value)
    return dataclasses.replace(lab, search_times=times)


@command(FLAGS)
def main() -> None:
    of_runs = (_NUM_REQUESTS, _SEEDS, _WORKERS, _OUT, _SEARCH_TIMES, _ENGINE)
    listed = {"expected": "no --list", "got": "--list"}
    expect_used(not _LIST.value, _FIGURE, _ALL, *of_runs, _MINUTES.flag, **listed)
    if _LIST.value:
        print("\n".join(f"{name:12} {f.title}" for name, f in FIGURES.items()))
        return
    names = _names()
    _check_flags(names)
    lab = _lab()
    published = _ALL.value and lab.engine is None
    default = REPORTS if published else pathlib.Path("runs/reproduction")
    out = pathlib.Path(_OUT.value) if _OUT.value else default
    used = "--all" if _ALL.value else f"--figure={_FIGURE.value}"
    used += f" --engine={lab.engine}" if lab.engine else ""
    lines = run(names, lab, out, used, _MINUTES.start())
    if not _ALL.value:
        print("\n".join(lines))
    print(f"\nreport: {out / 'reproduction.md'}")


if __name__ == "__main__":
    main()
