"""What a policy sees of an instance, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol

from disagg_jax.deployment import KVMemory


class RequestView(Protocol):
    """One request, as a policy sees it.

    Prefill, a chunk, a decode and recompute are one thing here: `known - context`
    tokens are to be computed, and a new token comes out when the last of them is.
    """

    @property
    def id(self) -> int: ...

    @property
    def order(self) -> int:
        """Place in arrival order."""
        ...

    @property
    def known(self) -> int:
        """Prompt tokens plus generated tokens."""
        ...

    @property
    def context(self) -> int:
        """Tokens whose KV is cached."""
        ...

    @property
    def limit(self) -> int:
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
        """Prompts computed in part, in order of arrival; not in a step right now."""
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
        """The longest head of `running` that attends to at most `tokens` tokens.

        Each request attends to its cached tokens and the one it computes.
        """
        ...

    @property
    def growth(self) -> int:
        """Blocks that are missing for each of `running` to decode one token."""
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
    tokens: int  # of its known ones, to compute in this step
    # Tokens that its blocks are to hold from now on: `context + tokens` at least, and
    # what is known at most, or else `limit`.
    reserve: int

    @classmethod
    def whole(cls, request: RequestView) -> Chunk:
        """All known tokens at once."""
        return cls(request, request.known - request.context, request.known)


@dataclasses.dataclass(slots=True)
class Plan:
    """The next step of an instance, and who must make room for it."""

    chunks: Sequence[Chunk] = ()
    decodes: Collection[RequestView] = ()  # running: one token each
    # Running or partial: their KV is dropped before the step, and they queue again, the
    # last of them in front.
    preempt: Sequence[RequestView] = ()
    to_back: bool = False  # the preempted go to the end of the queue, not to its front
    # Steps for which this plan holds, while no request comes or goes and no block runs
    # out. A simulation takes that many at once.
    repeats: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """How large a step a policy can ask for; an engine compiles programs up to this."""

    prefill_tokens: int  # prompt tokens in one step, but for one longer prompt
    prefill_rows: int  # prompts in one step; 0 where it never prefills
    decode_rows: int  # requests that decode in one step; 0 where it never decodes
    mixed: bool = False  # whether prompts come beside decodes
    # Whether prompts come in parts. Then `prefill_tokens` bounds a step with its
    # decodes, and no prompt is an exception.
    splits: bool = False


def check_parameters(policy: object, **at_least_one: int) -> None:
    """Raises ValueError unless each named parameter of `policy` is at least 1."""
    for name, value in at_least_one.items():
        if value < 1:
            kind = type(policy).__name__
            raise ValueError(f"{kind}.{name}: expected >= 1, got {value}")


def check_share(policy: object, name: str, share: float) -> None:
    """Raises ValueError unless `share` can be one."""
    if not 0 <= share <= 1:
        kind = type(policy).__name__
        raise ValueError(f"{kind}.{name}: expected in [0, 1], got {share}")


def check_budget(policy: object, name: str, tokens: int, max_seqs: int) -> None:
    """Raises ValueError unless a step has room for a token of every running request."""
    if tokens < max_seqs:
        raise ValueError(
            f"{type(policy).__name__}.{name}: expected >= max_seqs ({max_seqs}), or "
            f"decodes alone could exceed it, got {tokens}"
        )


class Policy(Protocol):
    """Plans the next step of one instance."""

    @property
    def limits(self) -> StepLimits: ...

    def plan(self, instance: InstanceView) -> Plan:
        """The next step; an empty one means nothing can run now."""
        ...


class PullPolicy(Policy, Protocol):
    """A policy of instances that receive KV from others."""

    def pulls(self, instance: InstanceView, request: RequestView) -> bool:
        """Whether to reserve blocks for `request` and fetch its KV now."""
        ...
