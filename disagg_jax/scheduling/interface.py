"""The interface of policies: views of instances and requests in, plans out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol

from disagg_jax.deployment import KVMemory
from disagg_jax.errors import require


class RequestView(Protocol):
    """One request, as a policy sees it.

    Prefill, a chunk, a decode and recompute are one thing here: `num_tokens -
    cached_tokens` tokens are to be computed, and the last of them yields a new token.
    vLLM calls the cached tokens `num_computed_tokens`.
    """

    @property
    def id(self) -> int: ...

    @property
    def order(self) -> int:
        """Place in arrival order."""
        ...

    @property
    def num_tokens(self) -> int:
        """Prompt tokens plus generated tokens."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens whose KV is cached."""
        ...

    @property
    def max_cached_tokens(self) -> int:
        """Tokens whose KV it can ever need: all but the last one it may generate."""
        ...


class BlocksView(Protocol):
    """The KV blocks of an instance, for reading."""

    @property
    def memory(self) -> KVMemory: ...

    @property
    def free(self) -> int: ...

    def held(self, owner: int) -> int: ...

    def missing(self, owner: int, tokens: int) -> int: ...


class InstanceView(Protocol):
    """One instance, as a policy or a router sees it. A request is in one place only."""

    @property
    def id(self) -> int: ...

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Requests to compute from their first token, in queue order."""
        ...

    @property
    def partial(self) -> Sequence[RequestView]:
        """Requests prefilled in part, in order of arrival; not in a step right now."""
        ...

    @property
    def running(self) -> Sequence[RequestView]:
        """Requests ready to decode here, in queue order; not in a step right now."""
        ...

    @property
    def running_context(self) -> int:
        """Cached tokens of all of `running` together."""
        ...

    def running_within(self, tokens: int) -> Sequence[RequestView]:
        """Return the longest head of `running` that attends to at most `tokens` tokens.

        Each request attends to its cached tokens and the one it computes.
        """
        ...

    @property
    def blocks_for_next_token(self) -> int:
        """Blocks that `running` must still get to decode one token each."""
        ...

    @property
    def blocks(self) -> BlocksView: ...

    @property
    def queued(self) -> int:
        """Requests without a first token: waiting, or in their prefill."""
        ...

    @property
    def load(self) -> int:
        """All requests that are assigned to this instance."""
        ...

    @property
    def resident(self) -> int:
        """Requests that hold KV here and will decode, arriving transfers included."""
        ...


@dataclasses.dataclass(slots=True)
class Chunk:
    """The next tokens of a request that does not decode yet."""

    request: RequestView  # waiting or partial
    tokens: int  # to compute in this step
    # Tokens that its blocks hold from now on: from `cached_tokens + tokens` up to
    # `num_tokens`, or else `max_cached_tokens`.
    reserve: int

    @classmethod
    def whole(cls, request: RequestView) -> Chunk:
        """Make a chunk of all tokens of a request that have no KV."""
        return cls(
            request, request.num_tokens - request.cached_tokens, request.num_tokens
        )

    @classmethod
    def up_to(cls, request: RequestView, tokens: int) -> Chunk:
        """Make a chunk of at most `tokens` tokens, with blocks for all of a prompt."""
        all_tokens = request.num_tokens
        left = all_tokens - request.cached_tokens
        return cls(request, min(left, tokens), all_tokens)

    @classmethod
    def piece(cls, request: RequestView, tokens: int) -> Chunk:
        """Make a chunk of at most `tokens` tokens, with blocks for its own end only."""
        cached = request.cached_tokens
        count = min(request.num_tokens - cached, tokens)
        return cls(request, count, cached + count)


@dataclasses.dataclass(slots=True)
class Plan:
    """The next step of an instance, and the requests that make room for it."""

    chunks: Sequence[Chunk] = ()
    decodes: Collection[RequestView] = ()  # running: one token each
    # Running or partial requests: their KV is dropped before the step, and they queue
    # again, the last of them in front.
    preempt: Sequence[RequestView] = ()
    to_back: bool = False  # preempted requests queue at the end, not in front
    # Steps for which this plan holds while no request comes or goes and blocks last. A
    # simulation takes that many at once.
    repeats: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """How large a step a policy can ask for; an engine compiles programs up to this."""

    prefill_tokens: int  # prompt tokens in one step, unless one prompt alone is longer
    prefill_rows: int  # prompts in one step; 0 where it never prefills
    decode_rows: int  # requests that decode in one step; 0 where it never decodes
    mixed: bool = False  # whether a step has prompts beside decodes
    # Whether prompts are split. Then `prefill_tokens` bounds a step with its decodes,
    # and no prompt is an exception.
    splits: bool = False

    @classmethod
    def of_chunks(cls, tokens: int, rows: int, *, decodes: bool = True) -> StepLimits:
        """Make the limits of a policy that splits prompts to fill `tokens`."""
        return cls(
            prefill_tokens=tokens,
            prefill_rows=rows,
            decode_rows=rows if decodes else 0,
            mixed=True,
            splits=True,
        )


def check_parameters(
    policy: object, *counts: str, budget: str = "", share: str = ""
) -> None:
    """Raise a ValueError unless the named parameters of `policy` are possible.

    Args:
      counts: parameters that are at least 1.
      budget: the tokens of a step, at least `max_seqs`, or decodes could exceed it.
      share: a parameter in [0, 1].
    """
    kind, values = type(policy).__name__, vars(policy)
    for name in counts:
        require(values[name] >= 1, f"{kind}.{name}: expected >= 1", values[name])
    if budget:
        most = values["max_seqs"]
        expected = f"expected >= max_seqs ({most}), or decodes alone could exceed it"
        require(values[budget] >= most, f"{kind}.{budget}: {expected}", values[budget])
    if share:
        within = 0 <= values[share] <= 1
        require(within, f"{kind}.{share}: expected in [0, 1]", values[share])


class Policy(Protocol):
    """Plans the next step of one instance.

    It may declare the parameter that is its step size, see `tuning.StepSize`.
    """

    @property
    def limits(self) -> StepLimits: ...

    def plan(self, instance: InstanceView) -> Plan:
        """Return the next step; an empty plan if nothing can run now."""
        ...


class PullPolicy(Policy, Protocol):
    """A policy of instances that receive KV from others."""

    def admits_pull(self, instance: InstanceView, request: RequestView) -> bool:
        """Return whether to reserve blocks for `request` and fetch its KV now."""
        ...
