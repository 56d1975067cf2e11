"""Commands of `experiments`, run as `python -m` runs them, but started quickly.

A short command spends most of its time on importing JAX. Here a process that has
imported JAX is forked for each command. So a command has flags, devices and signal
handlers of its own, as in a new interpreter. A test of what an interpreter reads when
it starts, such as JAX_PLATFORMS, needs a new one.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
# No module of these defines flags or looks for devices.
_IMPORTED = (
    *("absl.app", "matplotlib.pyplot", "scipy.optimize"),
    *("disagg_jax.search.comparison", "experiments.report.draw"),
)
_IMPORTED_WITH_JAX = ("disagg_jax.calibration.measure", "models.transformer")

_forks = multiprocessing.get_context("forkserver")


def run_command(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m experiments.<name> ARGS` in the checkout's root."""
    module = f"experiments.{name}"
    return _run(_module, module, module, *args)


def run_code(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -c CODE ARGS` in the checkout's root."""
    return _run(_code, code, "-c", *args)


def _run(
    target: Callable[[str], None], source: str, *argv: str
) -> subprocess.CompletedProcess[str]:
    with_jax = _IMPORTED_WITH_JAX if "jax" in sys.modules else ()  # see the mark `core`
    _forks.set_forkserver_preload([*_IMPORTED, *with_jax])
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = _forks.Process(
            target=_forked, args=(target, source, argv, dict(os.environ), files)
        )
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # where the test itself was interrupted
        assert process.exitcode is not None
        stdout, stderr = (pathlib.Path(file).read_text() for file in files)
    return subprocess.CompletedProcess(argv, process.exitcode, stdout, stderr)


def _forked(
    target: Callable[[str], None],
    source: str,
    argv: tuple[str, ...],
    env: dict[str, str],
    files: list[str],
) -> None:
    """Runs in the new process, whose output goes to `files`."""
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(argv)
    target(source)


def _module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _code(code: str) -> None:
    exec(code, {"__name__": "__main__"})
