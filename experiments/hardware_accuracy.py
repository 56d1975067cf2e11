"""How far the simulator is from real engines on real devices.

    python -m experiments.hardware_accuracy --rows=FILE.csv --out=runs/hardware
    python -m experiments.hardware_accuracy --rows=FILE.csv --ids=A,B

FILE has rows of measurements with the columns of `experiments/measured/rows.py`: an
engine, a model, devices, a closed loop of clients, lengths, and the mean TTFT and TPOT.
Each row is simulated as it was measured, by the profile of its engine: its clients send
their next request when the last one ends, and lengths and means are those of the
benchmark that measured it (`experiments/measured/served.py`). A row that cannot be
described or simulated is skipped, with the reason.

It prints and writes to report.txt the errors of TPOT, TTFT, request latency, which is
TTFT + (osl - 1) TPOT, and output tokens/s per GPU: for all rows, by what a simulator
must know for them, profile, model, GPU, precision, mode, parallelism and number of
clients; and the rows that are worst. Rows with a TPOT that memory cannot give with one
token a step are counted apart.
rows.csv: for each row `simulated_ttft_ms`, `simulated_tpot_ms`, and why it was skipped.
scatter.png: simulated over measured latencies.

--ids simulates these rows only, and prints where the time of their steps goes; without
--out nothing is written.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from disagg_jax.errors import require
from disagg_jax.sim.engines import EngineProfile, engine_of, get_engine
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags, expect_used
from experiments.cli.names import ENGINE
from experiments.cli.progress import ProgressLines
from experiments.cli.workers import open_workers
from experiments.measured import report
from experiments.measured.rows import MeasuredRow, read_rows, select
from experiments.measured.served import RowTask, SimulatedRow, simulate_rows
from experiments.measured.step_times import describe_steps
from experiments.report.draw import draw
from experiments.runs.folder import commit, run_folder, write_text

FLAGS = Flags()
_ROWS = FLAGS.string("rows", REQUIRED, "CSV file of measurements.")
_IDS = FLAGS.list("ids", None, "Ids of rows: only these, and where their time goes.")
_ENGINE = FLAGS.string(
    "engine",
    None,
    f"Instead of the profiles for the rows' engines. {ENGINE}",
)
_FORCE_PROFILE = FLAGS.boolean(
    "force_profile", False, "Take --engine for rows of other engines too."
)
_OUT = FLAGS.string("out", None, "Folder for the results; needed without --ids.")
_WORKERS = FLAGS.workers()


def _profile(rows: Sequence[MeasuredRow]) -> EngineProfile | None:
    """Return the profile of --engine, if it is given and is for these rows."""
    given = _ENGINE.value is not None
    expect_used(given, _FORCE_PROFILE, expected="--engine", got="none")
    if not given:
        return None
    profile = get_engine(str(_ENGINE.value))
    others = sorted({row.engine for row in rows} - {profile.engine})
    expected = f"--engine: expected rows of {profile.engine}, or --force_profile"
    require(not others or _FORCE_PROFILE.value, expected, others)
    return profile


def _steps(found: Sequence[SimulatedRow], profile: EngineProfile | None) -> str:
    """Write where the time of each row's steps goes."""
    lines = list[str]()
    for one in found:
        lines += ["", f"{one.row.id}: {one.row.loop}"]
        if one.simulated is None or one.row.loop is None:
            lines.append(f"skipped: {one.skipped}")
            continue
        by = profile or engine_of(one.row.engine, one.row.version)
        lines.append(describe_steps(one.row, one.row.loop, by))
    return "\n".join(lines)


@command(FLAGS)
def main() -> None:
    rows = read_rows(pathlib.Path(_ROWS.value))
    if _IDS.value is not None:
        rows = select(rows, _IDS.value)
    elif _OUT.value is None:
        raise ValueError("--out: expected a folder, or --ids of some rows, got neither")
    profile = _profile(rows)
    out = None if _OUT.value is None else pathlib.Path(_OUT.value)
    with run_folder(out, FLAGS.asked(), "rows.csv", replace=True):
        with open_workers(_WORKERS.value) as workers:
            tasks = [RowTask(row=row, profile=profile) for row in rows]
            found = simulate_rows(tasks, workers, ProgressLines())
        text = f"# python -m experiments.hardware_accuracy   commit {commit()}\n"
        text += f"# {_ROWS.value}\n{report.text(found)}\n"
        if _IDS.value is not None:
            text += _steps(found, profile) + "\n"
        if out is not None:
            report.write_rows(out / "rows.csv", found)
            write_text(out / "report.txt", text)
            if panels := report.panels(found):
                draw(panels, _ROWS.value, out / "scatter.png")
    print(text)
    if out is not None:
        print(f"{out}: rows.csv, report.txt, scatter.png")


if __name__ == "__main__":
    main()
