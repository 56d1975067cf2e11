"""Work in a process of its own.

The device's memory is free again after it, and a kernel that breaks the device for its
process, or never ends, takes no other work with it.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")

_SPAWN = multiprocessing.get_context("spawn")  # a fork of a process with JAX may hang


class WorkError(Exception):
    """Work that raised, died or took too long; the message says all that is known."""


def in_a_process(work: Callable[..., T], *args: Any, most_s: float | None = None) -> T:
    """Return `work(*args)`, done by a new process.

    Args:
      most_s: after which the process is killed.

    Raises:
      WorkError: if the work raises, with its traceback; if the process dies or is
        killed.
    """
    ours, theirs = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_answer, args=(theirs, work, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(most_s):
            raise WorkError(f"killed: it had not ended after {most_s:.0f} s")
        found, error = ours.recv()
    except EOFError:
        process.join()
        raise WorkError(f"its process died with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise WorkError(error)
    return found


def _answer(pipe: Connection, work: Callable[..., Any], args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent hears it, and kills it
    try:
        answer = work(*args), ""
    except Exception:
        answer = None, traceback.format_exc()
    pipe.send(answer)
    pipe.close()
