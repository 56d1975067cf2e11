"""Run directories: whole files, resuming, refusing."""

import json

import pytest

from experiments.run_dir import Point, RunDir

POINT = Point("vllm", 12.5, 0)
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
    other = Point("vllm", 12.5, 1)
    save(run_dir)
    save(run_dir, other)
    run_dir.write_requests([POINT, other])
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["replica"], row["request_id"]) for row in rows] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert rows[3] == {"system": "vllm", "rate_rps": 12.5, "replica": 1, **ROWS[1]}


def test_a_point_that_was_cut_off_while_saving_does_not_count(tmp_path):
    run_dir = RunDir(tmp_path, {})
    save(run_dir)
    (tmp_path / "points" / f"{POINT.name}.json").unlink()  # it is written last
    assert not run_dir.has(POINT)


def test_a_resumed_run_keeps_the_environment_of_every_start(tmp_path):
    for starts in (1, 2):
        env = RunDir(tmp_path, {}).read_json("env.json")
        assert len(env) == starts
    assert all(start["packages"]["jax"] for start in env)


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


def test_nan_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        RunDir(tmp_path, {}).write_json("summary.json", {"x": float("nan")})
