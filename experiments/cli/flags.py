"""What flags hold, checked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.configs.options import no_effect


def expect_used(
    used: bool, *holders: flags.FlagHolder[Any], expected: str, got: str
) -> None:
    """Check that no flag was set that has no effect beside the others.

    Args:
      used: whether these flags matter.
      expected: what would make them matter.

    Raises:
      ValueError: naming the first one that does not and is not its default.
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
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, got {list(texts)}") from error


def writable(path: str | None) -> pathlib.Path | None:
    if path is None:
        return None
    out = pathlib.Path(path)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: expected a file in a writable folder, got '{path}'")
    return out
