"""Errors against measured rows, worked out by hand."""

import dataclasses

import pytest

from experiments.measured.errors import Errors, errors_of, grouped, relative_error
from experiments.measured.served import MeanLatencies, SimulatedRow
from tests.experiments.measured.measurements import fields, read_one, workers


def found(folder, ttft_ms, tpot_ms, profile="", **changes):
    """10 ms and 1 ms were measured for 11 tokens: 20 ms a request."""
    times = {"silicon_ttft_ms": 10, "silicon_tpot_ms": 1, "osl": 11}
    row = read_one(folder, fields(**(times | changes)))
    means = MeanLatencies(ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3)
    return SimulatedRow(row=row, simulated=means, profile=profile)


def test_relative_errors(tmp_path):
    one = found(tmp_path, 20, 2)  # twice the time
    for quantity in ("TTFT", "TPOT", "request latency"):
        assert relative_error(one, quantity) == pytest.approx(1.0)
    assert relative_error(one, "tokens/s per GPU") == pytest.approx(-0.5)
    one = found(tmp_path, 30, 1)  # 40 ms instead of 20
    assert relative_error(one, "request latency") == pytest.approx(1.0)
    assert relative_error(one, "TPOT") == pytest.approx(0.0)


def test_errors():
    errors = Errors.of([-0.1, 0.2, 0.3])
    assert errors.mape == pytest.approx(0.2)
    assert errors.median == pytest.approx(0.2)
    assert errors.p90 == pytest.approx(0.28)  # 0.2 + 0.8 x 0.1
    assert errors.signed == pytest.approx(0.4 / 3)


def test_errors_of_rows(tmp_path):
    rows = [found(tmp_path, 10, tpot_ms) for tpot_ms in (0.5, 1.5)]
    of = errors_of(rows)
    assert (of["TPOT"].mape, of["TPOT"].signed) == (pytest.approx(0.5), 0)
    assert of["TTFT"].mape == pytest.approx(0)


def test_groups(tmp_path):
    rows = [
        found(tmp_path, 10, 1, profile=profile, concurrency=n)
        for n, profile in ((8, "vllm"), (9, "sglang-0.5"), (16, "vllm"), (1, "vllm"))
    ]
    assert list(grouped(rows, "engine's profile")) == ["sglang-0.5", "vllm"]
    sizes = {name: len(of) for name, of in grouped(rows, "clients, at most").items()}
    assert sizes == {"1": 1, "8": 1, "16": 2}


@pytest.mark.parametrize(
    "row, kind",
    [
        (fields(), "1 dense, 16 bits"),
        (fields(precision="fp8"), "2 dense, 8 or 4 bits"),
        (fields(model_path="gpt-oss-20b", precision="fp4"), "3 experts"),
        (
            {**workers((1, 1, 1, 0), (1, 1, 1, 0)), "model_path": "gpt-oss-20b"},
            "4 experts, prefill and decode workers",
        ),
        (
            workers((1, 1, 1, 0), (1, 1, 1, 0)),
            "5 dense, prefill and decode workers",
        ),
    ],
)
def test_what_a_simulator_must_know_for_a_row(tmp_path, row, kind):
    read = read_one(tmp_path, row)
    one = SimulatedRow(row=read, simulated=None)
    assert list(grouped([one], "kind")) == [kind]
    doubtful = dataclasses.replace(read, may_speculate=True)
    (other,) = grouped([dataclasses.replace(one, row=doubtful)], "kind")
    assert other == "6 one token a step or several, not marked"


def test_a_skipped_row_has_no_errors(tmp_path):
    one = dataclasses.replace(found(tmp_path, 1, 1), simulated=None, skipped="why")
    with pytest.raises(RuntimeError, match="was skipped: why"):
        relative_error(one, "TPOT")
