"""The scenario of `experiments.stalls`: requests decode, and a prompt arrives."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from disagg_jax import metrics
from disagg_jax.deployment import KVMemory, Role
from disagg_jax.engine.executor import DurationRule, as_measured
from disagg_jax.engine.placed_model import PlacedModel
from disagg_jax.engine.served_deployment import ServedDeployment
from disagg_jax.errors import require
from disagg_jax.programs import Buckets, StepShape
from disagg_jax.request import Request, Timeline
from disagg_jax.scheduling import Policy, get_system
from experiments.benchmarks.engines import benchmark_engine, only
from models.checkpoint import Weights
from models.config import ModelConfig

_BLOCK = 16  # tokens in a block
_SHORT = 32  # tokens of the prompts of the requests that decode
_BEFORE, _TOKENS = 16, 64  # tokens they have when the prompt arrives, and in all
_WARM = 3  # runs before; the first is slow


@dataclasses.dataclass(frozen=True, kw_only=True)
class StallScenario:
    """Requests that decode, and the prompts of which one arrives.

    Raises:
      ValueError: on numbers that no system can serve.
    """

    decodes: int = 8
    prompts: tuple[int, ...] = (64, 128, 256, 512)  # tokens
    chunk: int = 64  # tokens of a mixed step, the decodes included
    repeats: int = 5

    def __post_init__(self) -> None:
        require(self.decodes >= 1, "decodes: expected >= 1", self.decodes)
        shortest = min(self.prompts, default=0)
        require(shortest >= 1, "prompts: expected tokens >= 1", list(self.prompts))
        more = f"chunk: expected more tokens than {self.decodes} decodes"
        require(self.chunk > self.decodes, more, self.chunk)
        require(self.repeats >= 1, "repeats: expected >= 1", self.repeats)

    @property
    def memory(self) -> KVMemory:
        """A pool that just holds all requests."""
        longest = math.ceil((max(self.prompts) + 1) / _BLOCK) * _BLOCK
        each = math.ceil((_SHORT + _TOKENS) / _BLOCK)
        return KVMemory(
            num_blocks=self.decodes * each + longest // _BLOCK + 1,
            block_tokens=_BLOCK,
            max_context=max(longest, _SHORT + _TOKENS),
        )

    def requests(self, prompt: int, arrival_s: float, vocab: int) -> list[Request]:
        """Return the requests that decode, and last one with `prompt` tokens."""
        rng = np.random.default_rng(0)

        def request(id: int, tokens: int, at_s: float, output: int) -> Request:
            return Request(
                id=id,
                arrival_s=at_s,
                prompt_tokens=tokens,
                max_tokens=output,
                prompt=tuple(rng.integers(0, vocab, tokens).tolist()),
                ignore_eos=True,
            )

        decoding = [request(i, _SHORT, 0.0, _TOKENS) for i in range(self.decodes)]
        return [*decoding, request(self.decodes, prompt, arrival_s, 1)]


def systems(
    scenario: StallScenario,
) -> dict[str, tuple[str, Mapping[Role, Policy], list[Buckets]]]:
    """Return the deployment, policies and only programs of each system.

    They are three colocated systems on one device, and disaggregation on two.
    """
    rows, chunk, memory = scenario.decodes + 1, scenario.chunk, scenario.memory
    blocks = tuple(sorted({memory.blocks_for(n) for n in (_SHORT, *scenario.prompts)}))
    decodes = only(decode_rows=(rows,), pool_blocks=(memory.num_blocks,))
    sizes = sorted({*scenario.prompts, scenario.decodes * _SHORT})
    prefill = tuple(StepShape.prefill(n, min(rows, max(1, n // 8))) for n in sizes)
    chunks = StepShape.mixed(
        tokens=chunk,
        rows=rows,
        context=max(blocks) + chunk // _BLOCK,
        decodes=rows,
        blocks=memory.num_blocks,
    )
    return {
        "vllm_v0": (
            "colocated:tp1",
            get_system(
                "vllm_v0", colocated={"max_batched_tokens": sizes[-1], "max_seqs": rows}
            ),
            [dataclasses.replace(decodes, prefill=prefill)],
        ),
        "vllm_v1": (
            "colocated:tp1",
            get_system(
                "vllm_v1", colocated={"max_batched_tokens": chunk, "max_seqs": rows}
            ),
            [dataclasses.replace(decodes, mixed=(chunks,))],
        ),
        "sarathi_serve": (
            "colocated:tp1",
            get_system(
                "sarathi_serve", colocated={"token_budget": chunk, "max_seqs": rows}
            ),
            [dataclasses.replace(decodes, mixed=(chunks,))],
        ),
        "disaggregated": (
            "prefill:tp1,decode:tp1",
            get_system(
                "disaggregated",
                prefill={"token_budget": sizes[-1], "max_seqs": rows},
                decode={"max_seqs": rows},
            ),
            [
                only(prefill=prefill, transfer_blocks=blocks),
                dataclasses.replace(decodes, transfer_blocks=blocks),
            ],
        ),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stall:
    """The effect of one prompt on the requests that were decoding; times in s."""

    system: str
    prompt: int  # tokens
    gap_s: float  # median between tokens while no prompt is there
    longest_s: float  # gap of the requests that decode; median over the repeats
    ttft_s: float  # of the prompt; median over the repeats
    # (end of a gap, gap) of one request that decodes, in the repeat with the median
    # longest gap; the prompt arrives at 0.
    gaps: tuple[tuple[float, float], ...]

    @property
    def times(self) -> float:
        """Return the longest gap over the ordinary gap."""
        return self.longest_s / self.gap_s


def measure(
    config: ModelConfig,
    params: Weights,
    scenario: StallScenario,
    progress: Callable[[str], None] = lambda text: None,
    timing: DurationRule = as_measured,
) -> list[Stall]:
    """Measure every system at every prompt.

    Args:
      timing: the duration of a program; by default the time it took.

    Raises:
      ValueError: if a prompt is longer than the model's context.
    """
    memory = scenario.memory
    room = f"prompts: expected at most {config.max_length - 1} tokens for {config.name}"
    require(memory.max_context <= config.max_length, room, memory.max_context - 1)
    found: list[Stall] = []
    shared: dict[Any, PlacedModel] = {}
    for name, (deployment, policies, buckets) in systems(scenario).items():
        progress(f"{name}: {deployment}")
        engine = benchmark_engine(
            config,
            deployment,
            [memory] * len(buckets),
            buckets,
            params=params,
            models=shared,
            virtual=True,
        )
        served = ServedDeployment(
            engine=engine, policies=policies, timing=timing, warm_up=True
        )
        found += _stalls(name, served, scenario)
    return found


def _stalls(
    name: str, served: ServedDeployment, scenario: StallScenario
) -> Iterator[Stall]:
    vocab = served.engine.config.vocab_size

    def run(prompt: int, arrival_s: float) -> list[Timeline]:
        return served.run(scenario.requests(prompt, arrival_s, vocab)).timelines

    # The prompt comes so long after the decodes that none of them sees it.
    *decoding, _ = min(
        (run(scenario.prompts[0], 1e6) for _ in range(_WARM)),
        key=lambda timelines: metrics.e2e_s(timelines[0]),
    )
    arrival_s = max(timeline.token_s[_BEFORE] for timeline in decoding)
    gap_s = statistics.median(metrics.pooled_itl_s(decoding).tolist())
    for prompt in scenario.prompts:
        runs = [run(prompt, arrival_s) for _ in range(scenario.repeats)]
        runs.sort(key=lambda timelines: _longest_s(timelines, arrival_s))
        middle = runs[len(runs) // 2]
        yield Stall(
            system=name,
            prompt=prompt,
            gap_s=gap_s,
            longest_s=_longest_s(middle, arrival_s),
            ttft_s=statistics.median(metrics.ttft_s(run[-1]) for run in runs),
            gaps=tuple(
                (end - arrival_s, end - start)
                for start, end in itertools.pairwise(middle[0].token_s)
            ),
        )


def _longest_s(timelines: Sequence[Timeline], since_s: float) -> float:
    """Return the longest gap that ends after `since_s`; the last request has none.

    Raises:
      ValueError: if there is no such gap, as the machine became faster by far.
    """
    gaps_s = [
        end - start
        for timeline in timelines[:-1]
        for start, end in itertools.pairwise(timeline.token_s)
        if end > since_s
    ]
    if not gaps_s:
        raise ValueError(
            "expected requests that decode when the prompt comes, but all ended before "
            "the prompt came: the machine's speed changed; run again when it is quiet"
        )
    return max(gaps_s)
