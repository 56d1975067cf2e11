"""`experiments.simulate`: DistServe's simulator request by request, and its inputs."""

import csv
import dataclasses
import json
import math
import pathlib
import re
import subprocess

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import tpot_s, ttft_s
from disagg_jax.request import Status
from disagg_jax.scheduling import get_system
from disagg_jax.sim.engines import get_engine
from disagg_jax.sim.engines.profile import to_json
from disagg_jax.sim.hardware.link import get_link
from disagg_jax.workload import RandomWorkload
from experiments.configs.named_simulations import (
    SIMULATIONS,
    get_simulation,
    trace_requests,
)
from experiments.simulated.files import STAGES
from models.lookup import find_model
from tests.commands import run_command

# File of simdistserve's results (its settings are in the name) -> the same deployment.
RUNS = {
    "fixed512x64__disagg-p11-d11__rate4": "prefill:tp1,decode:tp1",
    "fixed512x64__vllm-11__rate2": "colocated:tp1",
    "sharegptlike__disagg-p11-d11__rate5": "prefill:tp1,decode:tp1",
    "sharegptlike__disagg-p21-d11__rate3": "prefill:tp2,decode:tp1",
}


@pytest.mark.parametrize("name", RUNS)
def test_every_request_as_in_simdistserve(name, shared_dir):
    path = shared_dir / "golden" / "simdistserve" / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"needs {path}, simdistserve's results")
    with path.open() as file:
        theirs = list(csv.DictReader(file))
    simulation = get_simulation("simdistserve_opt13b")
    simulated = simulation.build(Deployment.parse(RUNS[name]))
    run = simulated.run(trace_requests(str(path), simulation))
    assert len(run.timelines) == len(theirs)
    for timeline, row in zip(run.timelines, theirs, strict=True):
        # Theirs has 9 decimals of a ms, and adds up hundreds of times.
        assert math.isclose(
            ttft_s(timeline) * 1000, float(row["ttft_ms"]), rel_tol=0, abs_tol=1e-6
        )
        assert math.isclose(
            tpot_s(timeline) * 1000, float(row["tpot_ms"]), rel_tol=0, abs_tol=1e-6
        )


HEADER = "req_id,arrival_ms,prompt_len,output_len\n"
TRACE = HEADER + "0,0.0,512,64\n1,250.5,100,0\n2,300,100,3\n"


TICKS = "arrival_s,prompt_tokens,output_tokens\n" + "".join(
    f"{3 * (i // 3)},100,5\n" for i in range(6)
)


WORKLOAD = {"trace": None, "workload": "uniform:100:200,fixed:4"}


def arrivals_s(out):
    with (out / "requests.csv").open() as file:
        return [float(row["arrival_s"]) for row in csv.DictReader(file)]


def command(tmp_path, **flags) -> subprocess.CompletedProcess[str]:
    (tmp_path / "trace.csv").write_text(TRACE)
    values = {
        "trace": tmp_path / "trace.csv",
        "config": "simdistserve_opt13b",
        "deployment": "prefill:tp1,decode:tp1",
        "out": tmp_path / "out",
        **flags,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return run_command(
        "simulate", *(f"--{name}={value}" for name, value in given.items())
    )


def test_a_row_for_each_request_with_floats_in_full(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 rows without tokens are left out" in done.stderr
    assert "unequal engines" in done.stdout  # simdistserve's two profiles
    with (tmp_path / "out" / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    simulation = get_simulation("simdistserve_opt13b")
    deployment = Deployment.parse("prefill:tp1,decode:tp1")
    requests = trace_requests(str(tmp_path / "trace.csv"), simulation)
    timelines = simulation.build(deployment).run(requests).timelines
    assert [float(row["ttft_s"]) for row in rows] == [ttft_s(t) for t in timelines]
    assert [float(row["tpot_s"]) for row in rows] == [tpot_s(t) for t in timelines]
    assert [float(row["arrival_s"]) for row in rows] == [0.0, 0.3]
    assert [row["output_tokens"] for row in rows] == ["64", "3"]  # as in the trace
    assert [row["good"] for row in rows] == ["1", "1"]  # as there are no targets
    # Facts, distserve.md 2.1: one prompt of 512 alone.
    assert math.isclose(float(rows[0]["ttft_s"]), 0.07519988, abs_tol=1e-8)
    stages = [float(rows[0][name]) for name in STAGES]
    e2e_s = float(rows[0]["ttft_s"]) + 64 * float(rows[0]["tpot_s"])
    assert math.isclose(sum(stages), e2e_s, rel_tol=1e-12)


def test_another_runs_results_stay_and_the_same_run_may_come_again(tmp_path):
    first = command(tmp_path)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["deployment"] == "prefill:tp1,decode:tp1"
    assert config["config"] == "simdistserve_opt13b"
    rows = (out / "requests.csv").read_bytes()
    (start,) = json.loads((out / "env.json").read_text())
    assert any("--deployment=prefill:tp1" in word for word in start["command"])
    for change, differs in (
        ({"deployment": "colocated:tp1"}, "deployment"),
        ({"streamed_groups": 2}, "simulation.streamed_groups"),
    ):
        other = command(tmp_path, **change)
        assert other.returncode == 1
        assert f"holds a run of another config ({differs})" in other.stderr
        assert (out / "requests.csv").read_bytes() == rows
    again = command(tmp_path)
    assert again.returncode == 0, again.stderr
    assert (out / "requests.csv").read_bytes() == rows
    assert len(json.loads((out / "env.json").read_text())) == 2


def test_another_trace_under_the_same_name_is_another_run(tmp_path, monkeypatch):
    assert command(tmp_path).returncode == 0
    monkeypatch.setitem(globals(), "TRACE", TRACE.replace("512,64", "512,65"))
    other = command(tmp_path)
    assert other.returncode == 1
    assert "another config (trace_sha256)" in other.stderr


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_said_and_the_requests_are_kept(tmp_path):
    done = command(tmp_path, chrome_trace="/dev/full")
    assert done.returncode == 1
    assert "error: no space left on the disk" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "requests.csv").exists()


def test_the_run_as_a_timeline(tmp_path):
    path = tmp_path / "trace.json"
    done = command(tmp_path, chrome_trace=path)
    assert done.returncode == 0, done.stderr
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"devices", "links", "requests"}
    lanes = {e["tid"] for e in events if e["name"] == "thread_name"}
    assert {e["tid"] for e in events if e["ph"] == "X"} <= lanes
    # All that is drawn is there by the end of the last request, in microseconds.
    text = (tmp_path / "out" / "requests.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    served = [row for row in rows if row["ttft_s"]]
    ends_s = [
        float(row["arrival_s"])
        + float(row["ttft_s"])
        + float(row["tpot_s"]) * int(row["output_tokens"])
        for row in served
    ]
    last_us = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert last_us == pytest.approx(max(ends_s) * 1e6, abs=1)


@pytest.mark.parametrize(
    ("groups", "deployment", "message"),
    [
        (41, "prefill:tp1,decode:tp1", "expected 0 to 40, the model's layers, got 41"),
        (
            2,
            "2xcolocated:tp1",
            "expected prefill and decode instances, got --deployment=2xcolocated:tp1",
        ),
    ],
)
def test_groups_that_cannot_be_streamed_are_refused(
    groups, deployment, message, tmp_path
):
    done = command(
        tmp_path, config="opt13b_a100", streamed_groups=groups, deployment=deployment
    )
    assert done.returncode == 1
    assert f"streamed_groups: {message}" in " ".join(done.stderr.split())


@pytest.mark.parametrize("groups", [0, 1, 4])
def test_of_streamed_groups_only_the_last_is_seen(groups, tmp_path):
    done = command(tmp_path, config="opt13b_a100", streamed_groups=groups)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "requests.csv").open() as file:
        first, _ = csv.DictReader(file)  # 512 prompt tokens
    size = 512 * find_model("opt-13b").kv_bytes_per_token
    seen_s = get_link("nvlink-a100").transfer_s(size / max(1, groups))
    assert math.isclose(float(first["transfer_s"]), seen_s, rel_tol=1e-12)


def test_how_the_trace_was_read_is_shown_and_kept(tmp_path):
    (tmp_path / "ticks.csv").write_text(TICKS)
    done = command(tmp_path, trace=tmp_path / "ticks.csv")
    assert done.returncode == 0, done.stderr
    assert (
        "columns format, 6 rows, times in s; its clock ticks every 3 s" in done.stdout
    )
    facts = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert (facts["format"], facts["tick_s"], facts["ties"]) == ("columns", 3, "spread")
    assert arrivals_s(tmp_path / "out") == [0, 1, 2, 3, 4, 5]
    kept = tmp_path / "kept"
    done = command(tmp_path, trace=tmp_path / "ticks.csv", ties="keep", out=kept)
    assert done.returncode == 0, done.stderr
    assert arrivals_s(kept) == [0, 0, 0, 3, 3, 3]


def test_a_trace_without_times_takes_a_rate(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n9,5\n8,4\n7,3\n")
    done = command(tmp_path, trace=path)
    assert "--rate: expected requests/s, as" in done.stderr
    assert command(tmp_path, trace=path, rate=2.0).returncode == 0
    assert len(set(arrivals_s(tmp_path / "out"))) == 3


def test_a_rate_stretches_the_time_of_a_trace(tmp_path):
    assert command(tmp_path, rate=0.5).returncode == 0
    assert arrivals_s(tmp_path / "out") == [0, 2]


def test_the_context_limit_can_be_raised(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(HEADER + "0,0,3000,5\n1,500,100,5\n")
    flags = {"trace": path, "config": "opt13b_a100"}
    assert "2 requests, 1 refused: 1 by context" in command(tmp_path, **flags).stdout
    raised = command(tmp_path, **flags, max_context=3005, out=tmp_path / "raised")
    assert "2 requests, 0 refused\n" in raised.stdout
    assert raised.returncode == 0


@pytest.mark.parametrize(("short", "code"), [(99, 0), (98, 3), (0, 3)])
def test_more_than_one_in_a_hundred_refused_is_an_exit_code(tmp_path, short, code):
    """The files are there all the same, also where nobody was served."""
    path = tmp_path / "long.csv"
    prompts = [100] * short + [3000] * (100 - short)
    path.write_text(HEADER + "".join(f"{i},{i},{p},2\n" for i, p in enumerate(prompts)))
    flags = {"trace": path, "config": "opt13b_a100", "slo": "0.5,0.1"}
    done = command(tmp_path, **flags)
    assert done.returncode == code, done.stderr
    assert ("--max_context=3002 has room" in done.stderr) == (code == 3)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["completed"], summary["failed"]) == (short, 100 - short)
    assert summary["refused"] == {"context": 100 - short, "KV memory": 0}
    assert summary["attainment"] <= short / 100
    rows = csv.DictReader((out / "requests.csv").read_text().splitlines())
    good = [int(row["good"]) for row in rows]
    assert sum(good) / len(good) == summary["attainment"]
    assert (out / "latencies.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "requests.csv").read_text().splitlines()) == 101
    if code:
        allowed = command(tmp_path, **flags, allow_refused=True)
        assert (allowed.returncode, allowed.stdout) == (0, done.stdout)
        assert allowed.stderr == f"{out}: 1 of 1 runs found\n"


def test_a_workload_is_drawn_and_served(tmp_path):
    done = command(tmp_path, **WORKLOAD, rate=5, num_requests=50, slo="10,1")
    assert done.returncode == 0, done.stderr
    assert "50 requests, 0 refused" in done.stdout
    assert "attainment: both / TTFT / TPOT  100.0% / 100.0% / 100.0%" in done.stdout
    out = tmp_path / "out"
    drawn = RandomWorkload.parse("uniform:100:200", "fixed:4").requests(50, 5.0, 0)
    assert arrivals_s(out) == [request.arrival_s for request in drawn]
    # simdistserve generates one token more, which the file does not count.
    text = (out / "requests.csv").read_text()
    assert {row["output_tokens"] for row in csv.DictReader(text.splitlines())} == {"4"}
    assert not (out / "trace.json").exists()
    other = command(tmp_path, **WORKLOAD, rate=5, num_requests=50, slo="10,1", seed=1)
    assert "another config (seed)" in other.stderr


def test_several_rates_and_deployments_make_a_table_and_a_curve(tmp_path):
    apart, together = "prefill:tp1,decode:tp1", "colocated:tp1"
    flags = {**WORKLOAD, "num_requests": 5, "deployment": f"{apart};{together}"}
    done = command(tmp_path, **flags, rate="2,4")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert (out / "table.txt").read_text() in done.stdout
    rows = (out / "table.txt").read_text().splitlines()[-5:-1]  # then the engines' mark
    assert [row.split()[:4] for row in rows] == [
        *([apart, "disaggregated", "2", "2"], [apart, "disaggregated", "2", "4"]),
        *([together, "vllm_v0", "1", "2"], [together, "vllm_v0", "1", "4"]),
    ]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    runs = [path for path in out.iterdir() if path.is_dir()]
    assert {path.name for path in runs} == {
        *("prefill-tp1_decode-tp1_2.0rps", "prefill-tp1_decode-tp1_4.0rps"),
        *("colocated-tp1_2.0rps", "colocated-tp1_4.0rps"),
    }
    for path in runs:
        files = {file.name for file in path.iterdir()}
        assert files == {"requests.csv", "summary.json", "latencies.png"}


def test_of_several_runs_those_that_are_done_are_read(tmp_path):
    """One run lacks its summary, as after a kill: it alone is simulated again."""
    flags = {**WORKLOAD, "num_requests": 5, "deployment": "colocated:tp1"}
    done = command(tmp_path, **flags, rate="2,4,8")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    want = {path: path.read_bytes() for path in out.rglob("*.[ctj][sxp]*")}
    lost = out / "colocated-tp1_4.0rps"
    for path in (lost / "summary.json", out / "table.txt"):
        path.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/requests.csv")}
    again = command(tmp_path, **flags, rate="2,4,8")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert f"{out}: 2 of 3 runs found\n" in again.stderr
    assert "0/1 runs, now colocated:tp1 (1 devices, vllm_v0) at 4 " in again.stderr
    env = out / "env.json"
    assert {p: p.read_bytes() for p in want if p != env} == {
        path: content for path, content in want.items() if path != env
    }
    for path, stamp in stamps.items():
        assert (path.stat().st_mtime_ns == stamp) == (path.parent != lost)


def test_a_timeline_needs_the_run_once_more(tmp_path):
    assert command(tmp_path).returncode == 0
    path = tmp_path / "trace.json"
    done = command(tmp_path, chrome_trace=path)
    assert "runs found" not in done.stderr
    assert json.loads(path.read_text())["traceEvents"]


def test_a_run_among_several_is_the_one_alone(tmp_path):
    flags = {**WORKLOAD, "num_requests": 20, "deployment": "colocated:tp1"}
    assert command(tmp_path, **flags, rate="2,4").returncode == 0
    alone = tmp_path / "alone"
    assert command(tmp_path, **flags, rate=4, out=alone).returncode == 0
    for name in ("requests.csv", "summary.json"):
        found = (tmp_path / "out" / "colocated-tp1_4.0rps" / name).read_bytes()
        assert found == (alone / name).read_bytes()


def test_a_link_of_ones_own_is_what_kv_takes(tmp_path):
    path = tmp_path / "slow.json"
    link = {"latency_s": 0.0, "bandwidth_bytes_s": 1e8, "efficiency": 0.5}
    path.write_text(json.dumps(link))
    done = command(tmp_path, config=None, model="opt-13b", link=path)
    assert done.returncode == 0, done.stderr
    assert f"KV over {path}" in done.stdout
    with (tmp_path / "out" / "requests.csv").open() as file:
        first, _ = csv.DictReader(file)
    seen_s = 512 * find_model("opt-13b").kv_bytes_per_token / 5e7
    assert math.isclose(float(first["transfer_s"]), seen_s, rel_tol=1e-12)
    path.write_text(json.dumps(link | {"efficiency": 1}))
    other = command(tmp_path, config=None, model="opt-13b", link=path)
    assert "another config (links.inside.efficiency)" in other.stderr


def test_a_device_of_ones_own_is_kept_with_the_run(tmp_path):
    path = tmp_path / "slow.json"
    path.write_text(json.dumps({"like": "h100", "peak_flops": 1e14}))
    flags = {"config": None, "hardware": path}
    done = command(tmp_path, **flags)
    assert done.returncode == 0, done.stderr
    assert "llama-3-8b by roofline/slow, KV over nvlink-h100" in done.stdout
    path.write_text(json.dumps({"like": "h100", "peak_flops": 2e14}))
    other = command(tmp_path, **flags)
    assert "another config (hardware.peak_flops, hardware.peak_f" in other.stderr
    path.write_text(json.dumps({"like": "h100", "flops": 2e14}))
    wrong = command(tmp_path, **flags)
    assert "expected 'like', a preset, and some of the numbers ['peak" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_of_several_systems_each_serves_its_roles(tmp_path):
    flags = {
        "config": "opt13b_a100",
        "deployment": "colocated:tp1;prefill:tp1,decode:tp1",
    }
    done = command(tmp_path, **flags, system="sarathi_serve,disaggregated")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = {r: p["type"] for r, p in config["simulation"]["policies"].items()}
    served = get_system("sarathi_serve") | get_system("disaggregated")
    assert kinds == {role.value: type(p).__name__ for role, p in served.items()}
    both = command(tmp_path, **flags, system="sarathi_serve,vllm_v0")
    assert "--system: expected systems of different roles" in both.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trace": "nowhere.csv"}, "nowhere.csv"),
        ({"deployment": "prefill:tp1"}, "prefill and decode instances need each other"),
        (
            {"deployment": "colocated:tp3"},
            "distserve-a100: expected one of [tp1, tp1pp2",
        ),
        ({"config": "gpt4"}, "opt13b_a100"),
        ({"trace": None}, "traffic: expected either --trace or --workload, got"),
        ({"workload": "sharegpt"}, "traffic: expected either --trace or --workload"),
        ({"trace": None, "workload": "sharegpt"}, "--rate: expected requests/s of"),
        ({"trace": None, "workload": "alpaca", "rate": 1}, "workload: expected one of"),
        ({"rate": "1,0"}, "--rate: expected different rates above 0 requests/s, got"),
        ({"rate": "2,2.0"}, "--rate: expected different rates above 0 requests/s"),
        ({"rate": "inf"}, "--rate: expected different rates above 0 requests/s, got"),
        ({"rate": "fast"}, "--rate: expected different rates above 0 requests/s"),
        ({"seed": 3}, "where --seed=3 has no effect"),
        ({"num_requests": 3}, "where --num_requests=3 has no effect"),
        (WORKLOAD | {"rate": 1, "ties": "keep"}, "where --ties=keep has no effect"),
        (WORKLOAD | {"rate": 1, "burstiness": 2}, "burstiness: expected 1 unless"),
        ({"rate": "1,2", "chrome_trace": "nowhere/x"}, "expected one rate and one dep"),
        ({"deployment": "colocated:tp1;colocated:tp1"}, "--deployment: expected diff"),
        ({"config": None, "link": "11gb"}, "link: expected one of ['100gb', '10gb',"),
        ({"slo": "1"}, "slo: expected TTFT_S,TPOT_S, got '1'"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, change, message):
    done = command(tmp_path, **change)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ("a,b\n1,2\n", "line 1: expected a header with one of arrival_s/arrival_ms"),
        (HEADER + "0,0,5,5\n1,x,5,5\n", "line 3: expected a finite time"),
        (HEADER + "0,9,5,5\n1,3,5,5\n", "line 3: expected a time not before"),
        (HEADER, "expected at least one row, got none"),
    ],
)
def test_a_malformed_trace_is_named_with_its_line(tmp_path, trace, message):
    (tmp_path / "trace.csv").write_text(trace)
    with pytest.raises(ValueError, match=re.escape(message)):
        trace_requests(str(tmp_path / "trace.csv"), get_simulation("opt13b_a100"))


@pytest.mark.parametrize("name", SIMULATIONS)
def test_every_named_simulation_serves(tmp_path, name):
    (tmp_path / "trace.csv").write_text(TRACE)
    simulation = get_simulation(name)
    deployment = Deployment.parse("prefill:tp8,decode:tp8")
    if simulation.cost.name.startswith("fitted"):
        tp = 8 if simulation.model.name == "opt-66b" else 4
        deployment = Deployment.parse(f"prefill:tp{tp},decode:tp{tp}")
    requests = trace_requests(str(tmp_path / "trace.csv"), simulation)
    run = simulation.build(deployment).run(requests)
    assert [t.status for t in run.timelines] == [Status.FINISHED] * 2


# -- engines ---------------------------------------------------------------------------


def with_engine(tmp_path, name, **flags):
    changes = {"config": None, "hardware": "h100", "rate": 5, "num_requests": 8}
    done = command(tmp_path, **WORKLOAD, **changes, out=tmp_path / name, **flags)
    assert done.returncode == 0, done.stderr
    return done.stdout, tmp_path / name


def test_an_engine_and_how_far_it_was_checked_are_said_once(tmp_path):
    for name, engine, said in (
        ("none", None, "engine none: not checked"),
        ("vllm", "vllm", get_engine("vllm").checked("llama-3-8b", "h100", "bf16")),
    ):
        text, out = with_engine(tmp_path, name, engine=engine)
        assert text.count(said) == text.count("engine ") == 1
        assert json.loads((out / "summary.json").read_text())["checked"] == said
    assert "disaggregated) at" in text  # the system, with other limits


def test_of_an_engine_the_content_is_recorded(tmp_path):
    """So a file that changed under its name is another config."""
    path = tmp_path / "mine.json"
    profile = dataclasses.replace(get_engine("vllm"), name="mine")
    path.write_text(json.dumps(to_json(profile)))
    _, a = with_engine(tmp_path, "a", engine=path)
    path.write_text(json.dumps(to_json(dataclasses.replace(profile, token_budget=512))))
    _, b = with_engine(tmp_path, "b", engine=path, max_context=4096)
    text = run_command("compare_runs", str(a), str(b)).stdout
    assert re.search(r"engine.token_budget +8192 +512\n", text)
    assert "goodputs: none in A, a run of another command" in text
    _, plain = with_engine(tmp_path, "plain")
    assert "engine" not in json.loads((plain / "config.json").read_text())
