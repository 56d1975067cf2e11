"""A command around its work: its flags, errors in one line, interrupts."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import pathlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from experiments.cli.flags import Flags

_AGAIN_S = 0.02  # after which a lost interrupt is sent again


def command(
    own: Flags | None = None, *, words: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that has the flags `own`.

    The command takes an argument list as `sys.argv` is, and by default that one. It
    always ends in SystemExit: an error that a user can cause ends it with one line and
    status 1; SIGINT and SIGTERM end it with a line that says how to go on, and status
    128 + signal. A second one does so at once, without cleaning up.

    Each command has a namespace of its own, so that two commands in one process may
    have flags of one name.

    Args:
      words: names of the words that must stand beside the flags; the function gets the
        words as its arguments.
    """
    own = own or Flags()

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            argv = sys.argv if argv is None else argv
            with _flags_of_the_process(own, argv[0]):
                parse = functools.partial(_parse, own)
                guarded = functools.partial(_guarded, main, own, words)
                app.run(guarded, list(argv), flags_parser=parse)

        return run

    return decorate


@contextlib.contextmanager
def _flags_of_the_process(own: Flags, program: str) -> Iterator[None]:
    """Put a command's flags beside absl's own (--help, --flagfile, --pdb)."""
    for name in own.values:
        own.values[name].unparse()
        flags.FLAGS.register_flag_by_module(program, own.values[name])
    flags.FLAGS.append_flag_values(own.values)
    try:
        yield
    finally:
        flags.FLAGS.remove_flag_values(own.values)


def _parse(own: Flags, argv: Sequence[str]) -> list[str]:
    words = app.parse_flags_with_usage(list(argv))
    own.values.mark_as_parsed()
    return words


def _guarded(
    main: Callable[..., None], own: Flags, words: Sequence[str], argv: Sequence[str]
) -> None:
    """Run `main` on its words, with errors in one line and interrupts heard."""
    if len(given := argv[1:]) != len(words):
        expected = " ".join(words) or "flags only"
        raise app.UsageError(f"expected {expected}, got {given}")
    logging.set_verbosity(logging.WARNING)  # JAX and Orbax report what they try
    with _interrupts() as caught:
        try:
            _check_finite(own)
            main(*given)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {_said(error)}")
        except (RuntimeError, AssertionError) as error:
            if (missing := _missing_backend()) is None:
                raise
            raise SystemExit(f"error: {missing}") from error
        except KeyboardInterrupt:
            print(_interrupted(), file=sys.stderr)
            sys.exit(128 + (caught[0] if caught else signal.SIGINT))


def _check_finite(own: Flags) -> None:
    for name, value in own.asked().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name}: expected a finite number, got {value}")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM; yield the signals that came.

    The second ends the process at once, also when it comes after this context: the
    process then only waits for what was begun. An exception in `Thread.join` would make
    Python 3.11 take a thread that runs for one that has ended (bpo-45274), and a thread
    that still compiles when the interpreter ends aborts the process. Files are written
    whole or not at all, so nothing is lost.

    Python cannot raise in a callback of the garbage collector (JAX has one), of a weak
    reference, or in a `__del__`: it gives the exception to `sys.unraisablehook` and
    goes on. A timer then sends the interrupt again, until it comes at a moment when
    Python can raise it.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def interrupt(signum: int, frame: Any) -> None:
        if signum != signal.SIGALRM:
            if caught:
                os.write(2, f"{_interrupted()}\n".encode())
                os._exit(128 + caught[0])
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
            if signum == signal.SIGALRM or not caught:
                signal.signal(signum, handler)
        sys.unraisablehook = hook


def _interrupted() -> str:
    return f"interrupted: what was saved is kept. To go on: {command_line()}"


def command_line() -> str:
    """Return the command line that runs this again."""
    command = pathlib.Path(sys.argv[0])
    if (pathlib.Path(__file__).parents[1] / f"{command.stem}.py").exists():
        return shlex.join(
            ["python", "-m", f"experiments.{command.stem}", *sys.argv[1:]]
        )
    return shlex.join(sys.argv)


def _said(error: ValueError | OSError) -> str:
    """Return an error in a user's words."""
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
    """Return why JAX finds no devices; None if it finds some, or was not asked."""
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
