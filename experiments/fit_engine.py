"""Fits the profile of a serving engine to measured rows.

    python -m experiments.fit_engine --rows=FILE.csv --engine=vllm --out=vllm.json
    python -m experiments.fit_engine --rows=FILE.csv --engine=vllm --version=0.12 \\
        --near=vllm --out=vllm-0.12.json

FILE has the columns of `experiments.hardware_accuracy`. Each row of the engine is
simulated as it was measured; then the factors of the engine's terms follow from least
squares (`disagg_jax/calibration/engine_fit.py`), twice. Rows that cannot be simulated,
and those that may have had several tokens a step, are left out.

It prints the factors and the errors of rows that a fit has not seen: without the rows
of their parallelism, number of clients, lengths or model. OUT is the profile, which
`--engine=OUT` takes wherever a simulation has an engine.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import pathlib

from disagg_jax.errors import require
from disagg_jax.sim.engines import EngineProfile, get_engine
from disagg_jax.sim.engines.profile import to_json
from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from experiments.cli.names import ENGINE
from experiments.cli.progress import ProgressLines
from experiments.cli.workers import open_workers
from experiments.measured.engines import STARTS
from experiments.measured.fitting import fit_profile
from experiments.measured.rows import MeasuredRow, read_rows
from experiments.report.table import Row, numbers, underlined
from experiments.runs.folder import commit, write_json

FLAGS = Flags()
_ROWS = FLAGS.string("rows", REQUIRED, "CSV file of measurements.")
_ENGINE = FLAGS.enum("engine", REQUIRED, sorted(STARTS), "Whose rows are fitted.")
_VERSION = FLAGS.string(
    "version",
    "",
    "The beginning of the versions whose rows are fitted; else all.",
)
_WITHOUT = FLAGS.list(
    "without", [], "The beginnings of versions whose rows are left out."
)
_NEAR = FLAGS.string(
    "near", None, f"A profile that the factors are drawn towards. {ENGINE}"
)
_DEFAULT = FLAGS.boolean(
    "default", False, "With --version: make it the engine's profile for others too."
)
_OUT = FLAGS.string("out", REQUIRED, "File for the profile, .json, which has its name.")
_WORKERS = FLAGS.workers()


def _start(out: pathlib.Path) -> EngineProfile:
    start = STARTS[_ENGINE.value]
    if _NEAR.value is not None:
        near = get_engine(_NEAR.value)
        expected = f"--near: expected a profile of {start.engine}"
        require(near.engine == start.engine, expected, near.engine)
        start = dataclasses.replace(start, factors=near.factors)
    return dataclasses.replace(
        start,
        name=out.stem,
        versions=(_VERSION.value,) if _VERSION.value else (),
        is_default=_DEFAULT.value or not _VERSION.value,
    )


def _rows_of(path: pathlib.Path, start: EngineProfile) -> list[MeasuredRow]:
    rows = [row for row in read_rows(path) if row.engine == start.engine]
    version, without = _VERSION.value, tuple(_WITHOUT.value)
    of = [
        row
        for row in rows
        if row.version.startswith(version)
        and not row.version.startswith(without)
        and row.mode == "agg"
    ]
    expected = f"--rows: expected colocated rows of {start.engine} {version}".rstrip()
    require(bool(of), expected, sorted({row.version for row in rows}))
    return of


def _text(profile: EngineProfile) -> str:
    """Write the factors, and the errors of rows that a fit has not seen."""
    factors = dataclasses.asdict(profile.factors)
    shown = [
        (name, f"{1e6 * value:.2f} us" if name.endswith("_s") else f"{value:.3f}")
        for name, value in factors.items()
    ]
    folds: list[Row] = [("left out together", "mean, %", "median, %", "P90, %")]
    for name, errors in profile.provenance["left_out"].items():
        folds.append((name, *(f"{100 * value:.1f}" for value in errors.values())))
    cells: list[Row] = [
        ("model", "GPU", "precision", "rows", "TPOT, %", "TTFT, %", "latency, %")
    ]
    for e in profile.errors:
        means = (f"{100 * error:.1f}" for error in (e.tpot, e.ttft, e.latency))
        where = (e.model or "all", e.hardware, e.precision)
        cells.append((*where, str(e.rows), *means))
    late = f"{'first token':15} {profile.first_token_steps:.1f} steps late"
    made = profile.provenance
    head = f"# {made['command']}   commit {made['commit']}\n# {made['asked']}\n"
    head += f"{profile.name}: fitted to {made['rows']} rows"
    return "\n".join(
        [head, "", *(f"{name:15} {value}" for name, value in shown), late, ""]
        + [
            "errors of TPOT on rows that no fit has seen",
            *underlined(numbers(folds)),
        ]
        + ["", "mean errors with the rows of as many clients left out"]
        + underlined(numbers(cells))
    )


@command(FLAGS)
def main() -> None:
    out, rows_file = pathlib.Path(_OUT.value), pathlib.Path(_ROWS.value)
    require(out.suffix == ".json", "--out: expected a .json file", _OUT.value)
    start = _start(out)
    rows = _rows_of(rows_file, start)
    with open_workers(_WORKERS.value) as workers:
        profile = fit_profile(rows, start, workers, ProgressLines())
    with rows_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    made = {
        "command": "python -m experiments.fit_engine",
        "asked": {**FLAGS.asked(), "rows": rows_file.name},
        "sha256": digest,  # of the rows' file
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    provenance = {**made, **profile.provenance}
    profile = dataclasses.replace(profile, provenance=provenance)
    write_json(out, to_json(profile))
    print(_text(profile))
    print(f"\n{out}: the profile")


if __name__ == "__main__":
    main()
