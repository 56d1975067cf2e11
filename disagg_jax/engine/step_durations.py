"""Durations of an engine's steps before anything is served, and what follows of them.

A search for goodput needs them first: for an SLO in multiples of a step, for the step
sizes that papers choose by profiling, and for the rate to begin with.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from disagg_jax.deployment import Role
from disagg_jax.engine.engine import Engine
from disagg_jax.engine.executor import DurationRule
from disagg_jax.metrics.criteria import UnloadedLatency
from disagg_jax.programs.slices import full_slices, load_slices
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.tuning import (
    TuningInputs,
    has_rule,
    smallest_mixed_s,
    tune,
    untuned,
)
from disagg_jax.work import Slice, Step, StepLoad


@dataclasses.dataclass(frozen=True)
class UnloadedTable:
    """`StepDurations.alone` of known lengths, without an engine."""

    ttft_s: Mapping[int, float]  # by prompt tokens
    tpot_s: Mapping[int, float]  # by mean context

    def __call__(self, request: Request) -> UnloadedLatency:
        return UnloadedLatency(
            ttft_s=self.ttft_s[request.prompt_tokens],
            tpot_s=self.tpot_s[_mean_context(request)],
        )


def _mean_context(request: Request) -> int:
    return request.prompt_tokens + max(1, request.max_tokens // 2)


@dataclasses.dataclass(frozen=True)
class StepDurations:
    """Seconds of single steps of an engine's instances.

    Attributes:
      timing: durations of work that has not run.
    """

    engine: Engine
    timing: DurationRule

    def step_s(self, instance: int, load: StepLoad) -> float:
        """Return the seconds of a step whose blocks are at the front of the pool."""
        return self._slices_s(instance, load_slices(load, self.engine.memory[instance]))

    def prefill_s(self, tokens: int) -> float:
        """Return the seconds to prefill a prompt alone, in as few steps as possible."""
        i = self.engine.deployment.of(Role.PREFILL, Role.COLOCATED)[0]
        most = self.engine.instances[i].buckets.most_prompt_tokens
        return sum(
            self.step_s(i, StepLoad(((start, min(most, tokens - start)),), 0, 0))
            for start in range(0, tokens, most)
        )

    def decode_s(self) -> tuple[float, int]:
        """Return the seconds of the largest decode step, and its rows."""
        i = self._decode
        shape = self.engine.instances[i].buckets.decode[-1]
        slices = full_slices(shape, self.engine.memory[i])
        return self._slices_s(i, slices), shape.rows

    def alone(self, request: Request) -> UnloadedLatency:
        """Return the latencies of one request on an idle engine, less any transfer.

        Every decode step counts as one at the request's mean context.
        """
        return self.unloaded([request])(request)

    def unloaded(self, requests: Iterable[Request]) -> UnloadedTable:
        """Return `alone` for these requests."""
        lengths = {(r.prompt_tokens, _mean_context(r)) for r in requests}
        return UnloadedTable(
            ttft_s={n: self.prefill_s(n) for n in {n for n, _ in lengths}},
            tpot_s={
                context: self.step_s(self._decode, StepLoad((), 1, context))
                for context in {context for _, context in lengths}
            },
        )

    def tuned(
        self,
        policies: Mapping[Role, Policy],
        tpot_s: float,
        requests: Sequence[Request],
    ) -> tuple[dict[Role, Policy], list[str]]:
        """Return policies with the step sizes their papers would choose, and why.

        The sizes to choose from are those that programs were compiled for. A policy
        that declares no step size stays as it is, and is said to be not tuned.
        """
        found, reasons = dict(policies), list[str]()
        for role, policy in policies.items():
            instances = self.engine.deployment.of(role)
            if instances and (why := untuned(policy)):
                reasons.append(f"{role.value} {why}")
            if not instances or not has_rule(policy):
                continue
            tuned = tune(policy, self.tuning_inputs(instances[0], requests), tpot_s)
            found[role] = tuned.policy
            reasons.append(f"{role.value} {tuned.note}")
        return found, reasons

    def smallest_mixed_s(
        self, policies: Mapping[Role, Policy], requests: Sequence[Request]
    ) -> float:
        """Return the seconds of the shortest full step with a prompt beside decodes.

        See `tuning.smallest_mixed_s`.
        """
        return smallest_mixed_s(
            (policy, self.tuning_inputs(instances[0], requests))
            for role, policy in policies.items()
            if policy.limits.mixed and (instances := self.engine.deployment.of(role))
        )

    def tuning_inputs(self, instance: int, requests: Sequence[Request]) -> TuningInputs:
        """Return what step sizes of an instance are chosen by, for these requests."""
        memory = self.engine.memory[instance]
        return TuningInputs(
            step_s=lambda load: self.step_s(instance, load),
            sizes=self.engine.instances[instance].buckets.prompt_sizes,
            prompt_tokens=round(statistics.fmean(r.prompt_tokens for r in requests)),
            output_tokens=round(statistics.fmean(r.max_tokens for r in requests)),
            kv_tokens=memory.num_blocks * memory.block_tokens,
        )

    @property
    def _decode(self) -> int:
        return self.engine.deployment.of(Role.DECODE, Role.COLOCATED)[0]

    def _slices_s(self, instance: int, slices: Sequence[Slice]) -> float:
        found = self.timing(Step.of(0, instance, tuple(slices)), ())
        return sum([*found.durations_s, *found.later_stages_s])
