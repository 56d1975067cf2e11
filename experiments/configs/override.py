"""Overrides of a config from the command line: `key=value`, keys dotted."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from disagg_jax.scheduling import find_system
from experiments.configs.config import Config, require_one_of
from experiments.configs.options import Need, check

T = TypeVar("T")


def override(
    config: Config,
    assignments: Iterable[str],
    elsewhere: Mapping[str, tuple[Need, ...]] = {},
) -> Config:
    """Return `config` with `key=value` assignments applied and checked.

    A key goes through fields and mappings: `workload.num_requests=50`,
    `systems.vllm_v0.policies.colocated.max_seqs=8`.

    Args:
      elsewhere: needs of options, by key, of the command that asks; see `check`.

    Raises:
      ValueError: naming the known keys, the expected type, or the need of an option
        without effect. Options without effect in `config` itself may stay.
    """
    base = config
    for assignment in assignments:
        config = assign(config, assignment)
    check(config, base, elsewhere)
    return config


def assign(node: T, assignment: str) -> T:
    """Return `node`, a dataclass or a mapping, with one `key=value` applied.

    Raises:
      ValueError: naming the known keys, or the expected type.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set: expected key=value, got '{assignment}'")
    return _assign(node, key, key.split("."), text)


def _assign(node: Any, key: str, path: list[str], text: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, Mapping):
        known = {str(k): k for k in node}
        name, rest = _split(path, known)
        child = node[known[name]] if name in known else None
    else:
        known = {field.name: field.name for field in dataclasses.fields(node)}
        child = getattr(node, name, None)
    if name not in known:
        raise ValueError(
            f"--set {key}: no '{name}' here; expected one of {', '.join(known)}"
        )
    if rest and not (dataclasses.is_dataclass(child) or isinstance(child, Mapping)):
        raise ValueError(f"--set {key}: '{name}' has no parts")
    if rest:
        value = _assign(child, key, rest, text)
    elif dataclasses.is_dataclass(child) or isinstance(child, Mapping):
        raise ValueError(f"--set {key}: '{name}' has parts; name one of them")
    else:
        value = _parse(key, typing.get_type_hints(type(node))[name], text)
    if isinstance(node, Mapping):
        return {**node, known[name]: value}
    return dataclasses.replace(node, **{name: value})


def _split(path: list[str], known: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the one of `known` that a path begins with, and the rest.

    The name of a system may have dots: package.module:attribute.
    """
    for end in range(len(path), 0, -1):
        name = find_system(".".join(path[:end]), known)
        if name in known:
            return name, path[end:]
    return path[0], path[1:]


def _parse(key: str, kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parse(key, item, part) for part in text.split(",") if part)
    if typing.get_origin(kind) is typing.Literal:
        require_one_of(f"--set {key}", text, typing.get_args(kind))
        return text
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            value = kind(text)
        except ValueError:
            pass
        else:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--set {key}: expected a finite number, got '{text}'")
            return value
    raise ValueError(f"--set {key}: expected {kind.__name__}, got '{text}'")
