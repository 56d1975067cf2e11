"""Run directories: whole files, resuming, refusing."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import pytest

from disagg_jax.metrics import SLO
from disagg_jax.request import Request, Status, Timeline
from experiments.runs.request_rows import to_row, to_timeline
from experiments.runs.run_dir import RunDir
from experiments.runs.saved_run import Point, SavedRun

POINT = Point("vllm_v0", 12.5, 0)
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
ROWS = [{"request_id": 0, "ttft_s": 0.1}, {"request_id": 1, "ttft_s": 0.2}]


def save(run_dir, point=POINT):
    run_dir.save(point, {"attainment": 0.5}, ROWS, ["turn 1", "turn 2"])


def test_a_saved_point_comes_back(tmp_path):
    run_dir = RunDir(tmp_path / "run", {"a": 1})
    assert not run_dir.has(POINT)
    save(run_dir)
    again = RunDir(tmp_path / "run", {"a": 1})
    assert again.has(POINT)
    assert again.load(POINT) == {"attainment": 0.5}
    assert list(again.events(POINT)) == ["turn 1\n", "turn 2\n"]


def test_requests_of_all_points_become_one_file(tmp_path):
    run_dir = RunDir(tmp_path, {})
    other = Point("vllm_v0", 12.5, 1)
    save(run_dir)
    save(run_dir, other)
    run_dir.write_requests([POINT, other])
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["seed"], row["request_id"]) for row in rows] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert rows[3] == {"system": "vllm_v0", "rate_rps": 12.5, "seed": 1, **ROWS[1]}


def test_a_point_that_was_cut_off_while_saving_does_not_count(tmp_path):
    run_dir = RunDir(tmp_path, {})
    save(run_dir)
    (tmp_path / "points" / f"{POINT.name}.json").unlink()  # it is written last
    assert not run_dir.has(POINT)


def fail_after(lines):
    yield from lines
    raise OSError("the disk is full")


@pytest.mark.parametrize("before", [False, True])
def test_a_point_is_done_when_its_requests_and_events_are_there(tmp_path, before):
    """Its events end in an error, for the first time or while it is replaced."""
    run_dir = RunDir(tmp_path, {})
    if before:
        save(run_dir)
    with pytest.raises(OSError, match="the disk is full"):
        run_dir.save(POINT, {"attainment": 0.5}, ROWS, fail_after(["turn 1"]))
    assert not run_dir.has(POINT)
    assert run_dir.points() == []
    assert not list(tmp_path.rglob("*.tmp"))
    save(run_dir)
    assert run_dir.has(POINT)
    assert [row["ttft_s"] for row in run_dir.requests(POINT)] == [0.1, 0.2]


def test_metrics_that_are_no_json_do_not_mark_a_point_done(tmp_path):
    run_dir = RunDir(tmp_path, {})
    with pytest.raises(ValueError, match="JSON"):
        run_dir.save(POINT, {"attainment": float("nan")}, ROWS, [])
    assert not run_dir.has(POINT)


def test_points_are_found_by_their_names(tmp_path):
    run_dir = RunDir(tmp_path, {})
    points = [
        Point("a-b", 1e-05, 0),
        Point("a-b", 0.5, 3),
        Point("sarathi@64", 1e22, 12),
        Point("vllm_v0", 12.5, 1),
    ]
    for point in reversed(points):
        save(run_dir, point)
    assert run_dir.points() == points
    (tmp_path / "points" / "notes.json").write_text("{}")
    assert run_dir.points() == points


# -- what a user names ----------------------------------------------------------------


def saved(tmp_path, passing=6.25, rates=(6.25, 12.5), seeds=(3, 4), **found):
    """A run of two devices; rates are per device."""
    systems = {
        "vllm_v0": {"deployment": "2xcolocated:tp1"},
        "other": {"deployment": "colocated:tp1"},
    }
    run_dir = RunDir(tmp_path, {"seed": 3, "systems": systems})
    for rate in rates:
        for seed in seeds:
            save(run_dir, Point("vllm_v0", 2 * rate, seed))
    save(run_dir, Point("other", 99.0, 8))
    found = found or {"goodput": {"pass_rps_per_device": passing}}
    run_dir.write_json("summary.json", {"systems": {"vllm_v0": found}})
    return run_dir


@pytest.mark.parametrize(("asked", "seed"), [(None, 3), (3, 3), (4, 4)])
def test_a_seed_is_by_default_the_configs(tmp_path, asked, seed):
    picked = saved(tmp_path).pick("vllm_v0", 12.5, asked)
    assert picked.point == Point("vllm_v0", 25.0, seed)
    assert picked.seed == seed
    assert (picked.rate_rps, str(picked.deployment)) == ("12.5", "2xcolocated:tp1")


@pytest.mark.parametrize("seed", [0, 1, 5, 8])
def test_a_seed_that_did_not_run_is_refused(tmp_path, seed):
    with pytest.raises(
        ValueError, match=rf"--seed: expected one of \[3, 4\], .* {seed}"
    ):
        saved(tmp_path).pick("vllm_v0", 12.5, seed)


def test_without_a_rate_it_is_the_one_that_the_system_is_judged_by(tmp_path):
    best = {"throughput": {"best_rps_per_device": 12.5}}
    for name, run_dir, rate in (
        ("passing", saved(tmp_path / "passing"), 12.5),
        ("best", saved(tmp_path / "best", **best), 25.0),
    ):
        assert run_dir.pick("vllm_v0", None, None).point.rate_rps == rate, name


def test_a_system_or_rate_that_did_not_run_is_refused_by_what_there_is(tmp_path):
    run_dir = saved(tmp_path, passing=None)
    with pytest.raises(
        ValueError, match="--system: expected one of .'other', 'vllm_v0'."
    ):
        run_dir.pick("orca", None, None)
    assert run_dir.pick("vllm", 12.5, None) == run_dir.pick("vllm_v0", 12.5, None)
    rates = r"--rate: expected one of \['6.25', '12.5'\]"
    with pytest.raises(ValueError, match=rf"{rates}, got '25'"):
        run_dir.pick("vllm_v0", 25.0, None)
    with pytest.raises(ValueError, match=rf"{rates}, or a run with one that passes"):
        run_dir.pick("vllm_v0", None, None)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ValueError, match="got 'no summary.json'"):
        run_dir.pick("vllm_v0", None, None)


def test_rates_are_told_apart_by_six_digits(tmp_path):
    """Four were tried for two devices; a rate typed as it is shown finds its point."""
    rates = (1.2345 / 2, 1.2346 / 2, 1234.0 / 3)
    run_dir = saved(tmp_path, rates=rates, passing=rates[1])
    for rate, shown in zip(rates, ("0.61725", "0.6173", "411.333"), strict=True):
        for asked in (rate, float(shown)):
            picked = run_dir.pick("vllm_v0", asked, None)
            assert picked.point == Point("vllm_v0", 2 * rate, 3)
            assert picked.rate_rps == shown
    assert run_dir.pick("vllm_v0", None, None).point.rate_rps == 1.2346


def test_a_point_of_another_system_is_none_of_its_rates(tmp_path):
    picked = saved(tmp_path).pick("other", 99.0, 8)
    assert picked.point == Point("other", 99.0, 8)
    with pytest.raises(
        ValueError, match=r"--rate: expected one of \['99'\], got '6.25"
    ):
        saved(tmp_path).pick("other", 6.25, None)


def test_a_run_without_requests_keeps_none_and_is_not_picked(tmp_path):
    run_dir = saved(tmp_path)
    bare = Point("vllm_v0", 50.0, 0)
    run_dir.save(bare, {"attainment": 0.5})
    assert run_dir.has(bare) and not run_dir.has_requests(bare)
    assert run_dir.has_requests(Point("vllm_v0", 25.0, 3))
    with pytest.raises(
        ValueError, match=r"expected one of \['6.25', '12.5'\], got '25"
    ):
        run_dir.pick("vllm_v0", 25.0, None)
    run_dir.write_requests([bare, Point("vllm_v0", 25.0, 3)])
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == len(ROWS)


def test_each_target_has_points_of_its_own(tmp_path):
    """The first is the tight one; each is judged at a rate of its own."""
    run_dir = RunDir(
        tmp_path, {"seed": 3, "systems": {"a": {"deployment": "colocated:tp1"}}}
    )
    targets = {}
    for target, rate in (("relaxed", 8.0), ("tight", 4.0)):
        point = Point("a", rate, 3, target)
        save(run_dir, point)
        assert next(iter(run_dir.requests(point)))["target"] == target
        found = {"goodput": {"pass_rps_per_device": rate}}
        targets[target] = {"systems": {"a": found}}
    run_dir.write_json("summary.json", {"targets": targets})
    assert run_dir.points() == [
        Point("a", 4.0, 3, "tight"),
        Point("a", 8.0, 3, "relaxed"),
    ]
    assert run_dir.pick("a", None, None).point == Point("a", 4.0, 3, "tight")
    assert run_dir.pick("a", None, None, "relaxed").point.rate_rps == 8.0
    with pytest.raises(ValueError, match=r"--target: expected one of \['tight', 'rel"):
        run_dir.pick("a", None, None, "loose")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--run: expected a run directory, got"):
        SavedRun(tmp_path).pick("vllm_v0", None, None)


# -- runs of older formats ------------------------------------------------------------


def of_format(run_dir, number):
    """Makes a run directory an older one, whose files are numbered from 0 on."""
    path = run_dir.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    for file in sorted((run_dir.path / "points").rglob("vllm_v0*")):
        stem, seed, ending = re.fullmatch(r"(.*rps-)([0-9]+)(.*)", file.name).groups()
        file.rename(file.with_name(f"{stem}{int(seed) - 3}{ending}"))
    return SavedRun(run_dir.path)


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_of_an_older_format_is_read(tmp_path, number):
    run = of_format(saved(tmp_path), number)
    picked = run.pick("vllm_v0", 12.5, 4)
    assert picked.point == Point("vllm_v0", 25.0, 4)
    assert run.load(picked.point) == {"attainment": 0.5}
    assert [row["ttft_s"] for row in run.requests(picked.point)] == [0.1, 0.2]
    assert list(run.events(picked.point)) == ["turn 1\n", "turn 2\n"]
    assert run.has(Point("vllm_v0", 12.5, 3)) and not run.has(Point("vllm_v0", 12.5, 0))


def test_a_run_of_an_older_format_is_not_resumed(tmp_path):
    run_dir = saved(tmp_path)
    config = run_dir.config()
    RunDir(tmp_path, config)  # today's is
    of_format(run_dir, 1)
    said = r"holds a run of format 1, which can be read but not resumed; expected an em"
    with pytest.raises(ValueError, match=said):
        RunDir(tmp_path, config)


# -- runs that have ended -------------------------------------------------------------


def test_a_run_that_has_ended_has_a_table(tmp_path):
    config = {"seed": 0, "sizes": (1, 2)}
    run_dir = RunDir(tmp_path, {**config, "trace": {"rows": 3}})
    assert run_dir.table_of(config) is None
    (tmp_path / "table.txt").write_text("goodput\n\n 5\n")
    assert run_dir.table_of(config) is None
    run_dir.write_json("summary.json", {})
    assert run_dir.table_of(config) == "goodput\n\n 5"
    assert run_dir.table_of({**config, "seed": 1}) is None
    run_dir.write_json("summary.json", {"missing": ["a look"]})
    assert run_dir.table_of(config) is None
    run_dir.write_json("summary.json", {})
    assert SavedRun(tmp_path / "none").table_of(config) is None
    of_format(run_dir, 1)
    assert run_dir.table_of(config) is None


# -- requests as rows -----------------------------------------------------------------


def finished(**changes):
    fields = {
        "request": Request(id=7, arrival_s=1.0, prompt_tokens=4, max_tokens=5),
        "status": Status.FINISHED,
        "prefill_start_s": 1.25,
        "transfer_start_s": 2.0,
        "transfer_end_s": 2.5,
        "decode_start_s": 3.0,
        "end_s": 4.0,
        "token_s": [2.0, 3.5, 4.0],
        "tokens": [9, 8, 7],
        "dropped_s": [2.75],
        "transfer_bytes": 640,
    }
    return Timeline(**(fields | changes))


def test_a_row_has_the_latencies_of_a_request_that_finished():
    row = to_row(finished(), SLO(ttft_s=1.0, tpot_s=1.0))
    assert (row["request_id"], row["status"], row["preemptions"]) == (7, "finished", 1)
    assert (row["prompt_tokens"], row["output_tokens"]) == (4, 3)  # made, not asked for
    assert (row["ttft_s"], row["tpot_s"], row["e2e_s"]) == (1.0, 1.0, 3.0)
    assert row["prefill_queue_s"] == 0.25 and row["transfer_s"] == 0.5
    assert row["good"] is True
    assert to_row(finished(), SLO(ttft_s=0.99, tpot_s=1.0))["good"] is False
    assert to_row(finished(), SLO(ttft_s=1.0, tpot_s=0.99))["good"] is False


def test_a_row_of_another_request_has_no_latencies():
    refused = finished(status=Status.REFUSED, token_s=[], error="too long")
    row = to_row(refused, SLO(ttft_s=1.0, tpot_s=1.0))
    assert not {"ttft_s", "tpot_s", "e2e_s"} & row.keys()
    assert row["good"] is False
    assert (row["error"], row["output_tokens"]) == ("too long", 0)


@pytest.mark.parametrize("timeline", [finished(), finished(token_s=[], tokens=[])])
def test_a_timeline_comes_back_from_its_row(timeline):
    row = {"request_id": 7, **vars_of(timeline)}
    again = to_timeline(json.loads(json.dumps(row)))
    for name in ("prefill_start_s", "end_s", "dropped_s", "token_s", "tokens"):
        assert getattr(again, name) == getattr(timeline, name)
    assert (again.status, again.transfer_bytes) == (timeline.status, 640)
    assert again.request.max_tokens == max(1, len(timeline.token_s))
    assert (again.request.id, again.request.arrival_s) == (7, 1.0)
    del row["dropped_s"]
    with pytest.raises(ValueError, match=r"missing none, got \['dropped_s'\]"):
        to_timeline(row)


def vars_of(timeline):
    """A row as `to_row` makes it, latencies left out."""
    ended = dataclasses.replace(timeline, status=Status.CANCELLED)
    row = to_row(ended, SLO(ttft_s=1.0, tpot_s=1.0))
    return {**row, "status": str(timeline.status)}


def test_a_row_has_the_stages_and_what_became_of_the_request():
    """Arrived at 1, taken at 1.25, first token and transfer at 2, dropped at 2.75."""
    timeline = finished()
    row = to_row(timeline, SLO(ttft_s=1.0, tpot_s=1.0))
    stages = ("prefill_queue_s", "prefill_s", "transfer_s")
    assert [row[name] for name in stages] == [0.25, 0.75, 0.5]
    assert sum(row[f"{s}_s"] for s in STAGES) == row["e2e_s"] == 3.0
    assert {name: row[name] for name in ("arrival_s", "transfer_bytes", "tokens")} == {
        "arrival_s": 1.0,
        "transfer_bytes": 640,
        "tokens": [9, 8, 7],
    }
    for status in Status:
        row = to_row(
            dataclasses.replace(timeline, status=status), SLO(ttft_s=1.0, tpot_s=1.0)
        )
        assert bool({"ttft_s", "e2e_s"} & row.keys()) == row["good"], status
        assert row["good"] == (status is Status.FINISHED), status


def test_a_timeline_keeps_the_lengths_of_its_row():
    again = to_timeline(to_row(finished(), SLO(ttft_s=1.0, tpot_s=1.0)))
    assert (again.request.prompt_tokens, again.request.max_tokens) == (4, 3)
    assert again.preemptions == 1


# -- starts ---------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_environment_of_every_start(tmp_path):
    for starts in (1, 2):
        env = RunDir(tmp_path, {}).read_json("env.json")
        assert len(env) == starts
    assert all(start["packages"]["jax"] for start in env)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "env.json", "points"),
    }


def test_a_start_says_on_what_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="H1")] * 3)
    (start,) = RunDir(tmp_path, {}).read_json("env.json")
    assert (start["backend"], start["devices"]) == ("gpu", ["H1"] * 3)


def test_another_config_is_refused_by_the_keys_that_differ(tmp_path):
    RunDir(tmp_path, {"seed": 0, "workload": {"n": 1, "m": 2}})
    with pytest.raises(ValueError, match=r"another config \(workload.n\)"):
        RunDir(tmp_path, {"seed": 0, "workload": {"n": 3, "m": 2}})


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        RunDir(tmp_path / "file" / "run", {})


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save(RunDir(tmp_path / name, {}))
    a, b = (sorted((tmp_path / name / "points").iterdir()) for name in ("a", "b"))
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]
    packed = [path.read_bytes() for path in a if path.suffix == ".gz"]
    assert packed and all(data[4:8] == bytes(4) for data in packed)  # no time stamp


def test_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        RunDir(tmp_path, {}).write_json("summary.json", {"x": float("nan")})
