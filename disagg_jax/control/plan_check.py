"""Checks of a plan: requests that the instance has, in steps within the limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from disagg_jax.control.instance_state import InstanceState
from disagg_jax.control.request_state import Place, RequestState
from disagg_jax.scheduling.interface import Chunk, Plan, RequestView, StepLimits

_BEGINS_IN = (Place.WAITING, Place.PARTIAL)


def check_plan(
    plan: Plan,
    instance: InstanceState,
    limits: StepLimits,
    requests: Mapping[int, RequestState],
) -> list[RequestState]:
    """Check a plan and return the requests of its chunks.

    An engine has programs for steps up to the limits only; a simulation would run any
    step.

    Args:
      instance: the instance of the plan, as the policy saw it.
      requests: all requests that arrived, by id.

    Raises:
      RuntimeError: on a plan that is not allowed, with what was expected.
    """
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuntimeError(f"expected a Plan, got {type(plan).__name__}")
    decodes, chunks = plan.decodes, plan.chunks
    if decodes:
        rows = len(decodes)
        if rows > limits.decode_rows:
            got = f"{rows} requests that decode"
            raise _over("decode_rows", limits.decode_rows, got)
        if decodes is not instance.ready.members:  # most policies name all of them
            _check_decodes(decodes, instance)
    if plan.preempt:
        _check_victims(plan, instance)
    if not chunks:
        return []
    prompts = [_prompt(chunk, instance, requests) for chunk in chunks]
    if len(prompts) > 1 and len({state.id for state in prompts}) < len(prompts):
        ids = [state.id for state in prompts]
        raise RuntimeError(f"expected each prompt once in a step, got requests {ids}")
    _check_chunks(plan, prompts, limits)
    return prompts


def _over(limit: str, most: int, got: str) -> RuntimeError:
    return RuntimeError(
        f"expected a step within the policy's limits, {limit}={most}, got {got}"
    )


def _check_decodes(decodes: Collection[RequestView], instance: InstanceState) -> None:
    ready = instance.ready.members
    if decodes == ready[: len(decodes)]:  # quickly compared
        return
    ids = [request.id for request in decodes]
    if len(set(ids)) < len(ids):
        raise RuntimeError(f"expected each request to decode once, got requests {ids}")
    if missing := set(ids) - {state.id for state in ready}:
        raise RuntimeError(
            f"expected to decode requests that run here, got {sorted(missing)} too"
        )


def _check_victims(plan: Plan, instance: InstanceState) -> None:
    here = {state.id for state in instance.ready.members} | set(instance.partly)
    here -= {request.id for request in plan.decodes}
    here -= {chunk.request.id for chunk in plan.chunks}
    victims = [request.id for request in plan.preempt]
    if not here.issuperset(victims) or len(set(victims)) < len(victims):
        raise RuntimeError(
            "expected to preempt running or partial requests that are not in the "
            f"step, each once, got requests {victims}"
        )


def _prompt(
    chunk: Chunk, instance: InstanceState, requests: Mapping[int, RequestState]
) -> RequestState:
    """Return the request of a chunk, if it waits here or is computed in part."""
    state = requests.get(chunk.request.id)
    if state is None or state.instance != instance.id or state.place not in _BEGINS_IN:
        raise RuntimeError(
            f"request {chunk.request.id}: expected one that waits here or is computed "
            "in part for a chunk"
        )
    start, tokens, reserve = state.cached_tokens, state.num_tokens, chunk.reserve
    end = start + chunk.tokens
    if not start < end <= tokens:
        raise RuntimeError(
            f"request {state.id}: expected a chunk of 1 to {tokens - start} tokens, "
            f"got {chunk.tokens}"
        )
    if not (end <= reserve <= tokens or reserve == state.max_cached_tokens):
        raise RuntimeError(
            f"request {state.id}: expected to reserve {end} to {tokens} tokens, "
            f"or its limit of {state.max_cached_tokens}, got {reserve}"
        )
    return state


def _check_chunks(
    plan: Plan, prompts: Sequence[RequestState], limits: StepLimits
) -> None:
    """Check a step with prompts against the policy's limits."""
    chunks, rows = plan.chunks, len(plan.decodes)
    tokens = sum([chunk.tokens for chunk in chunks])
    if len(chunks) > limits.prefill_rows:
        raise _over("prefill_rows", limits.prefill_rows, f"{len(chunks)} prompts")
    if rows and not limits.mixed:
        raise _over("mixed", False, f"{len(chunks)} prompts beside {rows} decodes")
    if limits.splits:
        tokens += rows
        if tokens > limits.prefill_tokens:
            got = f"{tokens} tokens, decodes included"
            raise _over("prefill_tokens", limits.prefill_tokens, got)
        return
    if tokens > limits.prefill_tokens and len(chunks) > 1:
        got = f"{tokens} tokens of {len(chunks)} prompts"
        raise _over("prefill_tokens", limits.prefill_tokens, got)
    for chunk, state in zip(chunks, prompts, strict=True):
        if chunk.tokens < state.num_tokens:
            got = f"{chunk.tokens} of the {state.num_tokens} tokens of request "
            raise _over("splits", False, f"{got}{state.id}")
