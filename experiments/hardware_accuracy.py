"""How far the simulator is from real engines on real devices.

    python -m experiments.hardware_accuracy --rows=FILE.csv --out=runs/hardware
    python -m experiments.hardware_accuracy --rows=FILE.csv --ids=A,B

FILE has rows of measurements with the columns of `experiments/measured/rows.py`: an
engine, a model, devices, a closed loop of clients, lengths, and the mean TTFT and TPOT.
Each row is simulated as it was measured: its clients send their next request when the
last one ends, output lengths are drawn from [0.8, 1] of `osl`, and the first and the
last request of each client are left out. A row that cannot be described or simulated is
skipped, with the reason.

It prints and writes to report.txt the errors of TPOT, TTFT, request latency, which is
TTFT + (osl - 1) TPOT, and output tokens/s per GPU: for all rows, by engine, model, GPU,
precision, mode, parallelism and number of clients; and the rows that are worst. Rows
with a TPOT that memory cannot give with one token a step are counted apart.
rows.csv: for each row `simulated_ttft_ms`, `simulated_tpot_ms`, and why it was skipped.
scatter.png: simulated over measured latencies.

--ids simulates these rows only, and prints where the time of their steps goes; without
--out nothing is written.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from disagg_jax.sim.workers import Mapper
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from experiments.cli.progress import ProgressLines
from experiments.cli.workers import open_workers
from experiments.measured import report
from experiments.measured.rows import MeasuredRow, read_rows, select
from experiments.measured.served import SimulatedRow, simulate_row, simulation_of
from experiments.measured.step_times import describe_steps
from experiments.report.draw import draw
from experiments.runs.folder import commit, run_folder, write_text

FLAGS = Flags()
_ROWS = FLAGS.string("rows", REQUIRED, "CSV file of measurements.")
_IDS = FLAGS.list("ids", None, "Ids of rows: only these, and where their time goes.")
_OUT = FLAGS.string("out", None, "Folder for the results; needed without --ids.")
_WORKERS = FLAGS.workers()


def simulate(
    rows: Sequence[MeasuredRow], workers: Mapper, progress: ProgressLines
) -> list[SimulatedRow]:
    """Return what the simulation says of each row, in the order of `rows`.

    Loops of many clients take longest, so they come first and no worker ends late.
    """
    order = sorted(range(len(rows)), key=lambda i: -_work(rows[i]))
    found: dict[int, SimulatedRow] = {}
    progress.step("rows", 0, len(rows))
    results = workers(simulate_row, [rows[i] for i in order])
    for i, result in zip(order, results, strict=True):
        found[i] = result
        progress.step("rows", len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def _work(row: MeasuredRow) -> int:
    return row.loop.clients * row.output_tokens if row.loop else 0


def _steps(found: Sequence[SimulatedRow]) -> str:
    """Write where the time of each row's steps goes."""
    lines = list[str]()
    for one in found:
        lines += ["", f"{one.row.id}: {one.row.loop}"]
        if one.simulated is None or one.row.loop is None:
            lines.append(f"skipped: {one.skipped}")
            continue
        simulation = simulation_of(one.row, one.row.loop)
        simulated = simulation.build(one.row.loop.deployment)
        lines.append(describe_steps(simulated, one.row, one.row.loop))
    return "\n".join(lines)


@command(FLAGS)
def main() -> None:
    rows = read_rows(pathlib.Path(_ROWS.value))
    if _IDS.value is not None:
        rows = select(rows, _IDS.value)
    elif _OUT.value is None:
        raise ValueError("--out: expected a folder, or --ids of some rows, got neither")
    out = None if _OUT.value is None else pathlib.Path(_OUT.value)
    with run_folder(out, FLAGS.asked(), "rows.csv", replace=True):
        with open_workers(_WORKERS.value) as workers:
            found = simulate(rows, workers, ProgressLines())
        text = f"# python -m experiments.hardware_accuracy   commit {commit()}\n"
        text += f"# {_ROWS.value}\n{report.text(found)}\n"
        if _IDS.value is not None:
            text += _steps(found) + "\n"
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
