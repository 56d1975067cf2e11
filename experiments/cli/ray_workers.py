"""Workers on a Ray cluster, for simulations. Needs the extra [cluster]."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import platform
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_HOME = pathlib.Path(__file__).parents[2]  # where the packages lie
_PACKAGES = ("disagg_jax", "models", "sharding", "experiments")
_RETRIES = 3  # of a task whose worker died


@dataclasses.dataclass(frozen=True)
class Build:
    """What must be equal on all workers, so that results do not depend on the worker.

    Attributes:
      source: a digest of this project's modules.
    """

    source: str
    jax: str
    python: str

    @classmethod
    @functools.cache
    def here(cls) -> Build:
        """Return that of this process."""
        digest = hashlib.sha256()
        for name in _PACKAGES:
            for path in sorted((_HOME / name).rglob("*.py")):
                digest.update(str(path.relative_to(_HOME)).encode())
                digest.update(path.read_bytes())
        return cls(
            source=digest.hexdigest()[:16],
            jax=importlib.metadata.version("jax"),
            python=platform.python_version(),
        )


@contextlib.contextmanager
def ray_pool(address: str) -> Generator[Callable[..., Iterator[Any]]]:
    """Yield a `Mapper` over the workers of a Ray cluster.

    Results are those of local processes. A task whose worker dies is done again by
    another one; an error of a task is raised here. At the end of the context, tasks
    that are left are cancelled.

    Args:
      address: HOST:PORT or ray://HOST:PORT of a running cluster; "ray" is a new one on
        this machine, which listens to no other unless Ray was imported before.

    Raises:
      ImportError: without Ray.
      ValueError: if no cluster is at `address`.
      RuntimeError: if a worker has other source, another jax or another Python.
    """
    ray = _import_ray()
    with _connected(ray, address):
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_run)
        refs: list[Any] = []

        def mapper(function: Callable[[T], R], items: Sequence[T], /) -> Iterator[R]:
            build = Build.here()
            begun = [task.remote(build, pickle.dumps((function, i))) for i in items]
            refs.extend(begun)
            return (_result(ray, ref) for ref in begun)

        try:
            yield mapper
        finally:
            for ref in refs:
                ray.cancel(ref, force=True)  # of one that is done it does nothing


def _run(build: Build, task: bytes) -> Any:
    """Do a task, in a worker. It is unpickled here, after the check."""
    here = Build.here()
    if here != build:
        raise RuntimeError(f"worker: expected {build}, got {here}")
    function, item = pickle.loads(task)
    return function(item)


def _result(ray: Any, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _import_ray() -> Any:
    # Read on import: without it a local cluster listens on all interfaces.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "workers=ray: expected Ray, got none; pip install 'disagg-jax[cluster]'"
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Generator[None]:
    """Connect to a cluster, or start one; leave one that was connected as it is."""
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        if address == "ray":
            options = _local_options(stack)
        else:
            _check_reached(address)
            options = {"address": address}
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
        stack.callback(ray.shutdown)
        yield


def _check_reached(address: str) -> None:
    """Raise a ValueError if nothing listens there: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"workers: expected the address of a Ray cluster, got '{address}': {error}"
        ) from error


def _local_options(stack: contextlib.ExitStack) -> dict[str, Any]:
    """Return what starts a cluster of this machine's cores, for this process alone."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        stack.callback(os.environ.pop, "RAY_AUTH_TOKEN_PATH", None)
    return {
        "address": "local",
        "num_cpus": os.cpu_count(),
        "include_dashboard": False,
        "object_store_memory": 128 * 2**20,  # results are small
        "_temp_dir": str(folder),
    }
