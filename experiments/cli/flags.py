"""The flags of a command, and checks of what they hold."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Never, TypeVar, cast

from absl import flags

from disagg_jax.errors import require
from experiments.cli.workers import Workers, parse_workers
from experiments.configs.options import no_effect

T = TypeVar("T")
REQUIRED = cast(Never, object())  # in the place of a default: the flag must be given


class Flags:
    """A command's flags, in a namespace of their own.

    Two commands in one process may so have flags of one name, and a name that is taken
    twice in a command is an error.

    Attributes:
      values: the namespace, as absl's functions take it.
    """

    def __init__(self) -> None:
        self.values = flags.FlagValues()

    def string(self, name: str, default: T, about: str) -> flags.FlagHolder[str | T]:
        return self._define(flags.DEFINE_string, name, default, about)

    def boolean(self, name: str, default: bool, about: str) -> flags.FlagHolder[bool]:
        return self._define(flags.DEFINE_boolean, name, default, about)

    def integer(
        self, name: str, default: T, about: str, *, lower_bound: int | None = None
    ) -> flags.FlagHolder[int | T]:
        return self._define(
            flags.DEFINE_integer, name, default, about, lower_bound=lower_bound
        )

    def float(
        self, name: str, default: T, about: str, *, lower_bound: float | None = None
    ) -> flags.FlagHolder[float | T]:
        return self._define(
            flags.DEFINE_float, name, default, about, lower_bound=lower_bound
        )

    def enum(
        self, name: str, default: T, values: Sequence[str], about: str
    ) -> flags.FlagHolder[str | T]:
        return self._define(flags.DEFINE_enum, name, default, about, enum_values=values)

    def list(
        self, name: str, default: T, about: str
    ) -> flags.FlagHolder[list[str] | T]:
        return self._define(flags.DEFINE_list, name, default, about)

    def multi_string(
        self, name: str, default: T, about: str
    ) -> flags.FlagHolder[list[str] | T]:
        return self._define(flags.DEFINE_multi_string, name, default, about)

    def workers(self) -> flags.FlagHolder[Workers | None]:
        """Define --workers: where simulations run."""
        about = (
            "Processes; one a core by default. Or ray: the cluster of RAY_ADDRESS, or "
            "a new one on this machine. Or HOST:PORT, or ray://HOST:PORT, of a cluster."
        )
        holder = flags.DEFINE(
            _WorkersParser(), "workers", None, about, flag_values=self.values
        )
        return cast("flags.FlagHolder[Workers | None]", holder)

    def asked(self) -> dict[str, Any]:
        """Return the values of the flags by name, but for where and how fast."""
        left_out = ("out", "workers", "minutes")
        return {f: self.values[f].value for f in self.values if f not in left_out}

    def _define(
        self,
        define: Callable[..., Any],
        name: str,
        default: Any,
        about: str,
        **options: Any,
    ) -> Any:
        required = default is REQUIRED
        return define(
            name,
            None if required else default,
            help=about,
            required=required,
            flag_values=self.values,
            **options,
        )


class _WorkersParser(flags.ArgumentParser[Any]):
    def parse(self, argument: Any) -> Workers:
        return parse_workers(str(argument))


def expect_used(
    used: bool, *holders: flags.FlagHolder[Any], expected: str, got: str
) -> None:
    """Check that no flag was set that has no effect beside the others.

    Args:
      used: whether these flags matter.
      expected: the choice that would make the flags matter.

    Raises:
      ValueError: naming the first flag that does not matter and was set.
    """
    for flag in () if used else holders:
        if flag.present and flag.value != flag.default:
            raise no_effect(f"--{flag.name}", flag.value, expected=expected, got=got)


def expect_once(
    flag: flags.FlagHolder[Any], key: str, assignments: Sequence[str]
) -> None:
    """Check that a flag and the config's option `key` are not both set.

    Raises:
      ValueError: if they are, as one of them would have no effect.
    """
    for text in assignments:
        if flag.present and text.partition("=")[0] == key:
            raise no_effect(
                f"--{flag.name}", flag.value, expected="no --set of it", got=text
            )


def integers(name: str, texts: Sequence[str]) -> list[int]:
    """Return the integers of a list flag; a ValueError names the flag."""
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, got {list(texts)}") from error


def rates_rps(name: str, texts: Sequence[str]) -> list[float]:
    """Return the rates of a list flag, in requests/s; a ValueError names the flag."""
    expected = f"{name}: expected different rates above 0 requests/s"
    try:
        found = [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{expected}, got {list(texts)}") from error
    valid = all(0 < rate < math.inf for rate in found)
    require(valid and len(set(found)) == len(found), expected, list(texts))
    return found


def writable(path: str | None) -> pathlib.Path | None:
    """Return the path of a file that can be written; None stays None.

    Raises:
      ValueError: if it is a folder, or its folder cannot be written.
    """
    if path is None:
        return None
    out = pathlib.Path(path)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: expected a file in a writable folder, got '{path}'")
    return out
