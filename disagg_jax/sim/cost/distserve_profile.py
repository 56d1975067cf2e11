"""Reading fitted coefficients from a JSON record.

The record (experiments/profiles/distserve_a100_opt.json is one):

    {"format": 1,                     see `formats.py`; without it, 0
     "name": "distserve-a100",        what outputs are marked with
     "kind": "fitted",
     "provenance": {...},             source, licence, what was fitted on what: texts
     "warnings": {"ENGINE/MODEL/tpN": "text"},    may be {}
     "fits": {ENGINE: {MODEL: {TP: {
        "prefill": [a, b, c],         ms, ms per token, ms per squared token
        "decode_small": [a', b', c'], ms, ms per context token, ms per request
        "decode_large": [a', b', c'],
        "large_decodes": 95}}}},      decode_large counts from so many requests
     "kv_tokens": {MODEL: {"TP,PP": tokens}}}     that an instance can hold
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from disagg_jax.errors import require
from disagg_jax.sim.cost.distserve import DecodeFit, FittedCost, PrefillFit, StepFit
from disagg_jax.sim.cost.profile_json import (
    get_mapping,
    get_numbers,
    get_text,
    get_texts,
    open_profile,
    positive_int,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedProfile:
    """Step times and KV capacities of several engines and models."""

    name: str  # what outputs are marked with
    provenance: Mapping[str, str]
    warnings: Mapping[str, str]  # "ENGINE/MODEL/tpN" -> what is wrong with that fit
    fits: Mapping[str, Mapping[str, Mapping[int, StepFit]]]  # engine, model, tp
    capacities: Mapping[str, Mapping[tuple[int, int], int]]  # model, (tp, pp): tokens

    def cost_model(self, engine: str, model: str) -> FittedCost:
        """The step times of `model` on `engine`.

        Raises:
          ValueError: naming what there is, if one of them is unknown.
        """
        require(engine in self.fits, f"engine: expected {sorted(self.fits)}", engine)
        models = self.fits[engine]
        require(model in models, f"model: expected one of {sorted(models)}", model)
        return FittedCost(name=f"{self.name}/{engine}/{model}", fits=models[model])

    def kv_tokens(self, model: str, tp: int, pp: int = 1) -> int:
        """Tokens of KV that an instance can hold.

        Raises:
          ValueError: naming what there is, if there is no number for it.
        """
        known = sorted(self.capacities)
        require(model in self.capacities, f"model: expected one of {known}", model)
        sizes = self.capacities[model]
        require((tp, pp) in sizes, f"(tp, pp): expected {sorted(sizes)}", (tp, pp))
        return sizes[tp, pp]


def profile_from_json(record: object) -> FittedProfile:
    """The profile in a parsed JSON record of the form above.

    A negative quadratic coefficient is a bad fit, but a fit that was published: it is
    taken if `warnings` has a text for it.

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
    """Three finite numbers, all but the quadratic one >= 0."""
    values = get_numbers(record, key, where)
    require(len(values) == 3, f"{where}.{key}: expected 3 numbers", values)
    signed = values[:2] if key == "prefill" else values
    require(min(signed) >= 0, f"{where}.{key}: expected numbers >= 0", values)
    return values


def _capacities(
    record: Mapping[str, object],
) -> dict[str, dict[tuple[int, int], int]]:
    return {
        model: {
            _tp_pp(key, f"kv_tokens/{model}"): positive_int(
                tokens, f"kv_tokens/{model}/{key}"
            )
            for key, tokens in sizes.items()
        }
        for model, sizes in _children(record, "kv_tokens")
    }


def _tp_pp(key: str, where: str) -> tuple[int, int]:
    tp, comma, pp = key.partition(",")
    require(comma == ",", f"{where}: expected 'TP,PP'", key)
    return positive_int(tp, f"{where}: tp"), positive_int(pp, f"{where}: pp")
