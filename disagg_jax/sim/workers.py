"""Worker processes for simulations. They share nothing, so each takes whole tasks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol, TypeVar

from disagg_jax.errors import require

T = TypeVar("T")
R = TypeVar("R")


class Mapper(Protocol):
    """Applies a function to items and yields the results in their order.

    The built-in `map` is one. A mapper over processes needs a function and items that
    can be pickled.
    """

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], /
    ) -> Iterator[R]: ...


@contextlib.contextmanager
def worker_pool(workers: int | None = None) -> Generator[Mapper, None, None]:
    """Yield a mapper over worker processes that live as long as the context.

    Args:
      workers: processes; by default one for each core. With 1 nothing is started.

    Raises:
      ValueError: if `workers` < 1.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    require(workers >= 1, "workers: expected >= 1", workers)
    if workers == 1:
        yield map
        return
    with process_pool(workers) as mapper:
        yield mapper


@contextlib.contextmanager
def process_pool(workers: int) -> Generator[Mapper, None, None]:
    """Yield a mapper over new processes that end with the context or this process.

    After an error, an interrupt or a kill they leave their tasks undone, since nobody
    would read the results.
    """
    # spawn: a fork would copy the threads that JAX may have started.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_end_with, initargs=(theirs,)
    )

    def mapper(function: Callable[[T], R], items: Sequence[T], /) -> Iterator[R]:
        with _blocked(signal.SIGINT):  # it starts the processes
            return executor.map(function, items)

    with ours, theirs, executor:
        try:
            yield mapper
        except BaseException:
            with _cancelled_quietly():
                ours.close()
                executor.shutdown(cancel_futures=True)
            raise
        finally:
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cancelled_quietly() -> Generator[None]:
    """Say nothing of tasks that were cancelled before their worker ended.

    Python 3.11 gives them an error that their state does not allow, in the executor's
    own thread, which prints it.
    """
    usual = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if raised.exc_type is not concurrent.futures.InvalidStateError:
            usual(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


def _end_with(theirs: multiprocessing.connection.Connection) -> None:
    """End this process when the other end of its pipe is closed.

    Only the parent has the other end, so a kill of the parent closes it too.
    """

    def watch() -> None:
        theirs.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _blocked(signum: signal.Signals) -> Generator[None, None, None]:
    """Delay a signal; processes that start meanwhile never get it.

    A terminal sends an interrupt to every process of a command, but only the parent is
    to act on it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
