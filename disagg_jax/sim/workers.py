"""Worker processes for simulations: they share nothing, so they take whole tasks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol, TypeVar

from disagg_jax.expect import expect

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
    expect(workers >= 1, "workers: expected >= 1", workers)
    if workers == 1:
        yield map
        return
    # spawn: a fork would copy the threads that JAX may have started.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        try:
            yield pool.map
        finally:  # after an error, do not simulate what nobody will read
            pool.shutdown(cancel_futures=True)
