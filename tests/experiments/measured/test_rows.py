"""What rows of measurements mean: devices, clients, and errors of their files."""

import pytest

from experiments.measured.rows import architecture, read_rows, select
from tests.experiments.measured.measurements import (
    DAY,
    DUMP,
    OTHER,
    fields,
    read_one,
    workers,
    write,
)


def sizes(tp, dp, moe_tp, moe_ep):
    names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    return dict(zip(names, (tp, dp, moe_tp, moe_ep), strict=True))


@pytest.mark.parametrize(
    "columns, deployment, devices",
    [
        (sizes(8, 1, 8, 1), "tp8", 8),
        (sizes(8, 1, 1, 8), "tp8ep8", 8),
        # tp and ep of the same devices, multiplied
        (sizes(16, 1, 4, 4), "tp4ep4", 4),
        (sizes(64, 1, 8, 8), "tp8ep8", 8),
        (sizes(4, 1, 2, 2), "tp2ep2", 2),
        (sizes(1, 16, 4, 4), "tp1dp4ep4", 4),
        (sizes(1, 64, 8, 8), "tp1dp8ep8", 8),
        (sizes(4, 4, 1, 16), "tp1dp4ep4", 4),
        (sizes(2, 2, 1, 4), "tp1dp2ep2", 2),
        # not multiplied
        (sizes(1, 8, 1, 8), "tp1dp8ep8", 8),
        (sizes(4, 2, 1, 8), "tp4dp2ep8", 8),
    ],
)
@pytest.mark.parametrize("source", [DUMP, DAY])
def test_devices_of_public_rows(tmp_path, source, columns, deployment, devices):
    row = read_one(tmp_path, fields(source=source, **columns))
    assert row.is_public
    assert row.loop.deployment == f"colocated:{deployment}"
    assert (row.loop.parallelism, row.loop.devices) == (deployment, devices)


@pytest.mark.parametrize(
    "columns, deployment",
    [
        (sizes(4, "", 1, 4), "tp4ep4"),
        (sizes(4, "", 2, 2), "tp4ep2"),
        (sizes(2, 0, 0, 0), "tp2"),
        (sizes(8, "", 1, 0), "tp8"),
        (sizes(1, "", 4, 1), "tp1"),  # experts that do not multiply to tp
        (sizes(2, "", 1, 4), "tp2"),
    ],
)
def test_devices_of_other_rows(tmp_path, columns, deployment):
    row = read_one(tmp_path, fields(source=OTHER, **columns))
    assert not row.is_public
    assert row.loop.deployment == f"colocated:{deployment}"


def test_stages_count_as_devices(tmp_path):
    row = read_one(tmp_path, fields(pp_size=2))
    assert (row.loop.deployment, row.loop.devices) == ("colocated:tp2pp2", 4)


@pytest.mark.parametrize(
    "concurrency, batch, dp, clients",
    [
        (384, 384, 1, 384),
        (384, 96, "", 96),  # four servers
        (256, 64, 4, 256),  # four attention replicas of one
        (64, "", 1, 64),
        ("none", 32, 1, 32),
    ],
)
def test_clients(tmp_path, concurrency, batch, dp, clients):
    row = fields(concurrency=concurrency, batch_size=batch, attention_dp_size=dp)
    assert read_one(tmp_path, row).loop.clients == clients


def test_a_row_without_concurrency_is_skipped(tmp_path):
    row = read_one(tmp_path, fields(concurrency="none", batch_size=""))
    assert (row.loop, row.skipped) == (None, "no concurrency")


def test_workers_are_instances(tmp_path):
    row = read_one(tmp_path, workers((1, 1, 4, 4), (5, 8, 1, 8), concurrency=45))
    assert row.loop.deployment == "1xprefill:tp1dp4ep4,5xdecode:tp8ep8"
    assert row.loop.parallelism == "tp8ep8"
    assert (row.loop.devices, row.loop.clients) == (44, 45)


def test_clients_of_workers_without_a_concurrency(tmp_path):
    sides = (2, 1, 1, 0), (3, 1, 4, 0)
    row = read_one(tmp_path, workers(*sides, concurrency="", decode_batch_size=24))
    assert row.loop.clients == 24 * 3 * 4


def test_a_row_without_worker_counts_is_skipped(tmp_path):
    row = read_one(tmp_path, workers(("", 1, 4, 4), ("", 8, 1, 8)))
    assert (row.loop, row.skipped) == (None, "no worker counts")


def test_labels_and_latencies(tmp_path):
    row = read_one(tmp_path, fields())
    assert (row.precision, row.gemm, row.experts) == ("bf16",) * 3
    assert (row.ttft_s, row.tpot_s) == (0.0205, 0.006)
    assert (row.prompt_tokens, row.output_tokens) == (256, 32)
    row = read_one(tmp_path, fields(precision="fp8", gemm_quant_mode="fp8_block"))
    assert (row.precision, row.gemm) == ("fp8", "fp8_block")


@pytest.mark.parametrize(
    "path, name",
    [
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b"),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-r1"),
        ("Qwen/Qwen3.5-397B-A17B", "qwen3.5-397b-a17b"),
        ("gpt-oss-120b", "gpt-oss-120b"),
    ],
)
def test_architecture(path, name):
    assert architecture(path) == name


@pytest.mark.parametrize(
    "path, source, may",
    [
        ("deepseek-ai/DeepSeek-R1-0528", DAY, True),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", DAY, True),
        ("deepseek-ai/DeepSeek-R1-0528", DUMP, False),
        ("deepseek-ai/DeepSeek-V3", DAY, False),
        ("deepseek-ai/DeepSeek-R1-0528", OTHER, False),
    ],
)
def test_rows_that_may_have_several_tokens_a_step(tmp_path, path, source, may):
    row = read_one(tmp_path, fields(model_path=path, source=source))
    assert row.may_speculate == may


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,isl\na,1\n")
    with pytest.raises(ValueError, match=r"expected the columns .* 'silicon_ttft_ms'"):
        read_rows(path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"isl": "many"}, "isl: expected an integer >= 0 or nothing, got 'many'"),
        ({"isl": ""}, "isl: expected an integer >= 1, got ''"),
        ({"tp_size": 1.5}, "tp_size: expected an integer >= 0 or nothing, got '1.5'"),
        ({"silicon_tpot_ms": "nan"}, "silicon_tpot_ms: expected ms > 0, got 'nan'"),
        ({"silicon_ttft_ms": -1}, "silicon_ttft_ms: expected ms > 0, got '-1'"),
        ({"mode": "both"}, "mode: expected one of"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, change, said):
    with pytest.raises(ValueError, match=f"row b: {said}") as error:
        read_rows(write(tmp_path / "rows.csv", fields(), fields("b", **change)))
    assert "rows.csv:3" in str(error.value)


def test_rows_must_have_different_ids(tmp_path):
    with pytest.raises(ValueError, match="expected different ids, got 'a'"):
        read_rows(write(tmp_path / "rows.csv", fields(), fields()))


def test_a_file_without_rows_and_a_short_row(tmp_path):
    path = write(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="expected at least one row"):
        read_rows(path)
    path.write_text(path.read_text() + "a,b\n")
    with pytest.raises(ValueError, match="expected a value in each column"):
        read_rows(path)


def test_selected_rows_come_as_asked(tmp_path):
    path = write(tmp_path / "rows.csv", *(fields(id) for id in "abc"))
    rows = read_rows(path)
    assert [row.id for row in select(rows, ["c", "a"])] == ["c", "a"]
    with pytest.raises(ValueError, match=r"some of the 3 rows' ids, got \['d'\]"):
        select(rows, ["a", "d"])
