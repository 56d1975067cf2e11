"""One interrupt ends a real run, and the same command goes on with it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import session, wait_until_gone

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
ENDS_S = 30  # 5 on a machine that is not shared; without the interrupt it is minutes
SWEEP = [
    "goodput_sweep",
    "--config=smoke",
    *(
        f"--set={change}"
        for change in (
            "workload.num_requests=4",
            "workload.output_tokens=fixed:4",
            "workload.prompt_tokens=uniform:8:30",
            "memory.max_context=64",
            "memory.tokens_per_device=256",
            "timing_repeats=1",
            "num_seeds=1",
        )
    ),
]
# Interrupts as a shell's foreground job gets them, whatever pytest was started with.
START = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
name, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
"""


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-c", START, *args],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt_at(process, word, signum=signal.SIGINT):
    """Sends a signal when a line of progress has the word; what was said afterwards."""
    for line in process.stderr:
        if word in line:
            break
    else:
        pytest.fail(f"ended without '{word}': {process.wait()}")
    begin = time.monotonic()
    os.killpg(process.pid, signum)
    said = process.communicate()[1]
    assert time.monotonic() - begin < ENDS_S
    assert process.returncode == 128 + signum
    assert "Traceback" not in said and "ignored" not in said
    assert said.splitlines()[-1].startswith("interrupted: what was saved is kept. To ")
    wait_until_gone(session(process.pid))


def many(rates):
    return f"--set=rates={','.join(map(str, rates))}"


@pytest.mark.parametrize(
    ("word", "signum"),
    [
        ("compiling", signal.SIGINT),
        ("timing", signal.SIGINT),
        ("requests/s per device", signal.SIGINT),
        ("requests/s per device", signal.SIGTERM),
    ],
)
def test_a_sweep_ends_by_one_interrupt_and_is_resumed(tmp_path, word, signum):
    out = tmp_path / "run"
    rates = [50 + i for i in range(100)]
    interrupt_at(start(*SWEEP, many(rates), f"--out={out}"), word, signum)
    done = {path: path.stat().st_mtime_ns for path in out.glob("points/*.json")}
    assert not (out / "summary.json").exists()
    interrupt_at(start(*SWEEP, many(rates), f"--out={out}"), "requests/s per device")
    assert len(json.loads((out / "env.json").read_text())) == 2
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.parametrize("gap_s", [0.05, 0.2, 0.3])
def test_a_second_interrupt_while_programs_compile_is_no_crash(tmp_path, gap_s):
    """Threads that compile cannot be stopped, only left."""
    process = start(*SWEEP, many([50, 60]), f"--out={tmp_path / 'run'}")
    for line in process.stderr:
        if "compiling" in line:
            break
    time.sleep(0.5)  # until a thread compiles
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(gap_s)
    said = process.communicate()[1]
    # While the interpreter ends, its handlers are gone. The signal itself ends it then,
    # which a shell reports by the same number.
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
    assert said.splitlines()[-1].startswith("interrupted: what was saved is kept. To ")
    assert "Traceback" not in said and "Fatal" not in said
    wait_until_gone(session(process.pid))


COMPARE = ["compare_systems", "--model=opt-13b", "--devices=4", "--num_requests=2000"]


def test_a_simulation_in_workers_ends_by_one_interrupt(tmp_path):
    process = start(*COMPARE, "--workers=2", "--seeds=2", f"--out={tmp_path / 'maps'}")
    interrupt_at(process, "]")
    assert not (tmp_path / "maps" / "maps.json").exists()


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_killed(tmp_path):
    out = tmp_path / "run"
    rates = [50 + i for i in range(100)]
    first = start(*SWEEP, many(rates), f"--out={out}")
    for line in first.stderr:
        if "requests/s per device" in line:
            break
    second = start(*SWEEP, many(rates), f"--out={out}")
    said = second.communicate()[1]
    assert second.returncode == 1
    assert f"is in use by process {first.pid} on " in said
    first.kill()
    first.communicate()
    interrupt_at(start(*SWEEP, many(rates), f"--out={out}"), "requests/s per device")
