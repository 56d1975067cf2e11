"""What every workload is made of: arrivals, streams of random numbers, and requests.

A workload spawns one stream per random quantity from its seed, so that systems compared
at one seed see common random numbers. At another rate the arrivals are scaled, and
lengths and prompts stay. A longer run begins with the shorter one. Changing one
distribution leaves the draws of the others alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from disagg_jax.errors import require
from disagg_jax.request import GREEDY, Request, Sampling

# ---- arrivals ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """How requests are spread in time, at any rate.

    Raises:
      ValueError: on an unknown kind, or a `burstiness` that is not > 0 or without
        effect.
    """

    kind: Literal["poisson", "gamma", "fixed"] = "poisson"
    burstiness: float = 1.0  # gamma shape, as in vLLM: 1 is Poisson, < 1 burstier

    def __post_init__(self) -> None:
        kinds = ("poisson", "gamma", "fixed")
        require(self.kind in kinds, f"arrivals: expected one of {kinds}", self.kind)
        positive = 0 < self.burstiness < math.inf
        require(positive, "burstiness: expected > 0 and finite", self.burstiness)
        if self.kind != "gamma":
            only = f"burstiness: expected 1 unless gamma ({self.kind} has none)"
            require(self.burstiness == 1, only, self.burstiness)

    def times_s(
        self, n: int, rate_rps: float, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Draw `[n]` ascending arrival times in seconds; the first comes after one gap.

        Gaps of mean 1 are divided by `rate_rps`; at an infinite rate all requests
        arrive at 0. Unlike vLLM's generator, this one does not stretch each run to last
        exactly n / rate, which would hide the variation between seeds.

        Raises:
          ValueError: if `n` < 1 or `rate_rps` is not > 0.
        """
        require(n >= 1, "n: expected at least one request", n)
        require(rate_rps > 0, "rate_rps: expected > 0 requests per second", rate_rps)
        return np.cumsum(self._unit_gaps(n, rng)) / rate_rps

    def _unit_gaps(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        if self.kind == "fixed":
            return np.ones(n)
        if self.kind == "gamma":
            return rng.standard_gamma(self.burstiness, n) / self.burstiness
        return rng.standard_exponential(n)


POISSON = Arrivals()


# ---- requests ------------------------------------------------------------------------


class Streams(NamedTuple):
    """Independent streams of one seed. Append only: the order is part of every seed."""

    arrivals: np.random.Generator
    prompt_lengths: np.random.Generator
    output_lengths: np.random.Generator
    prompts: np.random.Generator
    sampling: np.random.Generator


def spawn_streams(seed: int) -> Streams:
    """Return the streams of `seed`; drawing from one leaves the others alone.

    Raises:
      ValueError: if `seed` < 0.
    """
    require(seed >= 0, "seed: expected >= 0", seed)
    return Streams(*np.random.default_rng(seed).spawn(len(Streams._fields)))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenOptions:
    """What all requests of a workload say about tokens.

    Raises:
      ValueError: if `vocab_size` < 1.
    """

    # Random prompts have token ids in [0, vocab_size), 0 included. None: requests have
    # lengths only, which is enough for a simulation.
    vocab_size: int | None = None
    ignore_eos: bool = True
    eos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = GREEDY  # each request draws a seed of its own

    def __post_init__(self) -> None:
        size = self.vocab_size
        require(size is None or size >= 1, "vocab_size: expected >= 1", size)


LENGTHS_ONLY = TokenOptions()


def build_requests(
    *,
    arrivals_s: Sequence[float],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    streams: Streams,
    tokens: TokenOptions,
    prompts: Sequence[tuple[int, ...]] | None = None,
) -> list[Request]:
    """Return one request per row of the columns, with ids 0, 1, ... in that order.

    Args:
      prompts: token ids; by default random ones, if `tokens` has a vocabulary.
    """
    found = prompts or _random_prompts(prompt_tokens, tokens, streams.prompts)
    stop_tokens = frozenset(tokens.stop_tokens)
    seeds = streams.sampling.integers(2**31, size=len(arrivals_s))  # Sampling's range
    rows = zip(
        arrivals_s, prompt_tokens, output_tokens, found, seeds.tolist(), strict=True
    )
    return [
        Request(
            id=i,
            arrival_s=arrival_s,
            prompt_tokens=length,
            max_tokens=max_tokens,
            prompt=prompt,
            sampling=dataclasses.replace(tokens.sampling, seed=seed),
            eos_token=tokens.eos_token,
            stop_tokens=stop_tokens,
            ignore_eos=tokens.ignore_eos,
        )
        for i, (arrival_s, length, max_tokens, prompt, seed) in enumerate(rows)
    ]


def _random_prompts(
    lengths: Sequence[int], tokens: TokenOptions, rng: np.random.Generator
) -> list[tuple[int, ...]] | list[None]:
    if tokens.vocab_size is None:
        return [None] * len(lengths)
    return [tuple(rng.integers(tokens.vocab_size, size=n).tolist()) for n in lengths]
