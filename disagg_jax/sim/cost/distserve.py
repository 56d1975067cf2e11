"""DistServe's fitted step times: a few measured coefficients for each tp.

The form is that of DistServe's own simulator (OSDI'24; LLMServe/DistServe @ 82831f16),
stated in our words. On each of pp stages, in ms:

    prefill  (a + b S1 + c S2)/pp + 1.0 pp       S1 = sum len, S2 = sum len^2
    decode   (a' + b' sum(ctx + 1) + c' B)/pp    two sets (a', b', c'), chosen by B

and on the first stage also 2.0 + 1e-4 sum(ctx). The form has no communication term, and
pp > 1 is scaled from the measurement with one stage. Times are computed in ms, in this
order, and divided by 1000 at the end: whole simulations then agree with that simulator
to 1e-6 ms.

Two rules are ours, because DistServe neither chunks nor mixes:

* A chunk that computes `count` tokens after `start` cached ones has
  (start + count)^2 - start^2 in the place of len^2: the chunks of a prompt then add up
  to the whole prompt's quadratic (attention) and linear terms. Its ctx in the overhead
  is start + count.
* A step with prompt parts and decodes costs prefill + decode - min(a, a')/pp, and pays
  the overheads once. The constants are mostly the weights streamed through the linear
  layers and the launches, which one pass has once (Sarathi's observation); attention
  over prompts and over contexts adds.

The coefficients come as a JSON record (experiments/profiles/distserve_a100_opt.json):

    {"format": 1,                     see `formats.py`; a record without it has 0
     "name": "distserve-a100",        outputs are marked with it
     "kind": "fitted",
     "provenance": {...},             texts: source, licence, what was fitted on what
     "warnings": {"ENGINE/MODEL/tpN": "text"},    may be {}
     "fits": {ENGINE: {MODEL: {TP: {
        "prefill": [a, b, c],         ms, ms per token, ms per squared token
        "decode_small": [a', b', c'], ms, ms per context token, ms per request
        "decode_large": [a', b', c'],
        "large_decodes": 95}}}},      the least B of decode_large
     "kv_tokens": {MODEL: {"TP,PP": tokens}}}     the KV capacity of an instance
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import require_one_stage
from disagg_jax.sim.cost.profile_json import (
    get_mapping,
    get_numbers,
    get_text,
    get_texts,
    open_profile,
    positive_int,
)
from disagg_jax.work import StepLoad


class PrefillFit(NamedTuple):
    """Milliseconds of a prefill: a + b S1 + c S2."""

    base_ms: float  # a
    token_ms: float  # b, per prompt token
    square_ms: float  # c, per squared token; some published fits have c < 0


class DecodeFit(NamedTuple):
    """Milliseconds of a decode: a' + b' sum(ctx + 1) + c' B."""

    base_ms: float  # a'
    context_ms: float  # b', per token attended to, the new one included
    request_ms: float  # c', per request


class StepFit(NamedTuple):
    """The coefficients of one model on one engine with one tp."""

    prefill: PrefillFit
    decode_small: DecodeFit  # of fewer than `large_decodes` requests
    decode_large: DecodeFit
    large_decodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedCost:
    """A `CostModel` of measured coefficients.

    The three constants are DistServe's; they are not in the profile.
    """

    name: str  # that outputs are marked with
    fits: Mapping[int, StepFit]  # by tp
    stage_ms: float = 1.0  # the hand-over of a prefill, on each stage, times pp
    first_stage_ms: float = 2.0  # RPC ("ray overhead") of a step, on the first stage
    first_stage_token_ms: float = 1e-4  # the same RPC per token of context

    def instance(self, parallelism: Parallelism) -> FittedInstance:
        """Return the durations on an instance of a measured tp and any pp.

        Raises:
          ValueError: on another tp, or on dp or ep, which were not measured.
        """
        parallelism.require_tp_pp_only(self.name)
        tp = parallelism.tp
        require(tp in self.fits, f"{self.name}: expected tp in {sorted(self.fits)}", tp)
        return FittedInstance(self, self.fits[tp], parallelism.pp)


class FittedInstance:
    """An `InstanceCost` by `fit` on `pp` stages."""

    def __init__(self, cost: FittedCost, fit: StepFit, pp: int):
        self.cost, self.fit, self.pp = cost, fit, pp
        # For decode_s, the hot loop: chains of attributes and named tuples are slower.
        self._first_ms, self._token_ms = cost.first_stage_ms, cost.first_stage_token_ms
        self._large_decodes = fit.large_decodes
        self._small, self._large = fit.decode_small[:], fit.decode_large[:]

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """Return the seconds on each stage; all but the first take equally long."""
        stage_ms = self._shared_ms(load)
        context = load.context - load.decodes  # without the tokens decoded now
        for start, count in load.chunks:
            context += start + count
        first_ms = self._first_ms + self._token_ms * context
        return ((stage_ms + first_ms) / 1000,) + (stage_ms / 1000,) * (self.pp - 1)

    def decode_s(self, decodes: int, context: int) -> float:
        """Return the seconds of a decode-only step on the one stage."""
        if self.pp != 1:
            require_one_stage(self.pp)
        large = decodes >= self._large_decodes
        base_ms, context_ms, request_ms = self._large if large else self._small
        stage_ms = base_ms + context_ms * context + request_ms * decodes
        first_ms = self._first_ms + self._token_ms * (context - decodes)
        return (stage_ms + first_ms) / 1000

    def _shared_ms(self, load: StepLoad) -> float:
        """Return the milliseconds that every stage takes."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedProfile:
    """Step times and KV capacities of several engines and models."""

    name: str  # that outputs are marked with
    provenance: Mapping[str, str]
    warnings: Mapping[str, str]  # "ENGINE/MODEL/tpN" -> the fault of that fit
    fits: Mapping[str, Mapping[str, Mapping[int, StepFit]]]  # engine, model, tp
    capacities: Mapping[str, Mapping[Parallelism, int]]  # model: tokens

    def cost_model(self, engine: str, model: str) -> FittedCost:
        """Return the step times of `model` on `engine`.

        Raises:
          ValueError: naming the known ones, if one of them is unknown.
        """
        require(engine in self.fits, f"engine: expected {sorted(self.fits)}", engine)
        models = self.fits[engine]
        require(model in models, f"model: expected one of {sorted(models)}", model)
        return FittedCost(name=f"{self.name}/{engine}/{model}", fits=models[model])

    def kv_tokens(self, model: str, parallelism: Parallelism) -> int:
        """Return the tokens of KV that an instance can hold.

        Raises:
          ValueError: naming the known ones, if the model or parallelism is unknown.
        """
        known = sorted(self.capacities)
        require(model in self.capacities, f"model: expected one of {known}", model)
        sizes = self.capacities[model]
        expected = f"{self.name}: expected one of {sorted(sizes)}"
        require(parallelism in sizes, expected, parallelism)
        return sizes[parallelism]


def profile_from_json(record: object) -> FittedProfile:
    """Read the profile in a parsed JSON record of the form above.

    A negative quadratic coefficient is a bad fit. It is accepted if `warnings` has a
    text for it, because such fits were published.

    Raises:
      ValueError: saying where, what was expected and what came.
    """
    top = open_profile(record, "fitted")
    warnings = get_texts(top, "warnings", "profile")
    fits = {
        engine: {
            model: _fits_by_tp(by_tp, f"{engine}/{model}", warnings)
            for model, by_tp in _children(models, engine)
        }
        for engine, models in _children(get_mapping(top, "fits", "profile"), "fits")
    }
    return FittedProfile(
        name=get_text(top, "name", "profile"),
        provenance=get_texts(top, "provenance", "profile"),
        warnings=warnings,
        fits=fits,
        capacities=_capacities(get_mapping(top, "kv_tokens", "profile")),
    )


def _children(
    record: Mapping[str, object], where: str
) -> list[tuple[str, Mapping[str, object]]]:
    return [(key, get_mapping(record, key, where)) for key in record]


def _fits_by_tp(
    by_tp: Mapping[str, object], where: str, warnings: Mapping[str, str]
) -> dict[int, StepFit]:
    return {
        positive_int(tp, f"{where}: tp"): _step_fit(fit, f"{where}/tp{tp}", warnings)
        for tp, fit in _children(by_tp, where)
    }


def _step_fit(
    record: Mapping[str, object], where: str, warnings: Mapping[str, str]
) -> StepFit:
    prefill = PrefillFit(*_coefficients(record, "prefill", where))
    if prefill.square_ms < 0:
        expected = f"{where}: expected a text in warnings for a negative prefill[2]"
        require(where in warnings, expected, prefill.square_ms)
    return StepFit(
        prefill,
        DecodeFit(*_coefficients(record, "decode_small", where)),
        DecodeFit(*_coefficients(record, "decode_large", where)),
        positive_int(record.get("large_decodes"), f"{where}.large_decodes"),
    )


def _coefficients(
    record: Mapping[str, object], key: str, where: str
) -> tuple[float, ...]:
    """Read three finite numbers, all but the quadratic one >= 0."""
    values = get_numbers(record, key, where)
    require(len(values) == 3, f"{where}.{key}: expected 3 numbers", values)
    signed = values[:2] if key == "prefill" else values
    require(min(signed) >= 0, f"{where}.{key}: expected numbers >= 0", values)
    return values


def _capacities(
    record: Mapping[str, object],
) -> dict[str, dict[Parallelism, int]]:
    return {
        model: {
            _tp_pp(key, f"kv_tokens/{model}"): positive_int(
                tokens, f"kv_tokens/{model}/{key}"
            )
            for key, tokens in sizes.items()
        }
        for model, sizes in _children(record, "kv_tokens")
    }


def _tp_pp(key: str, where: str) -> Parallelism:
    tp, comma, pp = key.partition(",")
    require(comma == ",", f"{where}: expected 'TP,PP'", key)
    return Parallelism(
        positive_int(tp, f"{where}: tp"), positive_int(pp, f"{where}: pp")
    )
