"""DistServe's fitted step times: a few measured coefficients for each tp.

The form is that of DistServe's own simulator (OSDI'24; LLMServe/DistServe @ 82831f16),
stated in our words. On each of pp stages, in ms:

    prefill  (a + b S1 + c S2)/pp + 1.0 pp       S1 = sum len, S2 = sum len^2
    decode   (a' + b' sum(ctx + 1) + c' B)/pp    two sets (a', b', c'), chosen by B

and on the first stage also 2.0 + 1e-4 sum(ctx). It has no communication term, and for
pp > 1 it is scaled from the measurement with one stage. It is computed in ms, in this
order, and divided by 1000 at the end, so that whole simulations can be compared with
that simulator's to 1e-6 ms.

Two things are ours, because DistServe neither chunks nor mixes:

* A chunk that computes `count` tokens after `start` cached ones has
  (start + count)^2 - start^2 in the place of len^2: the chunks of a prompt then add up
  to the whole prompt's quadratic (attention) and linear terms. Its ctx in the overhead
  is start + count.
* A step with prompt parts and decodes costs prefill + decode - min(a, a')/pp, and pays
  the overheads once. The constants are mostly the weights streamed through the linear
  layers and the launches, which one pass has once (Sarathi's observation); attention
  over prompts and over contexts adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from disagg_jax.deployment import require_parallelism
from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import require_one_stage
from disagg_jax.work import StepLoad


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillFit:
    """Milliseconds of a prefill: a + b S1 + c S2."""

    base_ms: float  # a
    token_ms: float  # b, per prompt token
    square_ms: float  # c, per squared token; a fit may have got it negative


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeFit:
    """Milliseconds of a decode: a' + b' sum(ctx + 1) + c' B."""

    base_ms: float  # a'
    context_ms: float  # b', per token attended to, the new one included
    request_ms: float  # c', per request

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """a', b' and c'."""
        return self.base_ms, self.context_ms, self.request_ms


@dataclasses.dataclass(frozen=True, slots=True)
class StepFit:
    """What was fitted for one model on one engine with one tp."""

    prefill: PrefillFit
    decode_small: DecodeFit  # where fewer than `large_decodes` requests decode
    decode_large: DecodeFit  # from there on
    large_decodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedCost:
    """A `CostModel` of measured coefficients.

    The three constants are DistServe's; they are not in the profile.
    """

    name: str  # what outputs are marked with
    fits: Mapping[int, StepFit]  # by tp
    stage_ms: float = 1.0  # times pp: of each stage of a prefill, the hand-over
    first_stage_ms: float = (
        2.0  # of a step on the first stage: its RPC ("ray overhead")
    )
    first_stage_token_ms: float = (
        1e-4  # the same per token of context, which it carries
    )

    def instance(self, tp: int, pp: int = 1) -> FittedInstance:
        """The durations on tp x pp devices; any pp, but only a tp that was measured."""
        require_parallelism(tp, pp)
        require(tp in self.fits, f"{self.name}: expected tp in {sorted(self.fits)}", tp)
        return FittedInstance(self, self.fits[tp], pp)


@dataclasses.dataclass(slots=True, eq=False)
class FittedInstance:
    """An `InstanceCost`: `fit` on `pp` stages."""

    cost: FittedCost
    fit: StepFit
    pp: int
    # decode_s reads these in the hot loop; a chain of attributes takes longer.
    _first_ms: float = dataclasses.field(init=False)
    _first_token_ms: float = dataclasses.field(init=False)
    _large_decodes: int = dataclasses.field(init=False)
    _small: tuple[float, float, float] = dataclasses.field(init=False)
    _large: tuple[float, float, float] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._first_ms = self.cost.first_stage_ms
        self._first_token_ms = self.cost.first_stage_token_ms
        self._large_decodes = self.fit.large_decodes
        self._small = self.fit.decode_small.coefficients
        self._large = self.fit.decode_large.coefficients

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Seconds on each stage; all but the first take the same."""
        stage_ms = self._shared_ms(load)
        context = load.context - load.decodes  # without the tokens decoded now
        for start, count in load.chunks:
            context += start + count
        first_ms = self._first_ms + self._first_token_ms * context
        return ((stage_ms + first_ms) / 1000,) + (stage_ms / 1000,) * (self.pp - 1)

    def decode_s(self, decodes: int, context: int) -> float:
        """Seconds of a decode-only step on the one stage."""
        if self.pp != 1:
            require_one_stage(self.pp)
        large = decodes >= self._large_decodes
        base_ms, context_ms, request_ms = self._large if large else self._small
        stage_ms = base_ms + context_ms * context + request_ms * decodes
        first_ms = self._first_ms + self._first_token_ms * (context - decodes)
        return (stage_ms + first_ms) / 1000

    def _shared_ms(self, load: StepLoad) -> float:
        """Milliseconds that every stage takes."""
        if not load.chunks:
            return self._decode_ms(load)
        prefill_ms = self._prefill_ms(load)
        if not load.decodes:
            return prefill_ms
        base_ms = min(self.fit.prefill.base_ms, self._decode_fit(load).base_ms)
        return prefill_ms + self._decode_ms(load) - base_ms / self.pp

    def _prefill_ms(self, load: StepLoad) -> float:
        fit = self.fit.prefill
        whole_ms = (
            fit.base_ms
            + fit.token_ms * load.prompt_tokens
            + fit.square_ms * load.prompt_squares
        )
        return whole_ms / self.pp + self.cost.stage_ms * self.pp

    def _decode_ms(self, load: StepLoad) -> float:
        fit = self._decode_fit(load)
        whole_ms = (
            fit.base_ms + fit.context_ms * load.context + fit.request_ms * load.decodes
        )
        return whole_ms / self.pp

    def _decode_fit(self, load: StepLoad) -> DecodeFit:
        large = load.decodes >= self.fit.large_decodes
        return self.fit.decode_large if large else self.fit.decode_small
