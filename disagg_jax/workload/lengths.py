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
        """`[n]` lengths in tokens, each at least 1."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedLengths:
    """Every request has the same length."""

    tokens: int  # >= 1

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "fixed lengths: expected tokens >= 1", self.tokens)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens; draws nothing from `rng`."""
        return np.full(n, self.tokens, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UniformLengths:
    """Each length from `low` to `high` is as likely as any other."""

    low: int  # >= 1
    high: int  # >= low, included

    def __post_init__(self) -> None:
        _check_bounds("uniform lengths", self.low, self.high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens."""
        return rng.integers(self.low, self.high, size=n, endpoint=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NormalLengths:
    """Normal, rounded, and clipped to [low, high] (which moves the mean)."""

    mean: float  # > 0, tokens, before clipping
    deviation: float  # >= 0, standard deviation in tokens
    low: int = 1  # >= 1
    high: int  # >= low, included

    def __post_init__(self) -> None:
        name = "normal lengths"
        positive = 0 < self.mean < math.inf
        require(positive, f"{name}: expected a finite mean > 0", self.mean)
        valid = 0 <= self.deviation < math.inf
        require(valid, f"{name}: expected a finite deviation >= 0", self.deviation)
        _check_bounds(name, self.low, self.high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens."""
        lengths = self.mean + self.deviation * rng.standard_normal(n)
        return np.clip(np.rint(lengths), self.low, self.high).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LognormalLengths:
    """Log-normal, rounded, and clipped to [low, high] (which moves the mean)."""

    median: float  # > 0, tokens, before clipping
    sigma: float  # >= 0, standard deviation of the log of the length
    low: int = 1  # >= 1
    high: int  # >= low, included; a log-normal tail is long, so it must be chosen

    def __post_init__(self) -> None:
        name = "lognormal lengths"
        positive = 0 < self.median < math.inf
        require(positive, f"{name}: expected a finite median > 0", self.median)
        valid = 0 <= self.sigma < math.inf
        require(valid, f"{name}: expected a finite sigma >= 0", self.sigma)
        _check_bounds(name, self.low, self.high)

    @classmethod
    def from_mean(
        cls, *, mean: float, sigma: float, high: int, low: int = 1
    ) -> LognormalLengths:
        """The one whose mean before clipping is `mean` = median * exp(sigma^2 / 2)."""
        median = mean / math.exp(sigma**2 / 2)
        return cls(median=median, sigma=sigma, low=low, high=high)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`[n]` lengths in tokens."""
        lengths = self.median * np.exp(self.sigma * rng.standard_normal(n))
        return np.clip(np.rint(lengths), self.low, self.high).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HistogramLengths:
    """Lengths known by a histogram, such as a figure of a paper.

    Within a bin, uniform over [left edge, right edge), rounded down; 0 becomes 1. So
    whole edges mean what they do in `np.histogram`: left included, right not.
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
        """`[n]` lengths in tokens."""
        # One row a request, so that a longer run begins with the shorter one.
        draws = rng.random((n, 2))
        cumulative = np.cumsum(self.weights)
        shares = cumulative / cumulative[-1]  # ends with 1 exactly, above every draw
        bins = np.searchsorted(shares, draws[:, 0], side="right")
        edges = np.asarray(self.edges)
        lengths = edges[bins] + draws[:, 1] * np.diff(edges)[bins]
        return np.maximum(np.floor(lengths), 1).astype(np.int64)


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
