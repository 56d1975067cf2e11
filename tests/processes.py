"""Processes that tests started: which are left."""

import os
import pathlib
import subprocess
import time

GONE_S = 10  # after a parent's end


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = pathlib.Path(f"/proc/{pid}/stat")  # a dead child that nobody waited for
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until_gone(pids):
    end = time.monotonic() + GONE_S
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"{left} are left"
        time.sleep(0.05)


def session(leader):
    """Processes of the session that it leads."""
    done = subprocess.run(
        ["ps", "-e", "-o", "pid=,pgid="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return [int(pid) for pid, of in rows if of == str(leader)]
