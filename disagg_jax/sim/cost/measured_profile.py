"""Read and write the profiles of `experiments.calibrate` and `compile_check`, as JSON.

    {"format": 3,                     see `formats.py`; at least 3
     "name": "tiny-cpu",              marks the outputs of a simulation
     "kind": "calibrated",            or "compiled": estimates, not measurements
     "provenance": {...},             texts: "model", "dtype", "device", "commit", ...
     "block_tokens": 16,
     "block_bytes": 65536,            KV of a block, all layers
     "held_out": {"prefill": 0.02},   mean relative error for loads not fitted to
     "layouts": [                     one for each (tp, pp) that was measured
       {"tp": 1, "pp": 1,
        "kv_blocks": 256,             of its pool; older ones may lack it
        "measured": [["prefill", T, R, C, B, P, [seconds on each stage]], ...],
        "fits": {"prefill": [[coefficient of each term], ... of each stage]},
        "probes": [["decode", T, R, C, B, P, [seconds]], ...],
        "serving_factor": {"decode": 1.05}}],  time in serving over alone, by kind
     "transfers": [
       {"src": [1, 1], "dst": [1, 1],          (tp, pp)
        "blocks": [1, 16], "seconds": [1e-4, 2e-4],
        "base_s": 1e-4, "block_s": 6e-6}]}

Programs: `programs/shapes.py`; terms: `sim/cost/step_time_terms.py`. All times are
seconds of one step on that stage, or of one transfer, host work included but for those
that are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import TypeVar, cast

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from disagg_jax.formats import PROFILE
from disagg_jax.programs import KINDS, StepShape
from disagg_jax.sim.cost.measured import (
    CalibratedProfile,
    LayoutTimes,
    TransferTimes,
)
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

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

# Texts that a profile must have: what it is of, and its origin.
PROVENANCE = ("model", "dtype", "device", "date", "commit")


def profile_to_json(profile: CalibratedProfile) -> dict[str, object]:
    """Return the record of the form above."""
    content: dict[str, object] = {
        "name": profile.name,
        "kind": "compiled" if profile.compiled else "calibrated",
        "provenance": dict(profile.provenance),
        "block_tokens": profile.block_tokens,
        "block_bytes": profile.block_bytes,
        "held_out": dict(profile.held_out),
        "layouts": [
            {
                "tp": layout.tp,
                "pp": layout.pp,
                **_known("kv_blocks", profile.kv_blocks.get(layout)),
                "measured": [[*p, list(s)] for p, s in sorted(times.measured.items())],
                "fits": {
                    kind: list(map(list, fits)) for kind, fits in times.fits.items()
                },
                "probes": [
                    [*program, [seconds]]
                    for (of, program), seconds in sorted(profile.probes.items())
                    if of == layout
                ],
                "serving_factor": dict(times.serving_factor),
            }
            for layout, times in sorted(profile.layouts.items())
        ],
        "transfers": [
            {
                "src": [src.tp, src.pp],
                "dst": [dst.tp, dst.pp],
                "blocks": sorted(times.measured),
                "seconds": [times.measured[n] for n in sorted(times.measured)],
                "base_s": times.base_s,
                "block_s": times.block_s,
            }
            for (src, dst), times in sorted(profile.transfers.items())
        ],
    }
    return PROFILE.write(content)


def profile_from_json(record: object) -> CalibratedProfile:
    """Return the profile in a parsed JSON record of the form above.

    Raises:
      ValueError: naming the place, what was expected and what came.
    """
    top = open_profile(record, "calibrated", "compiled")
    number = PROFILE.number_of(as_mapping(record, "profile"))
    expected = "profile: expected format 3 or later, since a decode program is told by "
    expected += "the KV blocks that its requests have; calibrate again"
    require(number >= 3, expected, number)
    provenance = get_texts(top, "provenance", "profile")
    for key in PROVENANCE:
        get_text(provenance, key, "provenance")
    held_out = get_mapping(top, "held_out", "profile")
    items = [
        (f"layouts[{i}]", as_mapping(item, f"layouts[{i}]"))
        for i, item in enumerate(get_list(top, "layouts", "profile"))
    ]
    layouts = [_layout(item, where) for where, item in items]
    kv_blocks = {
        layout: positive_int(item["kv_blocks"], f"{where}.kv_blocks")
        for (layout, _), (where, item) in zip(layouts, items, strict=True)
        if "kv_blocks" in item
    }
    probes = {
        (layout, program): sum(seconds)
        for (layout, _), (where, item) in zip(layouts, items, strict=True)
        for program, seconds in _times(item, "probes", where).items()
    }
    transfers = [
        _transfer(item, i)
        for i, item in enumerate(_optional_list(top, "transfers", "profile"))
    ]
    return CalibratedProfile(
        name=get_text(top, "name", "profile"),
        block_tokens=positive_int(top.get("block_tokens"), "block_tokens"),
        block_bytes=positive_int(top.get("block_bytes"), "block_bytes"),
        layouts=_each_once(layouts, "layouts"),
        transfers=_each_once(transfers, "transfers"),
        provenance=provenance,
        held_out={k: as_number(v, f"held_out.{k}") for k, v in held_out.items()},
        probes=probes,
        kv_blocks=kv_blocks,
        compiled=top["kind"] == "compiled",
    )


def _known(key: str, value: int | None) -> dict[str, int]:
    return {} if value is None else {key: value}


def _optional_list(
    record: Mapping[str, object], key: str, where: str
) -> Sequence[object]:
    found = record.get(key, [])
    require(isinstance(found, list), f"{where}.{key}: expected a list", found)
    return cast(list[object], found)


def _each_once(items: Sequence[tuple[Key, Item]], where: str) -> dict[Key, Item]:
    keys = [key for key, _ in items]
    require(len(set(keys)) == len(keys), f"{where}: expected each once", keys)
    return dict(items)


def _layout(
    record: Mapping[str, object], where: str
) -> tuple[Parallelism, LayoutTimes]:
    tp, pp = (positive_int(record.get(k), f"{where}.{k}") for k in ("tp", "pp"))
    get_list(record, "measured", where)  # raises where it is missing or empty
    measured = _times(record, "measured", where)
    fits = get_mapping(record, "fits", where)
    factor = record.get("serving_factor", {})
    factors = as_mapping(factor, f"{where}.serving_factor")
    for key, kinds in (("fits", fits), ("serving_factor", factors)):
        expected = f"{where}.{key}: expected some of {KINDS}"
        require(set(kinds) <= set(KINDS), expected, kinds)
    coefficients = {
        kind: tuple(
            get_numbers({kind: fit}, kind, where) for fit in get_list(fits, kind, where)
        )
        for kind in fits
    }
    with _inside(where):
        return Parallelism(tp, pp), LayoutTimes(
            pp,
            measured,
            coefficients,
            {k: as_number(v, f"serving_factor.{k}") for k, v in factors.items()},
        )


def _times(
    record: Mapping[str, object], key: str, where: str
) -> dict[StepShape, tuple[float, ...]]:
    """Return the seconds of each program in a list that may be missing."""
    rows = enumerate(_optional_list(record, key, where))
    times = [_measured(row, f"{where}.{key}[{n}]") for n, row in rows]
    return _each_once(times, f"{where}.{key}")


@contextlib.contextmanager
def _inside(where: str) -> Generator[None]:
    """Name the place in errors on values that fit together badly."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _measured(row: object, where: str) -> tuple[StepShape, tuple[float, ...]]:
    require(isinstance(row, list), f"{where}: expected a list", row)
    items = cast(list[object], row)
    require(len(items) == 7, f"{where}: expected kind, T, R, C, B, P, seconds", items)
    kind, *sizes, seconds = items
    require(kind in KINDS, f"{where}: expected one of {KINDS}", kind)
    numbers = [_count(size, where) for size in sizes]
    program = StepShape(cast(str, kind), *numbers)
    return program, get_numbers({"seconds": seconds}, "seconds", where)


def _count(value: object, where: str) -> int:
    number = as_number(value, where)
    whole = number >= 0 and number.is_integer()
    require(whole, f"{where}: expected an integer >= 0", value)
    return int(number)


def _transfer(
    item: object, i: int
) -> tuple[tuple[Parallelism, Parallelism], TransferTimes]:
    where = f"transfers[{i}]"
    record = as_mapping(item, where)
    src, dst = (_as_layout(record, key, where) for key in ("src", "dst"))
    sizes = get_list(record, "blocks", where)
    blocks = [positive_int(size, f"{where}.blocks") for size in sizes]
    seconds = get_numbers(record, "seconds", where)
    same = len(blocks) == len(seconds)
    require(same, f"{where}: expected {len(blocks)} seconds", seconds)
    base_s, block_s = (
        as_number(get_value(record, key, where), f"{where}.{key}")
        for key in ("base_s", "block_s")
    )
    pairs = list(zip(blocks, seconds, strict=True))
    measured = _each_once(pairs, f"{where}.blocks")
    with _inside(where):
        return (src, dst), TransferTimes(measured, base_s, block_s)


def _as_layout(record: Mapping[str, object], key: str, where: str) -> Parallelism:
    values = get_list(record, key, where)
    require(len(values) == 2, f"{where}.{key}: expected [tp, pp]", values)
    return Parallelism(*(positive_int(value, f"{where}.{key}") for value in values))
