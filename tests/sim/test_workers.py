"""Worker processes: results in order, and no process that outlives its purpose."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from disagg_jax.sim.workers import _cancelled_quietly, process_pool, worker_pool
from tests.processes import GONE_S, alive, session, wait_until_gone

ROOT = pathlib.Path(__file__).parents[2]


def pid_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def fail(_):
    raise ValueError("a task")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers):
    with worker_pool(workers) as mapper:
        assert list(mapper(abs, [-1, 2, -3])) == [1, 2, 3]
        assert list(mapper(abs, [-4])) == [4]


def test_one_worker_is_no_process_unless_it_is_to_be():
    with worker_pool(1) as mapper:
        assert list(mapper(pid_after, [0])) == [os.getpid()]
    with process_pool(1) as mapper:
        (pid,) = mapper(pid_after, [0])
    assert pid != os.getpid()
    wait_until_gone([pid])
    with pytest.raises(ValueError, match="workers: expected >= 1, got 0"):
        with worker_pool(0):
            pass


def test_an_error_of_a_task_is_raised_here():
    with pytest.raises(ValueError, match="a task"):
        with worker_pool(2) as mapper:
            list(mapper(fail, [0, 1]))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_tasks_undone(error):
    start = time.monotonic()
    with pytest.raises(error):
        with worker_pool(2) as mapper:
            (pid,) = mapper(pid_after, [0])
            mapper(pid_after, [300] * 4)
            raise error
    assert time.monotonic() - start < 60  # starting takes seconds, a task 300
    wait_until_gone([pid])


def test_what_nobody_asked_for_is_not_begun():
    with worker_pool(2) as mapper:
        results = mapper(pid_after, [0, 0, *[0.5] * 100])
        next(results)
    with pytest.raises(Exception):  # noqa: B017  cancelled, whatever its name
        list(results)


DRIVER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from disagg_jax.sim.workers import worker_pool
from tests.sim.test_workers import pid_after, spin
with worker_pool(2) as mapper:
    if "early" in sys.argv:
        results = mapper({task}, [300] * 4)
        print("started", flush=True)
    else:
        print(*set(mapper(pid_after, [0.5] * 4)), flush=True)
        results = mapper({task}, [300] * 4)
    list(results)
"""


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def driver(task, *args):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(task=task), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("signum", "task"), [(signal.SIGTERM, "spin"), (signal.SIGKILL, "pid_after")]
)
def test_no_worker_outlives_a_parent_that_was_ended(signum, task):
    parent = driver(task)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers and all(alive(pid) for pid in workers)
    parent.send_signal(signum)
    # Ends when nobody has its output open: no worker does.
    parent.communicate(timeout=GONE_S)
    assert parent.returncode == -signum
    wait_until_gone(session(parent.pid))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_parent_that_ends_while_they_start(signum):
    parent = driver("pid_after", "early")
    assert parent.stdout.readline() == "started\n"
    parent.send_signal(signum)
    parent.wait()
    wait_until_gone(session(parent.pid))
    parent.communicate()


@pytest.mark.parametrize("args", [(), ("early",)])
def test_an_interrupt_of_a_terminal_is_the_parents_alone(args):
    """It goes to all processes; only the parent says so, and all end."""
    parent = driver("pid_after", *args)
    parent.stdout.readline()
    os.killpg(parent.pid, signal.SIGINT)
    said = parent.communicate()[1]
    assert parent.returncode == -signal.SIGINT  # of Python's own handler
    assert said.count("Traceback") == said.count("\nKeyboardInterrupt") == 1
    wait_until_gone(session(parent.pid))


@pytest.mark.parametrize(
    ("error", "said"),
    [(concurrent.futures.InvalidStateError, 0), (ValueError, 1)],
)
def test_of_a_thread_only_errors_about_cancelled_tasks_are_kept_quiet(error, said):
    def run():
        raise error

    heard = []
    usual, threading.excepthook = threading.excepthook, heard.append
    try:
        with _cancelled_quietly():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert threading.excepthook == heard.append
    finally:
        threading.excepthook = usual
    assert len(heard) == said
