"""Tuning: the step size of each policy, chosen from step times as its paper says.

Each system is only as good as its step size. A policy declares which of its parameters
that is, and the rule that chooses it (`StepSize`). The papers choose by profiling, so a
rule asks a function for the seconds of a step: a cost model, or an engine's profile.

* Sarathi-Serve (OSDI'24, section 4.3): the largest step within the time per token.
* SARATHI (2308.16369, section 4.2): the chunk size with the highest throughput of chunk
  and decodes together.
* Dynamic SplitFuse (the FastGen blog): the size at which the throughput of a forward
  pass levels off.
* DistServe (OSDI'24, section 4.3): L_m, the length of a prompt that fills the device.
* vLLM V1 (its page "Optimization and Tuning"): advice, which for a target means the
  largest step within it too.
* Orca and vLLM V0: no rule; their defaults.
* A policy that declares no step size is not tuned, and results say so.

SARATHI and SplitFuse know no targets. Here they choose among the steps within the TPOT
target, since they are judged by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from disagg_jax.errors import require
from disagg_jax.scheduling.interface import Policy
from disagg_jax.work import StepLoad

StepSeconds = Callable[[StepLoad], float]
# Share of the best throughput: more costs latency, and the curves of devices are flat.
_LEVEL = 0.9
_ROWS = "max_seqs"  # the parameter of all policies that limit their requests
_TILES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def tile_multiples(tile: int = 128, most: int | None = None) -> tuple[int, ...]:
    """Return step sizes to choose from; matmuls compute whole tiles of rows.

    Args:
      most: the largest of them, which need not be a multiple.
    """
    sizes = tuple(tile * n for n in _TILES)
    if most is None:
        return sizes
    return (*(size for size in sizes if size < most), most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningInputs:
    """Step times of an instance, and the requests it will serve.

    Raises:
      ValueError: on no sizes, or on sizes, lengths or memory below 1.
    """

    step_s: StepSeconds  # of one step on the instance, all its stages
    sizes: tuple[int, ...]  # tokens of a step to choose from, such as an engine's
    prompt_tokens: int  # of a typical request
    output_tokens: int
    kv_tokens: int  # tokens that the instance has memory for

    def __post_init__(self) -> None:
        require(len(self.sizes) >= 1, "sizes: expected at least one", self.sizes)
        least = min(*self.sizes, self.prompt_tokens, self.output_tokens, self.kv_tokens)
        require(least >= 1, "tuning: expected tokens >= 1", least)

    def decodes(self, size: int, max_seqs: int) -> int:
        """Return the requests that decode in a step of `size` tokens in steady state.

        Steps then mix prompt and decode tokens as the requests do, unless `max_seqs` or
        the memory allows fewer decodes. The result is less than `size`.
        """
        steps = self.output_tokens - 1
        share = steps / (self.prompt_tokens + steps)
        return min(int(size * share), max_seqs, self.kv_tokens // self.context)

    @property
    def context(self) -> int:
        """Cached tokens of a request halfway through its output."""
        return self.prompt_tokens + self.output_tokens // 2

    def mixed(self, size: int, max_seqs: int, max_chunks: int) -> StepLoad:
        """Return a step of `size` tokens: whole prompts, a last part of one, decodes.

        With more than `max_chunks` chunks, the last is of a longer prompt instead.
        """
        decodes = self.decodes(size, max_seqs)
        left, prompt = size - decodes, self.prompt_tokens
        whole, part = divmod(left, prompt)
        chunks = ((0, prompt),) * whole
        if part:
            chunks += ((prompt - part, part),)
        if len(chunks) > max_chunks:
            others = max_chunks - 1
            chunks = (*chunks[:others], (0, left - others * prompt))
        return StepLoad(chunks, decodes, decodes * self.context)


Rule = Callable[[Policy, TuningInputs, float], tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class StepSize:
    """A policy's declaration of its step size, as its class attribute `step_size`.

        step_size: ClassVar[StepSize] = StepSize("token_budget", largest_in_time)

    Attributes:
      parameter: the field of the policy that holds the tokens of a step.
      rule: takes the policy, its inputs and the TPOT target in seconds, and returns the
        value and the reason in words. None: the default stays.
    """

    parameter: str
    rule: Rule | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The value of a policy's parameter, and the reason for it."""

    parameter: str
    value: int
    reason: str

    def __str__(self) -> str:
        return f"{self.parameter} = {self.value}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """A policy with parameters for an instance, requests and targets."""

    policy: Policy
    choice: Choice | None  # None: it declares no step size

    @property
    def note(self) -> str:
        """Say what was chosen and why, or what `untuned` says."""
        return str(self.choice or untuned(self.policy))


def tune(
    policy: Policy, inputs: TuningInputs, tpot_s: float, size: int | None = None
) -> Tuned:
    """Return `policy` with the step size that its paper would choose.

    If decodes share the step, `max_seqs` is lowered to a smaller step size. A policy
    without a step size stays as it was.

    Args:
      tpot_s: the target; a step should not take longer while requests decode.
      size: a step size to take instead of the paper's.
    """
    declared = step_size(policy)
    if declared is None:
        return Tuned(policy=policy, choice=None)
    value, reason = getattr(policy, declared.parameter), "the default"
    if size:
        value, reason = size, "given"
    elif declared.rule:
        value, reason = declared.rule(policy, inputs, tpot_s)
    return Tuned(
        policy=resized(policy, value),
        choice=Choice(parameter=declared.parameter, value=value, reason=reason),
    )


def step_size(policy: Policy) -> StepSize | None:
    """Return the step size that a policy declares; None if it declares none.

    Raises:
      ValueError: if the policy has no field of that name.
    """
    declared: StepSize | None = getattr(policy, "step_size", None)
    if declared is not None:
        expected = f"{type(policy).__name__}.step_size: expected one of its fields"
        require(declared.parameter in _fields(policy), expected, declared.parameter)
    return declared


def has_rule(policy: Policy) -> bool:
    """Return whether the policy's paper says how to choose its step size."""
    declared = step_size(policy)
    return declared is not None and declared.rule is not None


def untuned(policy: Policy) -> str:
    """Say that a policy declares no step size; '' if its steps have no prompts."""
    if step_size(policy) is not None or not policy.limits.prefill_rows:
        return ""
    return f"not tuned: {type(policy).__name__} declares no step size"


def resized(policy: Policy, size: int) -> Policy:
    """Return `policy` with steps of `size` tokens, or itself if it has no step size."""
    declared = step_size(policy)
    if declared is None:
        return policy
    changes = {declared.parameter: size}
    if policy.limits.splits and "max_seqs" in _fields(policy):
        changes["max_seqs"] = min(cast(Any, policy).max_seqs, size)
    return dataclasses.replace(cast(Any, policy), **changes)


def capped(policy: Policy, tokens: int, rows: int) -> Policy:
    """Return `policy` with steps of `tokens` tokens and `max_seqs` of `rows` at most.

    A parameter that is smaller, or that the policy does not have, stays.
    """
    declared = step_size(policy)
    if declared is not None:
        policy = resized(policy, min(getattr(policy, declared.parameter), tokens))
    if "max_seqs" not in _fields(policy):
        return policy
    most = min(cast(Any, policy).max_seqs, rows)
    return dataclasses.replace(cast(Any, policy), max_seqs=most)


def limited(policy: Policy, tokens: int, rows: int) -> Policy:
    """Return `policy` with steps of `tokens` tokens and `max_seqs` of `rows`.

    If decodes share the step, `max_seqs` is `tokens` at most. A parameter that the
    policy does not have is left out.
    """
    rows = min(rows, tokens) if policy.limits.splits else rows
    sizes = {name: rows if name == _ROWS else tokens for name in _limits(policy)}
    return dataclasses.replace(cast(Any, policy), **sizes) if sizes else policy


def replicated(policy: Policy, replicas: int) -> Policy:
    """Return `policy` with the limits of `replicas` instances together."""
    sizes = {name: replicas * getattr(policy, name) for name in _limits(policy)}
    return dataclasses.replace(cast(Any, policy), **sizes) if sizes else policy


def _limits(policy: Policy) -> list[str]:
    """Return the parameters that a policy has of its step size and `max_seqs`."""
    declared = step_size(policy)
    names = [_ROWS] if declared is None else [declared.parameter, _ROWS]
    return [name for name in names if name in _fields(policy)]


def _fields(policy: Policy) -> set[str]:
    return set(getattr(policy, "__dataclass_fields__", ()))


def smallest_mixed_s(served: Iterable[tuple[Policy, TuningInputs]]) -> float:
    """Return the seconds of the shortest full step with a prompt beside decodes.

    A policy that splits prompts has a part of one in it, others a typical prompt at
    least. It is 0 where no step has both.

    Args:
      served: the policies of a system, each with the inputs of its instances.
    """
    shortest_s: list[float] = []
    for policy, inputs in served:
        limits = policy.limits
        if not (limits.mixed and limits.decode_rows):
            continue
        least = 0 if limits.splits else inputs.prompt_tokens
        shortest_s += [
            inputs.step_s(inputs.mixed(size, limits.decode_rows, limits.prefill_rows))
            for size in inputs.sizes
            if size > least
        ]
    return min(shortest_s, default=0.0)


# ---- the rules -----------------------------------------------------------------------


def largest_in_time(
    policy: Policy, inputs: TuningInputs, tpot_s: float
) -> tuple[int, str]:
    """Choose the largest step within the target: Sarathi-Serve's budget."""
    times_s = _mixed_s(policy, inputs)
    in_time = _in_time(times_s, tpot_s)
    size = max(in_time)
    return size, f"the largest step within TPOT{_shown(times_s, size, tpot_s)}"


def best_chunk(policy: Policy, inputs: TuningInputs, tpot_s: float) -> tuple[int, str]:
    """Choose SARATHI's chunk for whole prompts, a chunk with decodes at a time."""

    def tokens_s(size: int) -> float:
        decodes = inputs.decodes(size, policy.limits.decode_rows)
        count, prompt = size - decodes, inputs.prompt_tokens
        loads = [
            StepLoad(
                ((start, min(count, prompt - start)),),
                decodes,
                decodes * inputs.context,
            )
            for start in range(0, prompt, count)
        ]
        tokens = prompt + len(loads) * decodes
        return _rate(tokens, sum(map(inputs.step_s, loads)))

    times_s = _mixed_s(policy, inputs)
    size = _level({n: tokens_s(n) for n in _in_time(times_s, tpot_s)})
    reason = "throughput of chunk and decodes levels off"
    return size, reason + _shown(times_s, size, tpot_s)


def level_in_time(
    policy: Policy, inputs: TuningInputs, tpot_s: float
) -> tuple[int, str]:
    """Choose the step at which throughput levels off: SplitFuse's budget."""
    times_s = _mixed_s(policy, inputs)
    rates = _prompt_tokens_s(inputs)
    size = _level({n: rates[n] for n in _in_time(times_s, tpot_s)})
    reason = "throughput of a forward pass levels off"
    return size, reason + _shown(times_s, size, tpot_s)


def saturating_prompt(
    policy: Policy, inputs: TuningInputs, tpot_s: float
) -> tuple[int, str]:
    """Choose DistServe's L_m; no decode waits for prompts, so the target is ignored."""
    rates = _prompt_tokens_s(inputs)
    size = _level(rates)
    return size, f"a prompt of it saturates the device: {rates[size]:.4g} tokens/s"


def _mixed_s(policy: Policy, inputs: TuningInputs) -> dict[int, float]:
    """Return the seconds of a saturated step, by its size."""
    chunks = policy.limits.prefill_rows
    return {
        size: inputs.step_s(inputs.mixed(size, policy.limits.decode_rows, chunks))
        for size in inputs.sizes
    }


def _in_time(times_s: Mapping[int, float], tpot_s: float) -> list[int]:
    """Return the sizes within the target, or the smallest if none is."""
    return [n for n, time_s in times_s.items() if time_s <= tpot_s] or [min(times_s)]


def _prompt_tokens_s(inputs: TuningInputs) -> dict[int, float]:
    """Return the prompt tokens/s of a forward pass of one prompt, by its length."""
    return {
        size: _rate(size, inputs.step_s(StepLoad(((0, size),), 0, 0)))
        for size in inputs.sizes
    }


def _level(tokens_s: Mapping[int, float]) -> int:
    """Return the smallest size near the best throughput."""
    best = max(tokens_s.values())
    return min(size for size, rate in tokens_s.items() if rate >= _LEVEL * best)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else math.inf


def _shown(times_s: Mapping[int, float], size: int, tpot_s: float) -> str:
    time_s = times_s[size]
    shown = f": {time_s * 1e3:.3g} of {tpot_s * 1e3:.3g} ms"
    return shown if time_s <= tpot_s else f"{shown}, and all others are slower"
