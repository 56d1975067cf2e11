"""Arrivals x lengths -> requests, of random or given prompts.

The primitives (`Arrivals.times_s`, `Lengths.sample`) take a numpy Generator. The
builders take a seed and spawn one stream for each thing that is random, so that systems
compared at one seed see common random numbers: at another rate the arrivals are the
same ones scaled, and lengths and prompts are the same; a longer run begins with the
shorter one; changing one distribution leaves the draws of the others alone.
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
from disagg_jax.workload.lengths import Lengths

# ---- arrivals ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """How requests are spread in time, whatever the rate.

    Raises:
      ValueError: on an unknown kind, or a `burstiness` that is not > 0 or that the kind
        does not use.
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
        """`[n]` arrival times in seconds, ascending; the first comes after one gap.

        Gaps of mean 1 are divided by `rate_rps`; an infinite rate has all arrive at 0.
        vLLM's generator moreover stretches each run to last exactly n / rate, which
        hides the variation between seeds; this one does not.

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


def make_requests(
    *,
    n: int,
    rate_rps: float,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    seed: int,
    arrivals: Arrivals = POISSON,
    vocab_size: int | None = None,
    ignore_eos: bool = True,
    eos_token: int | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> list[Request]:
    """`n` requests, ids 0 to n - 1 in order of arrival.

    Args:
      vocab_size: with it, prompts are random token ids in [0, vocab_size), 0 included;
        without it, requests have lengths only (enough for a simulation).
      sampling: of every request, but for its seed, which is drawn for each.

    Raises:
      ValueError: if `n` < 1, `rate_rps` is not > 0, `vocab_size` < 1 or `seed` < 0.
    """
    streams = spawn_streams(seed)
    times = arrivals.times_s(n, rate_rps, streams.arrivals).tolist()
    prompt_tokens = prompt_lengths.sample(n, streams.prompt_lengths).tolist()
    output_tokens = output_lengths.sample(n, streams.output_lengths).tolist()
    return build_requests(
        arrivals_s=times,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompts=random_prompts(prompt_tokens, vocab_size, streams.prompts),
        rng=streams.sampling,
        ignore_eos=ignore_eos,
        eos_token=eos_token,
        stop_tokens=stop_tokens,
        sampling=sampling,
    )


def requests_from_prompts(
    *,
    n: int,
    rate_rps: float,
    prompts: Sequence[Sequence[int]],
    output_tokens: Sequence[int],
    seed: int,
    arrivals: Arrivals = POISSON,
    ignore_eos: bool = True,
    eos_token: int | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> list[Request]:
    """`n` requests that go through given prompts (token ids), again and again.

    The arrivals are those of `make_requests` at the same seed. `output_tokens[i]` goes
    with `prompts[i]`.

    Raises:
      ValueError: as `make_requests`, or on no prompts, an empty prompt, or another
        number of output lengths than of prompts.
    """
    require(len(prompts) > 0, "prompts: expected at least one", len(prompts))
    same = len(prompts) == len(output_tokens)
    expected = f"output_tokens: expected one for each of {len(prompts)} prompts"
    require(same, expected, len(output_tokens))
    streams = spawn_streams(seed)
    times = arrivals.times_s(n, rate_rps, streams.arrivals).tolist()
    chosen = [tuple(prompts[i % len(prompts)]) for i in range(n)]
    return build_requests(
        arrivals_s=times,
        prompt_tokens=[len(prompt) for prompt in chosen],
        output_tokens=[output_tokens[i % len(prompts)] for i in range(n)],
        prompts=chosen,
        rng=streams.sampling,
        ignore_eos=ignore_eos,
        eos_token=eos_token,
        stop_tokens=stop_tokens,
        sampling=sampling,
    )


# ---- what every kind of requests is made of ------------------------------------------


class Streams(NamedTuple):
    """Independent streams of one seed. Append only: the order is part of every seed."""

    arrivals: np.random.Generator
    prompt_lengths: np.random.Generator
    output_lengths: np.random.Generator
    prompts: np.random.Generator
    sampling: np.random.Generator


def spawn_streams(seed: int) -> Streams:
    """The streams of `seed`; drawing from one leaves the others alone.

    Raises:
      ValueError: if `seed` < 0.
    """
    require(seed >= 0, "seed: expected >= 0", seed)
    return Streams(*np.random.default_rng(seed).spawn(len(Streams._fields)))


def random_prompts(
    prompt_tokens: Sequence[int], vocab_size: int | None, rng: np.random.Generator
) -> list[tuple[int, ...] | None]:
    """A prompt of each length, of token ids in [0, vocab_size); None without it.

    Raises:
      ValueError: if `vocab_size` < 1.
    """
    if vocab_size is None:
        return [None] * len(prompt_tokens)
    require(vocab_size >= 1, "vocab_size: expected >= 1", vocab_size)
    return [tuple(rng.integers(vocab_size, size=n).tolist()) for n in prompt_tokens]


def build_requests(
    *,
    arrivals_s: Sequence[float],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    prompts: Sequence[tuple[int, ...] | None],
    rng: np.random.Generator,
    ignore_eos: bool,
    eos_token: int | None,
    stop_tokens: frozenset[int],
    sampling: Sampling,
) -> list[Request]:
    """One request of each row of the columns; `rng` draws their sampling seeds."""
    seeds = rng.integers(2**31, size=len(arrivals_s))  # Sampling's range of seeds
    rows = zip(
        arrivals_s, prompt_tokens, output_tokens, prompts, seeds.tolist(), strict=True
    )
    return [
        Request(
            id=i,
            arrival_s=arrival_s,
            prompt_tokens=tokens,
            max_tokens=max_tokens,
            prompt=prompt,
            sampling=dataclasses.replace(sampling, seed=seed),
            eos_token=eos_token,
            stop_tokens=stop_tokens,
            ignore_eos=ignore_eos,
        )
        for i, (arrival_s, tokens, max_tokens, prompt, seed) in enumerate(rows)
    ]
