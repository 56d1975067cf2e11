"""`experiments.hardware_accuracy` on synthetic rows."""

import csv

import pytest

from tests.commands import run_command
from tests.experiments.measured.measurements import fields, workers, write

ROWS = (
    fields("small", concurrency=2),
    workers(("", 1, 1, 0), ("", 1, 1, 0), id="uncounted"),
    fields("unknown", model_path="somebody/nothing-1b"),
    fields("large", concurrency=16, backend="sglang"),
    fields("fast", concurrency=1, silicon_tpot_ms=0.1),
    workers((1, 1, 1, 0), (1, 1, 1, 0), id="apart", concurrency=4),
)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.csv", *ROWS)


def run(*args):
    return run_command("hardware_accuracy", *map(str, args))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_row_is_answered(path, tmp_path):
    out = tmp_path / "out"
    done = run(f"--rows={path}", f"--out={out}", "--workers=2")
    assert done.returncode == 0, done.stderr
    rows = read(out / "rows.csv")
    columns = ["id", "simulated_ttft_ms", "simulated_tpot_ms", "skipped"]
    assert list(rows[0]) == columns
    assert [row["id"] for row in rows] == [str(row["id"]) for row in ROWS]
    skipped = {row["id"]: row["skipped"] for row in rows if row["skipped"]}
    assert skipped["uncounted"] == "no worker counts"
    assert "nothing-1b" in skipped["unknown"] and len(skipped) == 2
    for row in rows:
        both = [row["simulated_ttft_ms"], row["simulated_tpot_ms"]]
        assert both == ["", ""] if row["skipped"] else min(map(float, both)) > 0
    text = (out / "report.txt").read_text()
    assert text in done.stdout
    assert "6 rows, 4 simulated" in text
    assert "skipped of 4 colocated rows: 1 (25.0%)" in text
    assert "1 rows are left out of the errors" in text and "\n  fast\n" in text
    assert (out / "scatter.png").stat().st_size > 1000


def test_chosen_rows_say_where_their_time_goes(path):
    done = run(f"--rows={path}", "--ids=apart,uncounted", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert "2 rows, 1 simulated" in done.stdout
    assert "skipped: no worker counts" in done.stdout
    _, _, steps = done.stdout.partition("apart: ")
    assert "0: prefill:tp1" in steps and "1: decode:tp1" in steps


def test_a_profile_is_for_the_rows_of_its_engine(path, tmp_path):
    refused = run(f"--rows={path}", "--engine=vllm-0.12", f"--out={tmp_path / 'no'}")
    assert refused.returncode == 1
    expected = "--engine: expected rows of vllm, or --force_profile, got ['sglang']"
    assert expected in refused.stderr and not (tmp_path / "no").exists()
    forced = run(
        *(f"--rows={path}", "--ids=small,large", "--engine=ideal", "--force_profile"),
        "--workers=1",
    )
    assert forced.returncode == 0, forced.stderr
    assert "profile ideal for no version" in forced.stdout
    assert "profile vllm" not in forced.stdout
    # No host work: neither layers nor sequences take any time of their own.
    assert "linear, %" in forced.stdout and "layer_s, %" not in forced.stdout
    own = run(f"--rows={path}", "--ids=small", "--engine=vllm-0.12", "--workers=1")
    assert own.returncode == 0, own.stderr
    assert "profile vllm-0.12 for no version" in own.stdout


def test_rows_have_the_profiles_of_their_engines(path):
    done = run(f"--rows={path}", "--ids=small,large", "--workers=1")
    assert "profile vllm for no version" in done.stdout
    assert "profile sglang-0.5 for no version" in done.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--out: expected a folder, or --ids of some rows"),
        (["--ids=none"], "--ids: expected some of the 6 rows' ids, got ['none']"),
        (["--ids=small", "--engine=orca"], "engine: expected one of"),
        (["--ids=small", "--force_profile"], "--force_profile: expected --engine"),
    ],
)
def test_what_is_missing_is_said(path, flags, said):
    done = run(f"--rows={path}", *flags)
    assert done.returncode == 1 and said in done.stderr


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    done = run(f"--rows={path}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "expected the columns of measured rows" in done.stderr
    assert not (tmp_path / "out").exists()
