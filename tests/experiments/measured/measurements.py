"""Synthetic rows of measurements, as a file and as fields."""

import csv
import pathlib

from experiments.measured.rows import COLUMNS, read_rows
from experiments.measured.served import RowTask, simulate_row

DUMP = "db-dump/2026-04-27; config_id=1; silicon_concurrency={}; image"
DAY = "source_file=2026-04-06.csv; silicon_concurrency={}; measured=2026-04-07"
OTHER = "source_file=/Users/somebody/Llama.csv; silicon_concurrency={}"


def fields(id="a", concurrency=8, source=OTHER, **changes):
    """The fields of a colocated row of Llama-3-8B on two H100s."""
    row = dict.fromkeys(COLUMNS, "")
    row |= {
        "id": id,
        "silicon_data_source": source.format(concurrency),
        "backend": "vllm",
        "model_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "system": "h100_sxm",
        "mode": "agg",
        "isl": 256,
        "osl": 32,
        "batch_size": concurrency,
        "tp_size": 2,
        "pp_size": 1,
        "moe_tp_size": 1,
        "moe_ep_size": 1,
        "silicon_ttft_ms": 20.5,
        "silicon_tpot_ms": 6.0,
    }
    return row | changes


def workers(prefill, decode, **changes):
    """The fields of a disaggregated row: (workers, tp, dp, ep) of each side."""
    sides = {"prefill": prefill, "decode": decode}
    names = ("num_workers", "tp_size", "attention_dp_size", "moe_ep_size")
    given = {
        f"{side}_{name}": size
        for side, sizes in sides.items()
        for name, size in zip(names, sizes, strict=True)
    }
    empty = dict.fromkeys(("tp_size", "pp_size", "batch_size"), "")
    return fields(mode="disagg", **(empty | given | changes))


def measured_by(profile, folder: pathlib.Path, *rows):
    """The fields of rows, with the latencies that an engine of this profile has."""
    described = read_rows(write(folder / "described.csv", *rows))
    found = [simulate_row(RowTask(row=row, profile=profile)) for row in described]
    assert not any(one.skipped for one in found)
    return [
        row
        | {
            "silicon_ttft_ms": 1e3 * one.simulated.ttft_s,
            "silicon_tpot_ms": 1e3 * one.simulated.tpot_s,
        }
        for row, one in zip(rows, found, strict=True)
    ]


def write(path: pathlib.Path, *rows):
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        lines.writerows(rows)
    return path


def read_one(folder: pathlib.Path, row):
    """The row as it is read."""
    (found,) = read_rows(write(folder / "rows.csv", row))
    return found
