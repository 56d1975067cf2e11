"""Distributions of prompt and output lengths, and their text form."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from disagg_jax.errors import require


class Lengths(Protocol):
    """A distribution of prompt or output lengths."""

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `[n]` lengths in tokens, each at least 1."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedLengths:
    """Every request has the same length."""

    tokens: int  # >= 1

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "fixed lengths: expected tokens >= 1", self.tokens)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return `[n]` equal lengths in tokens; `rng` stays as it is."""
        return np.full(n, self.tokens, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UniformLengths:
    """Each length from `low` to `high` is equally likely."""

    low: int  # >= 1
    high: int  # >= low, included

    def __post_init__(self) -> None:
        _check_bounds("uniform lengths", self.low, self.high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `[n]` lengths in tokens."""
        return rng.integers(self.low, self.high, size=n, endpoint=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NormalLengths:
    """A normal distribution, rounded and clipped to [low, high].

    Clipping moves the mean.
    """

    mean: float  # > 0, tokens, before clipping
    deviation: float  # >= 0, standard deviation in tokens
    low: int = 1  # >= 1
    high: int  # >= low, included

    def __post_init__(self) -> None:
        _check_spread("normal lengths", self, "mean", "deviation")
        _check_bounds("normal lengths", self.low, self.high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `[n]` lengths in tokens."""
        lengths = self.mean + self.deviation * rng.standard_normal(n)
        return np.clip(np.rint(lengths), self.low, self.high).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LognormalLengths:
    """A log-normal distribution, rounded and clipped to [low, high].

    Clipping moves the mean.
    """

    median: float  # > 0, tokens, before clipping
    sigma: float  # >= 0, standard deviation of the log of the length
    low: int = 1  # >= 1
    high: int  # >= low, included; without a default, as a log-normal tail is long

    def __post_init__(self) -> None:
        _check_spread("lognormal lengths", self, "median", "sigma")
        _check_bounds("lognormal lengths", self.low, self.high)

    @classmethod
    def from_mean(
        cls, *, mean: float, sigma: float, high: int, low: int = 1
    ) -> LognormalLengths:
        """Return the one with this mean, median * exp(sigma^2 / 2), before clipping."""
        median = mean / math.exp(sigma**2 / 2)
        return cls(median=median, sigma=sigma, low=low, high=high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `[n]` lengths in tokens."""
        lengths = self.median * np.exp(self.sigma * rng.standard_normal(n))
        return np.clip(np.rint(lengths), self.low, self.high).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HistogramLengths:
    """Lengths with a given histogram, such as a figure of a paper.

    Within a bin, lengths are uniform over [left edge, right edge), rounded down; 0
    becomes 1. So integer edges mean what they mean in `np.histogram`.
    """

    edges: tuple[float, ...]  # tokens, increasing, from 0 up; one more than weights
    weights: tuple[float, ...]  # >= 0, of any positive sum

    def __post_init__(self) -> None:
        name = "histogram lengths"
        got = (len(self.edges), len(self.weights))
        shaped = got[0] == got[1] + 1 >= 2
        require(shaped, f"{name}: expected one edge more than weights", got)
        rising = all(low < high for low, high in itertools.pairwise(self.edges))
        rising = rising and self.edges[0] >= 0 and math.isfinite(self.edges[-1])
        require(rising, f"{name}: expected edges that increase from >= 0", self.edges)
        valid = all(weight >= 0 for weight in self.weights)
        valid = valid and 0 < sum(self.weights) < math.inf
        expected = f"{name}: expected weights >= 0 with a positive, finite sum"
        require(valid, expected, self.weights)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `[n]` lengths in tokens."""
        # One row per request, so that a longer run begins with the shorter one.
        draws = rng.random((n, 2))
        cumulative = np.cumsum(self.weights)
        shares = cumulative / cumulative[-1]  # ends with 1 exactly, above every draw
        bins = np.searchsorted(shares, draws[:, 0], side="right")
        edges = np.asarray(self.edges)
        lengths = edges[bins] + draws[:, 1] * np.diff(edges)[bins]
        return np.maximum(np.floor(lengths), 1).astype(np.int64)


def _check_spread(name: str, lengths: object, middle: str, spread: str) -> None:
    """Raise ValueError unless the fields hold a middle > 0 and a spread >= 0."""
    value = getattr(lengths, middle)
    expected = f"{name}: expected a finite {middle} > 0"
    require(0 < value < math.inf, expected, value)
    value = getattr(lengths, spread)
    expected = f"{name}: expected a finite {spread} >= 0"
    require(0 <= value < math.inf, expected, value)


def _check_bounds(name: str, low: int, high: int) -> None:
    require(1 <= low <= high, f"{name}: expected 1 <= low <= high", (low, high))


def parse_lengths(text: str) -> Lengths:
    """Parse `fixed:N`, `uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA:HIGH`, in tokens.

    Raises:
      ValueError: on any other text.
    """
    kind, *numbers = text.split(":")
    try:
        match kind, [float(number) for number in numbers]:
            case "fixed", [tokens]:
                return FixedLengths(tokens=int(tokens))
            case "uniform", [low, high]:
                return UniformLengths(low=int(low), high=int(high))
            case "lognormal", [median, sigma, high]:
                return LognormalLengths(median=median, sigma=sigma, high=int(high))
            case _:
                pass
    except (ValueError, OverflowError) as error:  # int(inf) overflows
        raise ValueError(f"lengths '{text}': {error}") from error
    raise ValueError(
        "lengths: expected fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:HIGH, "
        f"got '{text}'"
    )
