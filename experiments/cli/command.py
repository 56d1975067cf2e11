"""What every command does around its work: errors in one line, and interrupts heard."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import pathlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

_AGAIN_S = 0.02  # until an interrupt that was lost comes once more


def command(main: Callable[[], None]) -> Callable[[Sequence[str]], None]:
    """Makes `main` what `app.run` calls: flags only, and no traceback for a user.

    An error that a user can cause ends the command with one line and status 1; SIGINT
    and SIGTERM end it with a line that says how to go on, and status 128 + signal.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"expected flags only, got {argv[1:]}")
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax report what they try
        with _interrupts() as caught:
            try:
                _check_flags()
                main()
            except (ValueError, OSError) as error:
                sys.exit(f"error: {_said(error)}")
            except (RuntimeError, AssertionError) as error:
                if (missing := _missing_backend()) is None:
                    raise
                raise SystemExit(f"error: {missing}") from error
            except KeyboardInterrupt:
                print(
                    "interrupted: what was saved is kept. To go on: " + command_line(),
                    file=sys.stderr,
                )
                sys.exit(128 + (caught[0] if caught else signal.SIGINT))

    return run


def own_flags() -> dict[str, Any]:
    """The flags of the command that runs, but for where and how fast."""
    own = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])
    return {f.name: f.value for f in own if f.name not in ("out", "workers")}


def _check_flags() -> None:
    for name, value in own_flags().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name}: expected a finite number, got {value}")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Raises KeyboardInterrupt on SIGINT and SIGTERM; yields the signals that came.

    Python cannot raise it in a callback of the garbage collector (JAX has one), of a
    weak reference, or in a `__del__`: it hands it to `sys.unraisablehook` and goes on.
    From there a timer sends it again until it comes at another moment.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def interrupt(signum: int, frame: Any) -> None:
        if signum != signal.SIGALRM:
            caught.append(signum)
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {
        signum: signal.signal(signum, interrupt)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        if signal.getsignal(signum) is not signal.SIG_IGN  # as `nohup cmd &` asks for
    }
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        sys.unraisablehook = hook


def command_line() -> str:
    """By which this can be run again."""
    command = pathlib.Path(sys.argv[0])
    if (pathlib.Path(__file__).parents[1] / f"{command.stem}.py").exists():
        return shlex.join(
            ["python", "-m", f"experiments.{command.stem}", *sys.argv[1:]]
        )
    return shlex.join(sys.argv)


def _said(error: ValueError | OSError) -> str:
    """An error in a user's words."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for '{error.filename}'" if error.filename else ""
        return (
            f"no space left on the disk{where}. What was saved is kept: make room, and "
            "start the same command again"
        )
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"'{error.filename}': {error.strerror}"


def _missing_backend() -> str | None:
    """Why JAX finds no devices; None where it does, or was not asked."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"]
        why = f": {error}" if str(error) else ""
        return (
            f"JAX_PLATFORMS={asked}: expected a device that JAX finds on this machine, "
            f"got none of this kind{why}. Unset JAX_PLATFORMS for those there are, or "
            "install JAX's package for this kind, such as jax[cuda12]"
        )
    return None
