"""Reading measured tables from a JSON record.

    {"name": "h100-llama-3-8b",       what outputs are marked with
     "kind": "interpolated",
     "provenance": {...},             texts: at least "source" (who measured, with which
                                      command and commit) and "hardware"
     "instances": [                   one for each (tp, pp) that was measured
       {"tp": 1,
        "stages": [                   pp of them, in order
          {"floor_s": 0.004,          what every step takes; a mixed one once
           "prefill": {
             "tokens": [16, 512],     prompt tokens of a step, increasing
             "seconds": [0.01, 0.04],
             "square_s": 0.0},        optional: seconds per squared token, on top
           "decode": {
             "decodes": [1, 64],      requests, increasing
             "context": [16, 2048],   mean context of a request, increasing
             "seconds": [[0.01, 0.02], [0.02, 0.04]]}}]}]}    [decodes][context]

All times are seconds of one step on that stage, host work included, hand-over between
stages excluded.
"""

from __future__ import annotations

from collections.abc import Mapping

from disagg_jax.errors import require
from disagg_jax.sim.cost.profile_json import (
    as_mapping,
    as_number,
    get_list,
    get_mapping,
    get_numbers,
    get_text,
    get_texts,
    get_value,
    open_profile,
    positive_int,
)
from disagg_jax.sim.interpolated import (
    DecodeTable,
    InterpolatedCost,
    PrefillTable,
    StageTables,
)


def cost_from_json(record: object) -> InterpolatedCost:
    """The cost model in a parsed JSON record of the form above.

    Raises:
      ValueError: saying where, what was expected and what came.
    """
    top = open_profile(record, "interpolated")
    provenance = get_texts(top, "provenance", "profile")
    for key in ("source", "hardware"):
        get_text(provenance, key, "provenance")
    stages: dict[tuple[int, int], tuple[StageTables, ...]] = {}
    for i, item in enumerate(get_list(top, "instances", "profile")):
        where = f"instances[{i}]"
        instance = as_mapping(item, where)
        tp = positive_int(get_value(instance, "tp", where), f"{where}.tp")
        tables = _stages(instance, where)
        key = (tp, len(tables))
        require(key not in stages, f"{where}: expected each (tp, pp) once", key)
        stages[key] = tables
    name = get_text(top, "name", "profile")
    return InterpolatedCost(name=name, stages=stages, provenance=provenance)


def _stages(record: Mapping[str, object], where: str) -> tuple[StageTables, ...]:
    stages = get_list(record, "stages", where)
    return tuple(
        _stage(as_mapping(stage, f"{where}.stages[{i}]"), f"{where}.stages[{i}]")
        for i, stage in enumerate(stages)
    )


def _stage(record: Mapping[str, object], where: str) -> StageTables:
    prefill = get_mapping(record, "prefill", where)
    decode = get_mapping(record, "decode", where)
    floor_s = as_number(get_value(record, "floor_s", where), f"{where}.floor_s")
    square_s = as_number(prefill.get("square_s", 0.0), f"{where}.prefill.square_s")
    rows = get_list(decode, "seconds", f"{where}.decode")
    seconds = tuple(get_numbers({"seconds": row}, "seconds", where) for row in rows)
    tokens = get_numbers(prefill, "tokens", f"{where}.prefill")
    prefill_s = get_numbers(prefill, "seconds", f"{where}.prefill")
    decodes = get_numbers(decode, "decodes", f"{where}.decode")
    context = get_numbers(decode, "context", f"{where}.decode")
    try:
        return StageTables(
            PrefillTable(tokens, prefill_s, square_s),
            DecodeTable(decodes, context, seconds),
            floor_s,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
