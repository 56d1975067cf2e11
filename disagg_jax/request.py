"""A client's request (`Request`) and what happened to it (`Timeline`)."""

from __future__ import annotations

import dataclasses
import enum
import math


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The rule that draws the next token from the logits. The default is greedy.

    The n-th token of a request is drawn with `fold_in(key(seed), n)`. So recompute
    after a preemption, and a replay, draw the same tokens.
    """

    temperature: float = 0.0  # >= 0; 0 is greedy and ignores the other fields
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # (0, 1]; keep the smallest set with at least this probability
    seed: int = 0  # [0, 2**31)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected in [0, 2**31), got {self.seed}")


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt and the number of tokens to generate.

    A simulation needs lengths only; the engine needs `prompt` as well.

    Raises:
      ValueError: on a negative or infinite arrival, an empty prompt, `max_tokens` < 1,
        or a prompt whose length is not `prompt_tokens`.
    """

    id: int  # unique within a run
    arrival_s: float  # seconds since the start of the run
    prompt_tokens: int  # length of the prompt
    max_tokens: int  # tokens to generate at most (exactly, if nothing stops it earlier)
    prompt: tuple[int, ...] | None = None  # token ids; None if only lengths matter
    sampling: Sampling = GREEDY
    eos_token: int | None = None  # ends generation, unless `ignore_eos`
    ignore_eos: bool = False  # benchmarks: every system then does the same work
    stop_tokens: frozenset[int] = frozenset()  # end generation always

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(
                f"request {self.id}: expected a finite arrival_s >= 0, "
                f"got {self.arrival_s}"
            )
        if self.prompt_tokens < 1:
            raise ValueError(
                f"request {self.id}: expected a prompt of at least one token, "
                f"got {self.prompt_tokens}"
            )
        if self.max_tokens < 1:
            raise ValueError(
                f"request {self.id}: expected max_tokens >= 1, got {self.max_tokens}"
            )
        if self.prompt is not None and len(self.prompt) != self.prompt_tokens:
            raise ValueError(
                f"request {self.id}: prompt_tokens is {self.prompt_tokens} but the "
                f"prompt has {len(self.prompt)} tokens"
            )

    def stops_at(self, token: int) -> bool:
        """Return whether `token` ends the request (the token itself is kept)."""
        if token in self.stop_tokens:
            return True
        return token == self.eos_token and not self.ignore_eos


class Status(enum.StrEnum):
    """How a request ended; ACTIVE until then."""

    ACTIVE = "active"
    FINISHED = "finished"
    CANCELLED = "cancelled"  # by the client
    REFUSED = "refused"  # at arrival: it could never have been served


@dataclasses.dataclass(kw_only=True, slots=True)
class Timeline:
    """The stamps of one request, in seconds; None means not yet.

    The stamps mark the *first* time through each stage. So work that is repeated after
    a preemption or the loss of an instance counts in the stage it interrupted.
    """

    request: Request
    status: Status = Status.ACTIVE
    prefill_start_s: float | None = None  # the first step with its prompt starts
    transfer_start_s: float | None = None  # the decode side starts to pull its KV
    transfer_end_s: float | None = None  # the KV is in the decode side's blocks
    decode_start_s: float | None = None  # first decode step after the first token
    end_s: float | None = None  # finished, cancelled or refused
    token_s: list[float] = dataclasses.field(default_factory=list[float])  # per token
    tokens: list[int] = dataclasses.field(default_factory=list[int])  # [] in simulation
    # Times at which its KV was dropped to make room, or lost.
    dropped_s: list[float] = dataclasses.field(default_factory=list[float])
    transfer_bytes: int = 0  # KV bytes moved between instances for it, in all
    error: str = ""  # the reason if it was refused

    @property
    def preemptions(self) -> int:
        """Number of times its KV was dropped to make room, or lost."""
        return len(self.dropped_s)
