"""Worker processes for simulations: they share nothing, so they take whole tasks."""

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
    """Applies a function to items and gives the results in their order.

    The built-in `map` is one. Another may need a function and items that can be
    pickled.
    """

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], /
    ) -> Iterator[R]: ...


@contextlib.contextmanager
def worker_pool(workers: int | None = None) -> Generator[Mapper, None, None]:
    """A mapper over worker processes that live as long as the context.

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
    """A mapper over new processes, which end with the context or with this process.

    After an error, an interrupt or a kill they leave their tasks undone: nobody would
    read what comes of them.
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
            ours.close()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


def _end_with(theirs: multiprocessing.connection.Connection) -> None:
    """Ends this process when the other end of its pipe is closed, or dies with its own.

    Only the parent has that end, so it is closed by a kill too.
    """

    def watch() -> None:
        theirs.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _blocked(signum: signal.Signals) -> Generator[None, None, None]:
    """Delays a signal; processes that start meanwhile never get it.

    A terminal sends an interrupt to every process of a command. It is the parent that
    acts on it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
