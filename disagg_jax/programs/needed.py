"""The few shapes that known requests need: for a run that waits for its compilation."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import TypeVar

from disagg_jax.deployment import KVMemory
from disagg_jax.programs.buckets import Buckets
from disagg_jax.request import Request
from disagg_jax.scheduling.interface import StepLimits

T = TypeVar("T")
# Fewer need as many, so that small numbers of short prompts share their programs.
_LEAST_ROWS, _LEAST_TOKENS, _LEAST_BLOCKS = 4, 64, 16


def needed_buckets(
    limits: StepLimits, memory: KVMemory, requests: Sequence[Request]
) -> Buckets:
    """List the largest shape of each kind that `requests` can need on one instance.

    `Buckets.for_limits` lists dozens of shapes, so that a step of any load has little
    padding. Here somebody waits for each to be compiled, so there is one of a kind, and
    a second one only where most steps would be padded to much more than they hold: if a
    prompt is longer than the policy's budget, and if the pool is too small for all of
    them. In the last case a request may be preempted, and computed again with the
    tokens that it has generated.

    Sizes are rounded up, so that similar requests need the same programs.

    Args:
      requests: served from an empty pool on; the instance may get all of them.
    """
    prompts = [request.prompt_tokens for request in requests]
    totals = [request.prompt_tokens + request.max_tokens - 1 for request in requests]
    blocks = [memory.blocks_for(tokens) for tokens in totals]
    within_budget = [tokens for tokens in prompts if tokens <= limits.prefill_tokens]
    lengths = [prompts]
    if within_budget and not limits.mixed:
        lengths.insert(0, within_budget)
    if sum(blocks) > memory.num_blocks:
        lengths.append(totals)
    limits = _at_most(limits, rows=len(requests))
    largest = [_for_lengths(limits, memory, each, sum(blocks)) for each in lengths]
    together = sum(heapq.nlargest(limits.decode_rows, blocks))
    return Buckets(
        prefill=_once(each.prefill[-1:] for each in largest),
        mixed=_once(each.mixed[-1:] for each in largest),
        decode_rows=largest[-1].decode_rows[-1:],
        pool_blocks=(_clip(memory.num_blocks, together),) if limits.decode_rows else (),
        transfer_blocks=_once(each.transfer_blocks[-1:] for each in largest),
    )


def _at_most(limits: StepLimits, *, rows: int) -> StepLimits:
    """Return the limits of a policy that has no more than `rows` requests."""
    rows = _round_up(max(_LEAST_ROWS, rows))
    return dataclasses.replace(
        limits,
        prefill_rows=min(limits.prefill_rows, rows),
        decode_rows=min(limits.decode_rows, rows),
    )


def _for_lengths(
    limits: StepLimits, memory: KVMemory, lengths: Sequence[int], blocks: int
) -> Buckets:
    """List the shapes for prompts of these lengths.

    Args:
      blocks: of all requests together, at their ends.
    """
    tokens = _round_up(max(_LEAST_TOKENS, sum(lengths)))
    longest = _round_up(max(_LEAST_TOKENS, *lengths))
    return Buckets.for_limits(
        dataclasses.replace(limits, prefill_tokens=min(limits.prefill_tokens, tokens)),
        dataclasses.replace(
            memory,
            num_blocks=_clip(memory.num_blocks, blocks),
            max_context=min(memory.max_context, longest),
        ),
    )


def _clip(num_blocks: int, needed: int) -> int:
    return min(num_blocks, _round_up(max(_LEAST_BLOCKS, needed)))


def _round_up(size: int) -> int:
    """Return the first 2**i, or 3 * 2**i, that is at least `size`."""
    power = 1 << (size - 1).bit_length()
    between = power * 3 // 4
    return between if between >= size else power


def _once(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return the members of all groups in order, each once."""
    return tuple(dict.fromkeys(member for group in groups for member in group))
