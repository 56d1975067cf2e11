"""Scaled rotary frequencies of a model file, as divisors.

Every rule mixes a frequency f with f / factor, and rules differ in the share of f.
Linear scaling (Chen et al. 2023, arXiv 2306.15595) keeps no share. YaRN (Peng et al.
2023, arXiv 2309.00071) and Llama 3.1 keep more of f the faster it turns. Fields have
the names of config.json of Hugging Face's transformers. No JAX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_ANY_KIND = frozenset(
    # Only "yarn" and "llama3" use the last one, but other kinds are published with it.
    ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
)
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
}


class RopeScaling(NamedTuple):
    """The scaling of a model's rotary embedding."""

    divisors: tuple[float, ...] | None = None  # of each frequency, if scaled
    attention_factor: float = 1.0  # of every sine and cosine
    context: int = 0  # tokens of the stretched context; 0: the model's length holds


def read_scaling(fields: Mapping[str, Any], head_dim: int, theta: float) -> RopeScaling:
    """Read the scaling that `rope_scaling` or `rope_parameters` describes.

    Raises:
      ValueError: if the kind is unknown, or a field is missing, contradicts another, is
        out of range, or belongs to no rule of that kind.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    kind = _kind(given)
    numbers = {key: _number(kind, key, given) for key in _REQUIRED[kind]}
    factor = numbers.get("factor", 1.0)
    _expect(factor >= 1, kind, "factor: expected >= 1", factor)
    if kind == "yarn":
        return _yarn(given, numbers, head_dim, theta)
    if factor == 1:
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(_divisors(factor, [0.0] * (head_dim // 2)))
    return RopeScaling(_divisors(factor, _llama3_shares(numbers, head_dim, theta)))


def _kind(given: Mapping[str, Any]) -> str:
    kinds = {given[key] for key in ("rope_type", "type") if key in given} or {"default"}
    if len(kinds) > 1:
        raise ValueError(f"rope_type and type: expected the same, got {sorted(kinds)}")
    kind = kinds.pop()
    if kind not in _REQUIRED:
        raise ValueError(f"rope_type: expected one of {[*_REQUIRED]}, got {kind!r}")
    known = {*_ANY_KIND, *_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    # transformers 5 keeps `partial_rotary_factor` here.
    unknown = set(given) - known - {"partial_rotary_factor"}
    if given.get("partial_rotary_factor", 1) != 1:
        unknown.add("partial_rotary_factor")
    _expect(not unknown, kind, "expected no other fields", sorted(unknown))
    return kind


def _number(
    kind: str, key: str, given: Mapping[str, Any], default: Any = None
) -> float:
    value = given.get(key, default)
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    _expect(ok and 0 < value < math.inf, kind, f"{key}: expected a number > 0", value)
    return float(value)


def _expect(ok: bool, kind: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"rope_type {kind!r}: {expected}, got {got!r}")


def _divisors(factor: float, shares: list[float]) -> tuple[float, ...]:
    """Return f over the mix of f (in `shares`) with f / factor."""
    return tuple(1 / ((1 - share) / factor + share) for share in shares)


def _llama3_shares(
    numbers: Mapping[str, float], head_dim: int, theta: float
) -> list[float]:
    """Return 1 for wavelengths under original / high, 0 over original / low."""
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    expected = f"high_freq_factor: expected > low_freq_factor={low:g}"
    _expect(high > low, "llama3", expected, high)
    original = numbers["original_max_position_embeddings"]
    waves = [original / length for length in _wavelengths(head_dim, theta)]
    return [_clip((wave - low) / (high - low)) for wave in waves]


def _wavelengths(head_dim: int, theta: float) -> Iterator[float]:
    """Yield the tokens in which each pair of a head turns once."""
    for i in range(head_dim // 2):
        yield 2 * math.pi * theta ** (2 * i / head_dim)


def _yarn(
    given: Mapping[str, Any], numbers: Mapping[str, float], head_dim: int, theta: float
) -> RopeScaling:
    factor, original = numbers["factor"], numbers["original_max_position_embeddings"]
    fast = _number("yarn", "beta_fast", given, 32)
    slow = _number("yarn", "beta_slow", given, 1)
    _expect(fast > slow, "yarn", f"beta_fast: expected > beta_slow={slow:g}", fast)

    def pair(turns: float) -> float:  # with that many turns in the original
        return (
            head_dim * math.log(original / (turns * 2 * math.pi)) / 2 / math.log(theta)
        )

    first, last = pair(fast), pair(slow)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = max(last - first, 0.001)  # as in llama.cpp, for a sharp step
    shares = [1 - _clip((i - first) / width) for i in range(head_dim // 2)]
    divisors = _divisors(factor, shares) if factor > 1 else None
    return RopeScaling(
        divisors, _yarn_attention_factor(given, factor), int(original * factor)
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in given:
        return _number("yarn", "attention_factor", given)
    if given.get("mscale") and given.get("mscale_all_dim"):
        scales = [_number("yarn", key, given) for key in ("mscale", "mscale_all_dim")]
    else:
        scales = [1.0, 0.0]
    numerator, denominator = (0.1 * s * math.log(factor) + 1 for s in scales)
    return numerator / denominator


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0)
