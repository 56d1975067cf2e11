"""Readers of parsed JSON whose errors say where, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from disagg_jax.errors import require
from disagg_jax.formats import PROFILE


def get_value(record: Mapping[str, object], key: str, where: str) -> object:
    """Return `record[key]`."""
    require(key in record, f"{where}: expected the key {key!r}", sorted(record))
    return record[key]


def as_mapping(value: object, where: str) -> Mapping[str, object]:
    """Return `value`, an object."""
    require(isinstance(value, Mapping), f"{where}: expected an object", value)
    return cast(Mapping[str, object], value)


def get_mapping(
    record: Mapping[str, object], key: str, where: str
) -> Mapping[str, object]:
    """Return `record[key]`, an object."""
    return as_mapping(get_value(record, key, where), f"{where}.{key}")


def get_texts(record: Mapping[str, object], key: str, where: str) -> Mapping[str, str]:
    """Return `record[key]`, an object of texts."""
    inner = get_mapping(record, key, where)
    return {name: get_text(inner, name, key) for name in inner}


def open_profile(record: object, *kinds: str) -> Mapping[str, object]:
    """Return `record`, an object of one of these "kind", without its format number."""
    top = PROFILE.read(as_mapping(record, "profile"))
    came, known = get_text(top, "kind", "profile"), " or ".join(map(repr, kinds))
    require(came in kinds, f"profile.kind: expected {known}", came)
    return top


def get_list(record: Mapping[str, object], key: str, where: str) -> list[object]:
    """Return `record[key]`, a list that is not empty."""
    value = get_value(record, key, where)
    require(
        isinstance(value, list) and value != [],
        f"{where}.{key}: expected a list, not empty",
        cast(object, value),
    )
    return cast(list[object], value)


def get_text(record: Mapping[str, object], key: str, where: str) -> str:
    """Return `record[key]`, a text that is not empty."""
    value = get_value(record, key, where)
    ok = isinstance(value, str) and value != ""
    require(ok, f"{where}.{key}: expected a text, not empty", value)
    return cast(str, value)


def as_number(value: object, where: str) -> float:
    """Return `value`, a finite number."""
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        ok and math.isfinite(cast(float, value)), f"{where}: expected a number", value
    )
    return float(cast(float, value))


def get_numbers(
    record: Mapping[str, object], key: str, where: str
) -> tuple[float, ...]:
    """Return `record[key]`, a list of finite numbers that is not empty."""
    values = get_list(record, key, where)
    return tuple(as_number(value, f"{where}.{key}") for value in values)


def positive_int(value: object, where: str) -> int:
    """Return `value`, an integer >= 1, also as text: JSON's keys are texts."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    ok = isinstance(number, int) and not isinstance(number, bool) and number >= 1
    require(ok, f"{where}: expected an integer >= 1", value)
    return cast(int, number)
