"""The main job from end to end, on a workload of seconds."""

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import re
import shutil
import sys
import types

import jax
import pytest

from disagg_jax import metrics
from disagg_jax.calibration.step_times import StepTimes
from disagg_jax.deployment import Role
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.engine.step_durations import StepDurations
from disagg_jax.metrics import criteria, find_inversion
from disagg_jax.request import Request, Timeline
from disagg_jax.runlog.event_log import replay
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.hardware.link import get_link
from experiments import goodput_sweep, one_request
from experiments.configs.named import CONFIGS, get_config
from experiments.configs.override import override
from experiments.runs.folder import differences
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import Point, SavedRun
from experiments.sweep import report, serving
from experiments.sweep import summary as summaries
from experiments.sweep.hardware import Question
from experiments.sweep.serving import load_model
from tests.commands import run_command

ROOT = pathlib.Path(__file__).parents[2]
# As few programs as possible: compiling is most of the time.
SMALL = [
    "workload.num_requests=6",
    "workload.prompt_tokens=uniform:2:20",
    "workload.output_tokens=uniform:1:6",
    "memory.max_context=32",
    "memory.tokens_per_device=256",
    "rates=50,5000",
    "systems.vllm_v0.policies.colocated.max_seqs=2",
    "systems.vllm_v0.policies.colocated.max_batched_tokens=32",
    "systems.disaggregated.policies.prefill.max_seqs=2",
    "systems.disaggregated.policies.prefill.token_budget=32",
    "systems.disaggregated.policies.decode.max_seqs=2",
]


def config(*changes):
    return override(get_config("smoke"), [*SMALL, *changes])


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """The runs here share weights and programs: compiling is most of their time."""
    models, made = {}, collections.defaultdict(dict)

    def load(config):
        key = config.model, config.weights, config.seed
        if key not in models:
            models[key] = load_model(config)
        return models[key]

    def build(config, model):
        return serving.build_engines(config, model, made[id(model)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goodput_sweep, "load_model", load)
        patch.setattr(goodput_sweep, "build_engines", build)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run directory."""
    out = tmp_path_factory.mktemp("runs") / "first"
    goodput_sweep.run(config(), out, None)
    return out


def test_the_run_directory_is_complete(first):
    names = {path.name for path in first.iterdir()}
    assert names >= {
        "config.json",
        "env.json",
        "step_times.json",
        "requests.jsonl",
        "summary.json",
        "attainment.png",
        "table.txt",
    }
    rows = [
        json.loads(line) for line in (first / "requests.jsonl").read_text().splitlines()
    ]
    # 2 systems x 2 rates x 2 seeds x 6 requests
    assert len(rows) == 48
    assert {row["status"] for row in rows} == {"finished"}


def test_the_documents_example_reads_it(first, tmp_path, monkeypatch):
    """experiments/README.md, "Results into numpy", as it is printed."""
    text = (ROOT / "experiments" / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smoke").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_equal_step_times_give_equal_bytes(first, tmp_path):
    goodput_sweep.run(config(), tmp_path, str(first / "step_times.json"))
    for name in ("summary.json", "requests.jsonl", "table.txt"):
        assert (tmp_path / name).read_bytes() == (first / name).read_bytes()


def test_a_killed_run_resumes_without_losing_or_repeating_a_point(first, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(first, out)
    lost = sorted((out / "points").glob("disaggregated-10000*.json"))
    kept = sorted(set((out / "points").glob("*.json")) - set(lost))
    assert lost and kept
    stamps = [path.stat().st_mtime_ns for path in kept]
    for path in [*lost, out / "summary.json", out / "requests.jsonl"]:
        path.unlink()
    goodput_sweep.run(config(), out, None)
    want = (first / "summary.json").read_bytes()
    assert (out / "summary.json").read_bytes() == want
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    assert len((out / "requests.jsonl").read_text().splitlines()) == 48


def refuse(*args, **named):
    raise AssertionError("this was not to be asked for")


def test_a_run_that_has_ended_is_shown_without_model_or_devices(
    first, monkeypatch, capsys
):
    for module, name in (
        *((jax, name) for name in ("devices", "default_backend")),
        *((goodput_sweep, name) for name in ("load_model", "build_engines")),
    ):
        monkeypatch.setattr(module, name, refuse)
    starts = (first / "env.json").read_bytes()
    table = goodput_sweep.run(config(), first, None)
    assert "this run has ended; nothing is run" in capsys.readouterr().err
    assert table + "\n" == (first / "table.txt").read_text()
    assert (first / "env.json").read_bytes() == starts
    with pytest.raises(AssertionError, match="not to be asked for"):
        goodput_sweep.run(config("seed=1"), first, None)


def test_a_resumed_run_says_what_it_found_and_compiles_only_what_is_to_run(
    first, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "resumed"
    shutil.copytree(first, out)
    (out / "summary.json").unlink()
    with monkeypatch.context() as without:
        without.setattr(Engine, "compile", refuse)
        table = goodput_sweep.run(config(), out, None)
    assert "8 of 8 points found" in capsys.readouterr().err
    assert table + "\n" == (first / "table.txt").read_text()
    (out / "summary.json").unlink()
    (out / "points" / "vllm_v0-100.0rps-1.json").unlink()
    compiled = []
    monkeypatch.setattr(goodput_sweep, "build_engines", serving.build_engines)
    monkeypatch.setattr(
        goodput_sweep, "compile_engines", lambda engines, _: compiled.extend(engines)
    )
    with pytest.raises(ValueError, match="no such program was compiled"):
        goodput_sweep.run(config(), out, None)
    assert compiled == ["vllm_v0"]
    assert "7 of 8 points found" in capsys.readouterr().err


@dataclasses.dataclass
class Rates:
    """A deadline that comes after so many rates."""

    left: int

    def passed(self):
        self.left -= 1
        return self.left < 0


def test_a_run_whose_time_is_spent_goes_on_and_ends_as_one_without_a_limit(
    first, tmp_path
):
    out, times = tmp_path / "limited", str(first / "step_times.json")
    text = goodput_sweep.run(config(), out, times, deadline=Rates(0))
    assert text.startswith("--minutes are spent before any system") and ": 0 " in text
    assert not (out / "summary.json").exists()
    text = goodput_sweep.run(config(), out, times, deadline=Rates(3))
    assert "goes on with the look after 2 seeds at disaggregated" in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["missing"] == ["the look after 2 seeds at disaggregated"]
    goodput_sweep.run(config(), out, times)
    for name in ("summary.json", "requests.jsonl"):
        assert (out / name).read_bytes() == (first / name).read_bytes()


def test_the_second_table_is_made_once_and_left_out_where_asked(
    first, tmp_path, monkeypatch
):
    out, times = tmp_path / "both", str(first / "step_times.json")
    short = {"num_requests": 20, "max_requests": 20, "seeds": 2}
    question = Question(workload="fixed:64x8", **short)
    small = functools.partial(goodput_sweep.hardware_table, question=question)
    asked, title = config("hardware_table=true"), "the same systems on 4 x h100"

    class BeforeIt(Rates):
        """Is passed when nothing but the second table is left."""

        def passed(self):
            return len(list((out / "points").glob("*.json"))) == 8

    # Without time for it the run is not finished, and goes on with it.
    monkeypatch.setattr(goodput_sweep, "hardware_table", refuse)
    text = goodput_sweep.run(asked, out, times, deadline=BeforeIt(0))
    assert "goes on with" in text and "the systems on other hardware" in text
    assert title not in text
    monkeypatch.setattr(goodput_sweep, "hardware_table", small)
    text = goodput_sweep.run(asked, out, times)
    assert title in text and "not checked" not in text
    summary = json.loads((out / "summary.json").read_text())
    of_table = summary.pop("hardware_table")
    assert list(of_table["targets"]) == [""]
    # The first table is that of a run without the second.
    assert summary == json.loads((first / "summary.json").read_text())
    assert text.startswith((first / "table.txt").read_text().rstrip("\n"))
    # A run that has ended shows it, and one that lost its table writes it again.
    monkeypatch.setattr(goodput_sweep, "hardware_table", refuse)
    assert goodput_sweep.run(asked, out, times) == text
    (out / "table.txt").unlink()
    assert goodput_sweep.run(asked, out, times) == text
    # By default no config but the main job's has it.
    assert [n for n in CONFIGS if get_config(n).hardware_table] == ["tiny"]
    without = override(get_config("tiny"), ["hardware_table=false"])
    assert not without.has_hardware_table


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "1 of 8 points found"),
        (["first_seeds=1"], "1 of at most 8 points found"),
        (["rates="], "1 points found; the search goes on from them"),
    ],
)
def test_the_points_found_are_of_those_that_are_known(tmp_path, changes, said):
    run_dir = RunDir(tmp_path, {})
    asked = config(*changes)
    assert goodput_sweep._found(asked, run_dir) == ""
    run_dir.save(Point("vllm_v0", 8.0, 0), {})
    assert goodput_sweep._found(asked, run_dir) == said


def test_a_trace_is_told_by_its_bytes(tmp_path):
    trace = tmp_path / "trace.csv"
    asked = override(get_config("azure_trace"), [f"workload.trace={trace}", "rates=1"])
    found = []
    for text in ("a", "a", "b"):
        trace.write_text(text)
        found.append(goodput_sweep._asked(asked, None)["trace_sha256"])
    assert found[0] == found[1] != found[2]
    trace.unlink()
    assert "trace_sha256" not in goodput_sweep._asked(asked, None)


def test_a_link_in_a_file_is_told_by_its_figures(tmp_path):
    """The path alone would not say that the file has changed."""
    path = tmp_path / "mine.json"
    link = {"latency_s": 5e-5, "bandwidth_bytes_s": 1.25e9, "efficiency": 0.9}
    path.write_text(json.dumps(link))
    asked = goodput_sweep._asked(config(f"link={path}"), None)
    figures = {key: asked["link_figures"][key] for key in link}
    assert (asked["link"], figures) == (str(path), link)
    path.write_text(json.dumps(link | {"efficiency": 0.5}))
    changed = goodput_sweep._asked(config(f"link={path}"), None)
    (found,) = differences(asked, changed)
    assert (found.key, found.a, found.b) == ("link_figures.efficiency", 0.9, 0.5)
    assert "link_figures" not in goodput_sweep._asked(config("link=25gb"), None)


def test_systems_see_the_same_requests_and_generate_the_same_tokens(first):
    rows = [
        json.loads(line) for line in (first / "requests.jsonl").read_text().splitlines()
    ]

    def of(system):
        return [
            (row["rate_rps"], row["seed"], row["arrival_s"], row["tokens"])
            for row in rows
            if row["system"] == system
        ]

    assert of("vllm_v0") == of("disaggregated")
    assert any(row["transfer_bytes"] for row in rows if row["system"] != "vllm_v0")


def test_metrics_of_a_request_follow_from_its_token_times(first):
    for line in (first / "requests.jsonl").read_text().splitlines():
        row = json.loads(line)
        request = Request(
            id=0,
            arrival_s=row["arrival_s"],
            prompt_tokens=row["prompt_tokens"],
            max_tokens=row["output_tokens"],
        )
        timeline = Timeline(request=request, token_s=row["token_s"])
        assert row["ttft_s"] == metrics.ttft_s(timeline)
        assert row["tpot_s"] == metrics.tpot_s(timeline)


def test_every_event_log_replays_to_the_same_decisions(first):
    cfg = config()
    run_dir = SavedRun(first)
    model = load_model(cfg)
    for name, system in cfg.systems.items():
        engine = serving.build_engine(cfg, system, model, {})
        server = serving.serve_with(cfg, engine, system.policies, {})
        for rate in (100.0, 10000.0):
            lines = list(run_dir.events(Point(name, rate, 0)))
            assert lines
            assert list(replay(lines, server.controller())) == []


def test_a_run_ranks_its_systems_by_every_criterion(first):
    summary = json.loads((first / "summary.json").read_text())
    assert tuple(summary["criteria"]) == criteria.NAMES
    table = (first / "table.txt").read_text()
    for name, found in summary["criteria"].items():
        assert {row["system"] for row in found["rank"]} == {"vllm_v0", "disaggregated"}
        assert f"\n{name}" in table
    for system in summary["systems"].values():
        for point in system["points"]:
            assert point["criteria"]["distserve"] == point["attainment"]
    # What ranks by the criterion that was searched for is that goodput.
    for row in summary["criteria"]["distserve"]["rank"]:
        goodput = summary["systems"][row["system"]]["goodput"]
        found = goodput["goodput_rps_per_device"]["mean"]
        assert row["mean"] == pytest.approx(found)


def test_attainment_that_is_not_monotone_is_in_the_table(first):
    summary = json.loads((first / "summary.json").read_text())
    vllm, apart = (summary["systems"][n] for n in ("vllm_v0", "disaggregated"))
    found = find_inversion({20.0: [0.5, 0.42], 200.0: [1.0, 0.96]}, 0.9)
    vllm["goodput"]["inversion"] = inversion = summaries._inversion(found, 2)
    apart["goodput"]["inversion"] = None
    assert (inversion["fail_rps_per_device"], inversion["pass_score"]) == (10, 0.98)
    said = "attainment is not monotone in the rate: 46.0% at 10 requests/s per device"
    lines = report.table(summary).splitlines()
    (line,) = (line for line in lines if "not monotone in the rate" in line)
    assert line == f"vllm_v0: {said}, 98.0% at 100"
    vllm["goodput"]["inversion"] = None
    assert "not monotone in the rate" not in report.table(summary)


def test_scores_follow_from_the_token_times(first):
    run_dir = SavedRun(first)
    slo = json.loads((first / "summary.json").read_text())["slo"]
    runs = {}
    for line in (first / "requests.jsonl").read_text().splitlines():
        row = json.loads(line)
        point = Point(row["system"], row["rate_rps"], row["seed"])
        runs.setdefault(point, []).append(row)
    for point, rows in runs.items():
        score = run_dir.load(point)["criteria"]
        assert score["distserve"] == sum(row["good"] for row in rows) / len(rows)
        # Of up to 5 gaps, Mooncake's slowest tenth is the slowest.
        good = [
            row["ttft_s"] <= slo["ttft_s"] and slowest_s(row) <= slo["tpot_s"]
            for row in rows
        ]
        assert score["mooncake"] == sum(good) / len(good)
        tokens = sum(row["prompt_tokens"] + row["output_tokens"] for row in rows)
        end_s = max(row["token_s"][-1] for row in rows)
        seconds = end_s - min(row["arrival_s"] for row in rows)
        assert score["sarathi"] == pytest.approx(tokens / seconds / 1e3)


def test_slowdowns_are_over_the_first_systems_steps_alone():
    cfg = config("durations=modelled", "workload.output_tokens=fixed:1")
    engine = serving.build_engine(cfg, cfg.systems["vllm_v0"], load_model(cfg), {})
    cost = LinearCost(
        step_base_s=1.0, prefill_token_s=0.1, decode_token_s=0.01, context_token_s=1e-3
    )
    cfg = dataclasses.replace(cfg, cost=cost)
    durations = StepDurations(engine, serving.known_timing(cfg, engine, {}))

    def alone(prompt, output):
        request = Request(id=0, arrival_s=0.0, prompt_tokens=prompt, max_tokens=output)
        found = durations.alone(request)
        return found.ttft_s, found.tpot_s

    # 20 prompt tokens; later tokens at a context of 20 + 6 / 2.
    assert alone(20, 6) == pytest.approx((1 + 20 * 0.1, 1 + 0.01 + 23e-3))
    # The shortest there is: one prompt token, and no later one.
    assert alone(1, 1)[0] == pytest.approx(1.1)


def slowest_s(row):
    """The longest gap between two tokens; 0 of a single token."""
    gaps_s = [later - sooner for sooner, later in itertools.pairwise(row["token_s"])]
    return max(gaps_s, default=0.0)


@pytest.mark.parametrize("name", ["sarathi_serve", "fastgen"])
def test_the_sweep_searches_by_the_criterion_it_is_told(first, name, tmp_path):
    search = ["search.max_rates=4", "num_seeds=2", "rates=", f"criterion={name}"]
    times = str(first / "step_times.json")
    text = goodput_sweep.run(config(*search), tmp_path / "a", times)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (summary["criterion"], f"by {name}" in text) == (name, True)
    assert f"{name}: {summary['criteria'][name]['definition']}" in text
    assert f"\n{name} *," in text
    for system in summary["systems"].values():
        points = {p["rate_rps"]: p["criteria"][name]["mean"] for p in system["points"]}
        assert 2 <= len(points) <= 4
        if name == "fastgen":
            found = system["throughput"]["max_throughput_per_device"]["mean"]
            assert found == pytest.approx(max(points.values()) / system["devices"])
        else:
            assert summary["target"] == 0.99
            passed = system["goodput"]["pass_rps_per_device"]
            failed = system["goodput"]["fail_rps_per_device"]
            for bound, passes in ((passed, True), (failed, False)):
                if bound is not None:
                    rate = bound * system["devices"]
                    assert (points[rate] >= 0.99) == passes


def test_the_wall_clock_serves_too(tmp_path):
    cfg = config("clock=wall", "rates=50", "num_seeds=1")
    text = goodput_sweep.run(cfg, tmp_path, None)
    assert "clock: wall" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["durations"] == "live"


def test_tensor_parallel_host_devices_must_be_modelled(tmp_path):
    deployment = "systems.vllm_v0.deployment=2xcolocated:tp2"
    with pytest.raises(ValueError, match="must be modelled"):
        goodput_sweep.run(config(deployment), tmp_path / "a", None)
    assert not (tmp_path / "a").exists()
    text = goodput_sweep.run(
        config(deployment, "durations=modelled", "rates=50", "num_seeds=1"),
        tmp_path / "b",
        None,
    )
    assert "times come from a formula" in text
    # Nothing reads medians then, and no program is timed for them.
    assert not (tmp_path / "b" / "step_times.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("workload.prompt_tokens=fixed:31", "expected at most 32 tokens"),
        ("weights=/nowhere.gguf", "which does not exist"),
        ("memory.max_context=2048", "1024 tokens of model tiny"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        goodput_sweep.run(config(change), tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_workers_where_programs_run_everywhere_are_refused(tmp_path):
    expected = "--workers: expected executed=passing and durations=table, got .*=all"
    with pytest.raises(ValueError, match=expected):
        goodput_sweep.run(get_config("smoke"), tmp_path / "run", None, 2)
    assert not (tmp_path / "run").exists()


def test_step_times_of_other_programs_are_refused(first, tmp_path):
    content = json.loads((first / "step_times.json").read_text())
    for each in (content["seconds"], content["rounds"]):
        del each["tp1->tp1/transfer_1"]
    times = tmp_path / "step_times.json"
    times.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 are missing, such as 'tp1->tp1/transfer_1"):
        goodput_sweep.run(config(), tmp_path / "run", str(times))


def test_step_times_of_a_newer_format_are_refused_before_any_work(tmp_path):
    times = tmp_path / "step_times.json"
    times.write_text('{"format": 99, "seconds": {}}')
    with pytest.raises(ValueError, match="--step_times: .*format 3 to 3, .*got 99"):
        goodput_sweep.run(config(), tmp_path / "run", str(times))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}", '{"seconds": {"a": "soon"}}', '{"seconds": [1]}']
)
def test_what_is_no_step_times_is_named_before_any_work(content, tmp_path):
    times = tmp_path / "step_times.json"
    if content is not None:
        times.write_text(content)
    with pytest.raises(ValueError, match=f"--step_times: expected .*, got '{times}'"):
        goodput_sweep.run(config(), tmp_path / "run", str(times))
    assert not (tmp_path / "run").exists()


def test_what_became_of_a_trace_stands_in_all_that_is_shown(tmp_path):
    """Ticks, rows left out, and runs that share rows: two of 6, of 10 that fit."""
    rows = [f"{3 * (i // 4)},{2 + i},3" for i in range(10)]
    trace = tmp_path / "trace.csv"
    head = "arrival_s,prompt_tokens,output_tokens"
    trace.write_text("\n".join([head, *rows, "9,30,9", "9,1,0", ""]))
    lengths = [change for change in SMALL if "_tokens=uniform" not in change]
    source = ["workload.source=trace", f"workload.trace={trace}", "rates=50"]
    cfg = override(get_config("smoke"), [*lengths, *source])
    out = tmp_path / "out"
    table = goodput_sweep.run(cfg, out, None)
    said = [
        f"trace {trace}: columns format, 12 rows, times in s; its clock ticks every 3 "
        "s: 8 rows in the tick of the row above are spread evenly over it "
        "(ties=spread)",
        "1 of 12 rows are left out: no prompt or output tokens",
        "1 of 12 rows are left out: over 32 tokens (memory.max_context)",
    ]
    why = "2 runs x 6 requests share the 10 rows of the trace that fit, so they are no"
    assert all(f"\n{line}\n" in table for line in said)
    assert f"\nno intervals, and nothing resolved: {why}" in table
    assert " [" not in table  # no interval anywhere
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trace"]["said"] == said and summary["trace"]["tick_s"] == 3
    assert summary["no_intervals"].startswith(why)
    assert json.loads((out / "config.json").read_text())["trace"] == summary["trace"]
    intervals = [
        found
        for system in summary["systems"].values()
        for found in (
            system["goodput"]["goodput_rps_per_device"],
            *(point["attainment"] for point in system["points"]),
            *(score for p in system["points"] for score in p["criteria"].values()),
        )
    ]
    intervals += summary["ratios"].values()
    intervals += [row for each in summary["criteria"].values() for row in each["rank"]]
    assert intervals and {found["low"] for found in intervals} == {None}
    assert not any(s["goodput"]["resolved"] for s in summary["systems"].values())
    assert all(line in report.caption(summary) for line in said)  # of the picture


def test_a_malformed_trace_line_is_named(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,many,109\n"
    )
    given = ["workload.source=trace", f"workload.trace={trace}"]
    cfg = override(get_config("smoke"), given)
    with pytest.raises(ValueError, match="line 3"):
        goodput_sweep.run(cfg, tmp_path / "run", None)


def test_the_command_line_says_one_line_on_bad_flags(tmp_path):
    done = run_command("goodput_sweep", "--set", "seed=x")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: --set seed: expected int, got 'x'"
    )


# The systems of the main job, with as few programs as possible.
ALL_SYSTEMS = [
    *(change for change in SMALL if not change.startswith(("systems", "rates"))),
    "execute_all=false",
    "relaxed=0",
    "hardware_table=false",
    "num_seeds=1",
    "timing_repeats=2",
    "weights=random",  # as above, so with the same programs
    "systems.vllm_v0.policies.colocated.max_seqs=2",
    "systems.vllm_v0.policies.colocated.max_batched_tokens=32",
    "systems.vllm_v1.policies.colocated.max_seqs=2",
    "systems.vllm_v1.policies.colocated.max_batched_tokens=32",
    "systems.orca.policies.colocated.max_seqs=2",
    "systems.orca.policies.colocated.max_batched_tokens=30",
    "systems.sarathi.policies.colocated.max_seqs=2",
    "systems.sarathi.policies.colocated.chunk_tokens=32",
    "systems.sarathi_serve.policies.colocated.max_seqs=2",
    "systems.sarathi_serve.policies.colocated.token_budget=32",
    "systems.splitfuse.policies.colocated.max_seqs=2",
    "systems.splitfuse.policies.colocated.token_budget=32",
    "systems.disaggregated.policies.prefill.max_seqs=2",
    "systems.disaggregated.policies.prefill.token_budget=32",
    "systems.disaggregated.policies.decode.max_seqs=2",
]


@pytest.mark.slow  # compiles the programs of several systems
@pytest.mark.parametrize(
    "names",
    [
        ("vllm_v1", "sarathi_serve"),
        ("disaggregated", "disaggregated_chunked"),
        ("orca", "own"),
        ("own", "disaggregated"),
    ],
)
def test_any_two_systems_run_side_by_side(names, tmp_path, monkeypatch):
    """Each on the instances of the config, and the first on others that are set."""
    own = {Role.COLOCATED: RunningFirst(max_batched_tokens=32, max_seqs=2)}
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(own=own))
    chosen = ["mine:own" if name == "own" else name for name in names]
    base = config("durations=modelled").with_systems(chosen)
    alone = "prefill:tp1,2xdecode:tp1" if "disagg" in chosen[0] else "3xcolocated:tp1"
    changed = override(base, [f"systems.{chosen[0]}.deployment={alone}"])
    table = goodput_sweep.run(changed, tmp_path / "out", None)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["systems"]) == chosen
    assert summary["systems"][chosen[0]]["deployment"] == alone
    assert list(summary["ratios"]) == [f"{chosen[1]}/{chosen[0]}"]
    assert f"goodput {chosen[1]}/{chosen[0]}, paired by seed" in table


# -- parallelism, links and streams ----------------------------------------------------

FOUND = {
    "flags": {"model": "tiny"},
    "high": {"system": "disaggregated", "deployment": "prefill:tp1pp2,decode:tp1"},
    "joint": {"system": "vllm", "deployment": "2xcolocated:tp1"},
    "wall_s": 1.0,
}


def test_the_answer_of_a_placement_search_runs_beside_the_systems(tmp_path):
    """On pipeline stages too: the same tokens, with the parameters of its system."""
    placed = config("rates=20").with_placements(FOUND)
    assert list(placed.systems) == [
        *("vllm_v0", "disaggregated", "placed_high", "placed_joint")
    ]
    own = placed.systems["disaggregated"]
    assert placed.systems["placed_high"].policies == own.policies
    systems = {name: placed.systems[name] for name in ("disaggregated", "placed_high")}
    goodput_sweep.run(dataclasses.replace(placed, systems=systems), tmp_path, None)
    rows = [
        json.loads(line)
        for line in (tmp_path / "requests.jsonl").read_text().splitlines()
    ]
    tokens = {name: [] for name in systems}
    for row in rows:
        which = (row["seed"], row["request_id"])
        tokens[row["system"]].append((which, row["tokens"]))
    assert sorted(tokens["placed_high"]) == sorted(tokens["disaggregated"])
    table = (tmp_path / "table.txt").read_text()
    assert "prefill stages busy, mean / idlest" in table
    points = [
        json.loads(path.read_text())
        for path in tmp_path.glob("points/placed*")
        if path.suffix == ".json"
    ]
    assert points
    for point in points:  # the stage with the embedding is not the one that unembeds
        assert 0 < point["busy_prefill_least"] < point["busy_prefill"] < 1
        assert point["busy_decode_least"] == point["busy_decode"] > 0
        assert point["busy_colocated"] is None
    keys = json.loads((tmp_path / "step_times.json").read_text())["seconds"]
    assert any(key.startswith("tp1pp2/") and key.endswith("/2of2") for key in keys)
    assert any(key.startswith("tp1pp2->tp1/transfer") for key in keys)


def test_one_device_can_stand_for_several_on_the_virtual_clock(monkeypatch, tmp_path):
    """As on a machine with one GPU: the same tokens, each instance with its own KV."""
    only = jax.devices()[:1]
    asked = config("rates=20", "num_seeds=1")
    systems = asked.with_placements(FOUND).systems
    del systems["placed_joint"]
    asked = dataclasses.replace(asked, systems=systems)
    tokens = []
    for name in ("several", "one"):
        goodput_sweep.run(asked, tmp_path / name, None)
        rows = (tmp_path / name / "requests.jsonl").read_text().splitlines()
        tokens.append([json.loads(row)["tokens"] for row in rows])
        monkeypatch.setattr(jax, "devices", lambda: only)
    assert tokens[0] == tokens[1]
    with pytest.raises(ValueError, match="needs 1.1 = 2 devices, got 1"):
        goodput_sweep.run(config("rates=20", "clock=wall"), tmp_path / "wall", None)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({**FOUND, "flags": {"model": "opt-13b"}}, "one of tiny, got one of opt-13b"),
        ({"high": FOUND["high"]}, "something without 'flags'"),
        ([], "expected what experiments.placement_search wrote"),
    ],
)
def test_another_placement_is_refused(found, message):
    with pytest.raises(ValueError, match=message):
        config().with_placements(found)


@pytest.mark.parametrize(
    ("content", "came"),
    [("{", "Expecting property"), ("[]", "no attribute"), ('{"format": 99}', "99")],
)
def test_a_file_that_is_no_placement_is_named(tmp_path, content, came):
    path = tmp_path / "placement.json"
    path.write_text(content)
    message = f"expected the placement.json of a search, got '{path}': .*{came}"
    with pytest.raises(ValueError, match=message):
        goodput_sweep._read_placement(str(path))


@pytest.mark.parametrize("streams", ["false", "true"])
def test_transfers_take_the_link_that_is_named(tmp_path, streams):
    """In two groups; streamed or not, the bytes over 25 Gb/s, latency for each part."""
    asked = config(
        *("rates=5", "num_seeds=1", "link=25gb", "layer_groups=2"), f"streams={streams}"
    )
    only = {"disaggregated": asked.systems["disaggregated"]}
    goodput_sweep.run(dataclasses.replace(asked, systems=only), tmp_path, None)
    link = get_link("25gb")
    rows = [
        json.loads(line)
        for line in (tmp_path / "requests.jsonl").read_text().splitlines()
    ]
    moved = [row for row in rows if row["transfer_bytes"]]
    assert moved
    for row in moved:
        # Of a stream the second half is seen: the first is gone by then.
        seen_bytes = row["transfer_bytes"] / (2 if streams == "true" else 1)
        assert row["transfer_s"] == pytest.approx(link.transfer_s(seen_bytes))


def test_a_link_needs_the_virtual_clock():
    with pytest.raises(ValueError, match="expected clock=virtual, got clock=wall"):
        config("link=25gb", "clock=wall")
    with pytest.raises(ValueError, match="25gb"):
        config("link=2gb")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A finished run of every system, programs run at passing rates only."""
    out = tmp_path_factory.mktemp("runs") / "seven"
    changes = [*ALL_SYSTEMS, "rates=2,50000", "slo.ttft_scale=50", "slo.tpot_scale=50"]
    goodput_sweep.run(override(get_config("tiny"), changes), out, None)
    return out


def rows_of(out):
    lines = (out / "requests.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_system_takes_part_with_a_step_size_for_the_slo(seven):
    summary = json.loads((seven / "summary.json").read_text())
    assert set(summary["systems"]) == set(get_config("tiny").systems)
    tuned = {"vllm_v1", "sarathi", "sarathi_serve", "splitfuse", "disaggregated"}
    assert set(summary["choices"]) == tuned
    table = (seven / "table.txt").read_text()
    for system, (said,) in summary["choices"].items():
        assert f"{system}: {said}" in table


def test_programs_run_where_a_system_passes_and_their_tokens_agree(seven):
    systems = json.loads((seven / "summary.json").read_text())["systems"]
    passing = {n: s["goodput"]["pass_rps_per_device"] for n, s in systems.items()}
    tokens = {}
    for row in rows_of(seven):  # of others only metrics are kept
        assert row["rate_rps"] == 2 * passing[row["system"]] and row["tokens"]
        tokens.setdefault(row["request_id"], []).append(row["tokens"])
    assert len(tokens) == 6
    for served in tokens.values():
        assert len(served) == 7 and all(part == served[0] for part in served)


def test_running_every_program_gives_the_same_summary(seven, tmp_path):
    """And the same requests, where they are kept."""
    changes = [*ALL_SYSTEMS, "execute_all=true", "rates=2,50000"]
    changes += ["slo.ttft_scale=50", "slo.tpot_scale=50"]
    cfg = override(get_config("tiny"), changes)
    goodput_sweep.run(cfg, tmp_path / "all", str(seven / "step_times.json"))
    fewer, every = rows_of(seven), rows_of(tmp_path / "all")
    assert len(fewer) < len(every) and all(row in every for row in fewer)
    found = [
        json.loads((out / "summary.json").read_text())
        for out in (seven, tmp_path / "all")
    ]
    for summary in found:
        del summary["executed"]
        for system in summary["systems"].values():
            system["goodput"]["at_pass_rate"].clear()  # the padding of one seed
            for point in system["points"]:
                point["metrics"].clear()
    assert found[0] == found[1]


def test_a_timeline_unlike_the_durations_is_an_error(seven, tmp_path, monkeypatch):
    """Here the run of the programs is another run: of other requests."""
    right = ServedDeployment.run

    def fewer(self, requests, *, observer=None):
        return right(self, requests[: -1 if self.executed else None], observer=observer)

    monkeypatch.setattr(ServedDeployment, "run", fewer)
    changes = [*ALL_SYSTEMS, "rates=2", "slo.ttft_scale=50", "slo.tpot_scale=50"]
    cfg = override(get_config("tiny"), changes)
    with pytest.raises(
        RuntimeError, match="timelines are not those of their durations"
    ):
        goodput_sweep.run(cfg, tmp_path / "x", str(seven / "step_times.json"))


def test_step_sizes_become_systems():
    cfg = override(get_config("tiny"), ["step_tokens=64,128"]).by_step_tokens()
    sized = ("sarathi", "sarathi_serve", "splitfuse", "disaggregated")
    assert list(cfg.systems) == [
        "vllm_v0",
        *("vllm_v1@64", "vllm_v1@128"),
        "orca",
        *(f"{name}@{size}" for name in sized for size in (64, 128)),
    ]
    splitfuse = cfg.systems["splitfuse@64"].policies[Role.COLOCATED]
    assert splitfuse.token_budget == 64
    with pytest.raises(ValueError, match="_tokens: expected >= 1, got 0"):
        override(get_config("tiny"), ["step_tokens=0"]).by_step_tokens()


def test_step_times_are_taken_once_or_given(tmp_path, monkeypatch):
    """A resumed run keeps those its points were made with, however fast it is now."""
    found = iter([StepTimes(rounds={"a": [1.0, 3.0]})])
    monkeypatch.setattr(
        goodput_sweep, "measure_step_times", lambda *args, **named: next(found)
    )
    compiled = []
    how = ({"orca": None}, None, compiled.append, print)
    for _ in range(2):
        run_dir = RunDir(tmp_path / "taken", {})
        times = goodput_sweep._step_times(config(), run_dir, *how)
        assert times == StepTimes(rounds={"a": [1.0, 3.0]})
    assert compiled == ["orca"]
    assert run_dir.read_json("step_times.json")["measured"]["command"] == sys.argv
    run_dir = RunDir(tmp_path / "given", {})
    given = StepTimes(rounds={"a": [2.0]})
    how = ({"orca": None}, given, compiled.append, print)
    assert goodput_sweep._step_times(config(), run_dir, *how) == given
    assert compiled == ["orca"]
    assert run_dir.read_json("step_times.json") == {
        "format": 3,
        "seconds": {"a": 2.0},
        "rounds": {"a": [2.0]},
        "measured": None,
    }


def test_medians_alone_are_one_round(tmp_path):
    path = tmp_path / "step_times.json"
    path.write_text('{"format": 3, "seconds": {"a": 2.0}}')
    assert goodput_sweep._read_step_times(str(path)) == StepTimes(rounds={"a": [2.0]})


@pytest.mark.slow
def test_two_targets_stand_side_by_side(seven, tmp_path, capsys):
    """With looks and halves; the commands that read a run find either target."""
    changes = [change for change in ALL_SYSTEMS if change != "relaxed=0"]
    searched = ["num_seeds=4", "first_seeds=2", "workload.num_requests=40"]
    cfg = override(get_config("tiny"), [*changes, *searched])
    for name in ("a", "b"):
        text = goodput_sweep.run(cfg, tmp_path / name, str(seven / "step_times.json"))
    files = [(tmp_path / n / "summary.json").read_bytes() for n in ("a", "b")]
    assert files[0] == files[1]
    said = capsys.readouterr().err  # of two halves, two targets and seven systems
    assert "] 28/28 searches by halves of the rounds of timing" in said
    targets = json.loads(files[0])["targets"]
    assert list(targets) == ["tight", "relaxed"]
    slos = [targets[name]["slo"] for name in targets]
    scale = slos[1]["tpot_s"] / slos[0]["tpot_s"]
    assert scale >= 1
    assert slos[1]["ttft_s"] == pytest.approx(scale * slos[0]["ttft_s"])
    for name, found in targets.items():
        assert text.count(f"\n{name}: requests/s per device") == 1
        assert found["step_times"]["rounds"] == 2
        assert found["settled"]["settled"] in (True, False)
        assert len(found["pairs"]) == 21  # of 7 systems
        goodputs = [system["goodput"] for system in found["systems"].values()]
        # On these step times no system may pass at the tight target.
        if name == "relaxed" or any(each["pass_rps_per_device"] for each in goodputs):
            assert one_request.find(tmp_path / "a", target=name)
    # At the relaxed target every system has a step that meets it.
    assert targets["relaxed"]["too_slow_s"] == {}
