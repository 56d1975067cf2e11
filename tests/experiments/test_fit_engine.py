"""`experiments.fit_engine` on rows of an engine whose factors are known."""

import dataclasses
import itertools
import json

import pytest

from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.engines import get_engine
from disagg_jax.sim.engines.profile import to_json
from experiments.measured.engines import STARTS
from tests.commands import run_command
from tests.experiments.measured.measurements import (
    fields,
    measured_by,
    workers,
    write,
)

KNOWN = dataclasses.replace(
    STARTS["vllm"],
    factors=EngineFactors(
        linear=0.8,
        attention=1.2,
        kv=1.4,
        reduce=1.5,
        layer_s=2e-5,
        kv_layer_s=1e-5,
        sequence_s=2e-5,
        step_s=1.5e-3,
    ),
    first_token_steps=2.0,
)


def grid(version=""):
    """Rows that differ in the model, tp, the clients and the lengths."""
    sizes = (("llama-3.1-8b", 1), ("llama-3.1-8b", 4), ("qwen3-32b", 2))
    sizes += (("qwen3-32b", 8),)
    lengths = ((6000, 16), (128, 48), (1024, 128))
    return [
        fields(
            f"{model}-{tp}-{clients}-{isl}-{version}",
            backend_version=version,
            model_path=model,
            tp_size=tp,
            concurrency=clients,
            isl=isl,
            osl=osl,
        )
        for (model, tp), clients, (isl, osl) in itertools.product(
            sizes, (1, 16, 128), lengths
        )
    ]


def few(version, **changes):
    """Four rows of a version."""
    return [
        fields(f"{version}-{n}-{tp}", n, tp_size=tp, backend_version=version, **changes)
        for n, tp in itertools.product((1, 4), (1, 2))
    ]


def run(path, out, *args, engine="vllm"):
    flags = (f"--rows={path}", f"--engine={engine}", f"--out={out}", "--workers=1")
    return run_command("fit_engine", *flags, *args)


def test_the_factors_of_an_engine_are_found_again(tmp_path):
    other = fields("other", backend="sglang"), workers((1, 1, 1, 0), (1, 1, 1, 0))
    rows = measured_by(KNOWN, tmp_path, *grid())
    path = write(tmp_path / "rows.csv", *rows, *other)
    out = tmp_path / "mine.json"
    done = run(path, out)
    assert done.returncode == 0, done.stderr
    found = get_engine(str(out))
    assert (found.name, found.engine, found.system) == ("mine", "vllm", "vllm_v1")
    assert (found.versions, found.is_default) == ((), True)
    ours, known = found.factors, KNOWN.factors
    # The prior, 1 and no overhead, weighs as half a percent of the rows, which tell
    # most terms apart.
    for name in ("linear", "attention", "reduce", "step_s"):
        assert getattr(ours, name) == pytest.approx(getattr(known, name), rel=0.05)
    assert ours.kv == pytest.approx(1.4, rel=0.1)
    # All but steps without a decode have both of these.
    assert ours.layer_s + ours.kv_layer_s == pytest.approx(3e-5, rel=0.05)
    # Many sequences come with much KV.
    assert ours.sequence_s == pytest.approx(2e-5, rel=0.3)
    assert found.first_token_steps == pytest.approx(2, abs=0.1)
    for name in ("experts", "expanded", "exchange"):  # of which no row has any
        assert getattr(ours, name) == pytest.approx(1)
    every, *cells = found.errors
    assert every.rows == len(rows) == sum(cell.rows for cell in cells)
    assert max(every.tpot, every.ttft, every.latency) < 0.02
    left_out = found.provenance["left_out"]
    assert set(left_out) == {"parallelism", "clients", "lengths", "model"}
    assert f"mine: fitted to {len(rows)} rows" in done.stdout
    assert "step_s" in done.stdout and "first token" in done.stdout
    for name in ("parallelism", "clients", "lengths", "model"):
        assert name in done.stdout
    record = json.loads(out.read_text())
    assert record["provenance"]["command"] == "python -m experiments.fit_engine"
    assert record["provenance"]["asked"]["engine"] == "vllm"


def test_versions_are_fitted_apart(tmp_path):
    slow = dataclasses.replace(KNOWN, factors=EngineFactors(step_s=5e-3))
    rows = measured_by(KNOWN, tmp_path, *few("0.12.1"))
    rows += measured_by(slow, tmp_path, *few("0.15"))
    path = write(tmp_path / "rows.csv", *rows)
    near = tmp_path / "near.json"
    close = dataclasses.replace(KNOWN.factors, experts=1.7)
    near.write_text(json.dumps(to_json(dataclasses.replace(KNOWN, factors=close))))
    one, rest = tmp_path / "one.json", tmp_path / "rest.json"
    done = run(path, one, "--version=0.12", f"--near={near}")
    assert done.returncode == 0, done.stderr
    found = get_engine(str(one))
    assert (found.versions, found.is_default) == (("0.12",), False)
    assert found.provenance["versions"] == ["0.12.1"]
    # Its own rows agree with the profile that it is near.
    assert found.factors.step_s == pytest.approx(1.5e-3, rel=0.01)
    assert found.factors.experts == pytest.approx(1.7)
    done = run(path, rest, "--without=0.12")
    assert done.returncode == 0, done.stderr
    others = get_engine(str(rest))
    assert (others.versions, others.is_default) == ((), True)
    assert others.provenance["versions"] == ["0.15"]
    # Rows of one model do not tell a step from its 32 layers.
    ours = others.factors
    host_s = ours.step_s + 32 * (ours.layer_s + ours.kv_layer_s)
    assert host_s == pytest.approx(5e-3, rel=0.1)
    done = run(path, one, "--version=0.12", "--default")
    assert get_engine(str(one)).is_default


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"out": "mine.txt"}, "--out: expected a .json file, got 'mine.txt'"),
        (
            {"engine": "sglang"},
            "--rows: expected colocated rows of sglang, got []",
        ),
        (
            {"version": "0.11"},
            "--rows: expected colocated rows of vllm 0.11, got ['0.12.1']",
        ),
        ({"near": "sglang-0.5"}, "--near: expected a profile of vllm, got 'sglang'"),
        ({"near": "vllm-7"}, "engine: expected one of"),
        ({"engine": "orca"}, "engine"),
    ],
)
def test_what_cannot_be_fitted_is_refused(tmp_path, flags, said):
    given = {
        "rows": str(write(tmp_path / "rows.csv", *few("0.12.1"))),
        "out": str(tmp_path / "out.json"),
        "engine": "vllm",
        **flags,
    }
    done = run_command("fit_engine", *(f"--{k}={v}" for k, v in given.items()))
    assert done.returncode == 1 and said in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_rows_that_no_device_can_have_are_not_fitted(tmp_path):
    path = write(tmp_path / "rows.csv", *few("0.12.1", silicon_tpot_ms=0.01))
    done = run(path, tmp_path / "out.json")
    assert done.returncode == 1
    assert "rows: expected at least one, got 0" in done.stderr
