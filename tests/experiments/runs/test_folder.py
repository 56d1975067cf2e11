"""Folders of runs: one run at a time, another's results stay, files are whole."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from disagg_jax.formats import RUN
from disagg_jax.metrics import SLO
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.search.placement import PlacementProblem
from disagg_jax.search.rates import SearchPlan
from disagg_jax.workload import TraceWorkload
from disagg_jax.workload.traces import TraceRow
from experiments import stalls
from experiments.configs.named_simulations import placement_simulation
from experiments.configs.paper_workloads import get_workload
from experiments.runs.folder import (
    Difference,
    differences,
    plain,
    read_json,
    record_start,
    run_folder,
    sole_use,
    whole,
    write_json,
    write_text,
)
from models.config import get_config

ROOT = pathlib.Path(__file__).parents[3]
HOLD = """
import pathlib, sys, time
from experiments.runs.folder import sole_use
with sole_use(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(600)
"""


# -- one run at a time ----------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_folder_is_free_when_its_process_is_gone_however_that_ended(tmp_path, signum):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdout.readline() == b"in\n"
    who = rf"is in use by process {holder.pid} on .+ since \d{{4}}-.+ \(-c .*\); expect"
    with pytest.raises(ValueError, match=who):
        with sole_use(tmp_path):
            pass
    holder.send_signal(signum)
    holder.communicate()
    with sole_use(tmp_path):
        pass


def test_a_second_run_of_the_same_process_is_refused_too(tmp_path):
    out = tmp_path / "new" / "folder"
    with sole_use(out):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
                with run_folder(out, {}, "result.txt"):
                    pass
        assert not (out / "config.json").exists()  # nothing of the second
    with sole_use(out):
        assert (out / ".lock").read_text().count("process") == 1  # who holds it now


def test_an_error_frees_the_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with sole_use(tmp_path):
            raise KeyboardInterrupt
    with sole_use(tmp_path):
        with sole_use(tmp_path / "inner"):  # another folder
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(tmp_path, number, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_use(tmp_path):
        pass
    said = capsys.readouterr().err
    assert f"'{tmp_path}' cannot be locked ({os.strerror(number)})" in said


@pytest.mark.parametrize("inside", [".", "run"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out: cannot write to"):
        with sole_use(tmp_path / "file" / inside):
            pass


def test_what_writes_several_files_uses_it(tmp_path):
    """One for all: a library's run, as a notebook calls it."""
    scene = stalls.StallScenario(decodes=1, prompts=(8,), chunk=8, repeats=1)
    with sole_use(tmp_path):
        with pytest.raises(ValueError, match="in use by process"):
            stalls.run(get_config("tiny"), {}, scene, tmp_path)


# -- what went in ---------------------------------------------------------------------


def read(path):
    return json.loads(path.read_text())


def config_in(path):
    return RUN.read(read(path / "config.json"))


def test_a_folder_of_a_newer_format_is_refused_and_stays(tmp_path):
    """Also where the same config would be resumed, or could be replaced."""
    once(tmp_path, {"a": 1})
    newer = json.dumps({"format": 99, "a": 1})
    (tmp_path / "config.json").write_text(newer)
    for how in ({}, {"replace": True}):
        with pytest.raises(ValueError, match="run directory: expected format 0 to "):
            once(tmp_path, {"a": 1}, **how)
    assert (tmp_path / "config.json").read_text() == newer
    assert len(read(tmp_path / "env.json")) == 1


def test_a_folder_from_before_there_were_formats_is_resumed(tmp_path):
    once(tmp_path, {"a": 1})
    (tmp_path / "config.json").write_text('{"a": 1}')
    once(tmp_path, {"a": 1})
    assert len(read(tmp_path / "env.json")) == 2


def test_a_folder_says_what_was_run_and_by_which_command(tmp_path):
    with run_folder(tmp_path, {"deployment": "colocated:tp1"}, "result.txt"):
        pass
    assert config_in(tmp_path) == {"deployment": "colocated:tp1"}
    (start,) = read(tmp_path / "env.json")
    assert start["command"] == sys.argv
    assert {"date", "commit", "packages"} <= start.keys()


def once(path, config, **how):
    with run_folder(path, config, "result.txt", **how):
        (path / "result.txt").write_text(str(config))


def test_only_the_records_of_a_run_are_nothing_to_lose(tmp_path):
    """Any other file is a result, whatever it is called."""
    for name in ("notes.txt", "points"):
        folder = tmp_path / name
        record_start(folder_of(folder), {"a": 1}, {})
        (folder / name).write_text("kept")
        with pytest.raises(ValueError, match=r"another config \(a\)"):
            once(folder, {"a": 2})
        assert (folder / name).read_text() == "kept"
        once(folder, {"a": 1})


def folder_of(path):
    path.mkdir()
    return path


def test_a_result_without_a_config_may_be_replaced_where_asked(tmp_path):
    (tmp_path / "result.txt").write_text("of an older version")
    once(tmp_path, {"a": 1}, replace=True)
    assert config_in(tmp_path) == {"a": 1}


def test_a_config_that_is_no_json_is_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        record_start(tmp_path, {"a": float("inf")}, {})
    assert not list(tmp_path.iterdir())


def test_a_start_is_kept_behind_those_before(tmp_path):
    for start in (1, 2, 3):
        record_start(tmp_path, {"a": (1, 2)}, start)
    assert read(tmp_path / "env.json") == [1, 2, 3]


def test_a_refused_config_changes_nothing(tmp_path):
    record_start(tmp_path, {"a": 1}, "first")
    with pytest.raises(ValueError, match="another config"):
        record_start(tmp_path, {"a": 2}, "second")
    assert config_in(tmp_path) == {"a": 1}
    assert read(tmp_path / "env.json") == ["first"]


def test_results_of_another_config_stay(tmp_path):
    once(tmp_path, {"a": 1, "sizes": (1, 2)})
    once(tmp_path, {"a": 1, "sizes": (1, 2)})  # again, the same
    with pytest.raises(ValueError, match=r"another config \(a\); expected an empty"):
        once(tmp_path, {"a": 2, "sizes": (1, 2)})
    assert config_in(tmp_path) == {"a": 1, "sizes": [1, 2]}
    assert len(read(tmp_path / "env.json")) == 2
    assert "'a': 1" in (tmp_path / "result.txt").read_text()


def test_results_whose_config_is_unknown_stay(tmp_path):
    (tmp_path / "result.txt").write_text("of an older version")
    with pytest.raises(ValueError, match="holds result.txt of another run"):
        once(tmp_path, {})
    assert (tmp_path / "result.txt").read_text() == "of an older version"
    (tmp_path / "result.txt").unlink()
    once(tmp_path, {})  # other files are nobody's


def test_files_of_a_sweep_in_the_folder_are_a_run_too(tmp_path):
    record_start(tmp_path, {"sweep": 1}, {})
    (tmp_path / "step_times.json").write_text("{}")
    with pytest.raises(ValueError, match="another config"):
        once(tmp_path, {"a": 2})


def test_a_run_that_ended_before_it_wrote_anything_is_replaced(tmp_path):
    with pytest.raises(OSError):
        with run_folder(tmp_path, {"a": 1}, "result.txt"):
            raise OSError
    once(tmp_path, {"a": 2})
    assert config_in(tmp_path) == {"a": 2}


def test_what_may_be_replaced_is_with_its_records(tmp_path):
    once(tmp_path, {"a": 1})
    once(tmp_path, {"a": 2}, replace=True)
    assert config_in(tmp_path) == {"a": 2}
    assert len(read(tmp_path / "env.json")) == 1  # the other's start is not its own
    once(tmp_path, {"a": 2}, replace=True)
    assert len(read(tmp_path / "env.json")) == 2


def test_no_folder_is_no_folder():
    with run_folder(None, {}, "result.txt"):
        pass


def test_differences_are_named_by_their_keys():
    a = {"x": {"y": 1, "z": [1, 2]}, "only_a": 0, "same": 3}
    b = {"x": {"y": 2, "z": [1, 2]}, "same": 3, "only_b": None}
    found = [(each.key, each.a, each.b) for each in differences(a, b)]
    assert found == [("only_a", 0, None), ("x.y", 1, 2)]
    assert differences(a, a) == []
    assert differences({"x": {"y": 1}}, {"x": 5}) == [Difference("x", {"y": 1}, 5)]


def test_content_of_dataclasses_is_plain():
    scene = stalls.StallScenario(decodes=1, prompts=(8, 9), chunk=8, repeats=1)
    found = plain({"scene": scene, 3: float("inf"), "nan": [float("nan"), 1.5]})
    assert found["scene"]["type"] == "StallScenario"
    assert found["scene"]["prompts"] == [8, 9]
    assert found["3"] is None and found["nan"] == [None, 1.5]


def test_the_rows_of_a_trace_are_a_number_and_a_digest():
    """Another trace differs by its digest; what is equal is equal."""
    traces = [
        TraceWorkload(rows=(TraceRow(0.0, 5, 5), TraceRow(1.0, last, 5)))
        for last in (6, 7, 7)
    ]
    first, second, third = (plain(trace) for trace in traces)
    assert first["rows"]["count"] == 2 and len(first["rows"]["sha256"]) == 64
    assert first != second == third


# -- whole files ----------------------------------------------------------------------


def test_a_file_that_was_cut_off_leaves_the_one_before(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            with whole(path) as temporary:
                temporary.write_text("half")
                raise error
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert path.read_text() == "before"
    write_text(path, "after")
    assert path.read_text() == "after"


def test_a_json_file_comes_back_and_a_missing_one_is_none(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "d"}}
    write_json(tmp_path / "x.json", content)
    assert (tmp_path / "x.json").read_text().endswith("}\n")
    assert read_json(tmp_path / "x.json") == content
    assert read_json(tmp_path / "y.json") is None


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
    with whole(tmp_path / "x") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "x").exists() and temporary.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        with whole(tmp_path / "x"):
            (tmp_path / "other").read_text()
    assert error.value.filename == str(tmp_path / "other")


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "missing" / "file.json"
    with pytest.raises(FileNotFoundError) as error:
        write_text(path, "text")
    assert error.value.filename == str(path)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_and_a_device_stays_a_device():
    with pytest.raises(OSError) as error:
        write_text(pathlib.Path("/dev/full"), "text")
    assert error.value.errno == errno.ENOSPC
    assert not pathlib.Path("/dev/full").is_file()


def test_what_a_search_builds_with_is_recorded_by_its_name_and_owner():
    """A placement problem has methods of simulations, which say what is simulated."""
    problem = PlacementProblem.of(
        placement_simulation("opt-13b", "a100"),
        2,
        workload=get_workload("fixed:9x2"),
        slo=SLO.parse("1,1"),
        plan=SearchPlan(),
        rate_rps=None,
        num_requests=9,
        seeds=(0,),
        margin=0.1,
    )
    record = json.loads(json.dumps(plain(problem), allow_nan=False))
    assert record["apart"]["disaggregated"]["function"] == "Simulation.build"
    apart = {"policies": SYSTEMS["disaggregated"]}
    same, other = (
        plain(dataclasses.replace(placement_simulation(model, "a100"), **apart))
        for model in ("opt-13b", "opt-66b")
    )
    assert record["apart"]["disaggregated"]["of"] == same != other
