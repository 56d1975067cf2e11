"""Checks the numbers of a file that describes a device or a link."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from disagg_jax.errors import require


def expect_numbers(
    where: str,
    fields: Mapping[str, object],
    known: Collection[str],
    expected: str,
    required: Collection[str] = (),
) -> None:
    """Check that a file has known fields only, the required ones, and numbers in them.

    Args:
      where: the file, as an error names it.
      expected: the fields in words.

    Raises:
      ValueError: saying what was expected of the file.
    """
    complete = set(required) <= set(fields) <= set(known)
    require(complete, f"{where}: expected {expected}", sorted(fields))
    for name, value in fields.items():
        number = isinstance(value, int | float) and math.isfinite(value)
        number = number and not isinstance(value, bool)
        require(number, f"{where}: {name}: expected a finite number", value)
