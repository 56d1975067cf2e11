"""Named simulations: models, cost models and links for `simulate` and others."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.sim.cost.distserve import FittedProfile, profile_from_json
from disagg_jax.sim.device_cost import COST_MODELS, DeviceCost, MakeCost, get_cost
from disagg_jax.sim.hardware import Hardware, get_hardware
from disagg_jax.sim.simulation import Simulation
from disagg_jax.workload.traces import Trace, fit_rows, load_trace
from disagg_jax.workload.workload import requests_of_rows
from models.config import ModelConfig

PROFILES = pathlib.Path(__file__).parents[1] / "profiles"
_SHORT = {"a100": "a100-80g"}  # as placement searches call it
_BETWEEN_UNLIKE = "200gb"  # the adapter of a device, as a DGX A100 has it
DISTSERVE = PROFILES / "distserve_a100_opt.json"


@functools.cache
def distserve_profile() -> FittedProfile:
    """Return DistServe's released A100 coefficients."""
    return profile_from_json(json.loads(DISTSERVE.read_text()))


def _fitted(engine: str, model: ModelConfig, hardware: Hardware) -> DeviceCost:
    """Return the times of `engine` by DistServe's coefficients."""
    measured = hardware.name.startswith("a100-80g")
    require(measured, f"fitted/{engine}: expected hardware a100-80g", hardware.name)
    fitted = distserve_profile()
    return DeviceCost(
        name=f"fitted/{engine}",
        instance=fitted.cost_model(engine, model.name).instance,
        kv_tokens=functools.partial(fitted.kv_tokens, model.name),
    )


# The library's, and DistServe's measured coefficients of two engines.
COSTS: Mapping[str, MakeCost] = {
    **COST_MODELS,
    "fitted/distserve": functools.partial(_fitted, "distserve"),
    "fitted/vllm": functools.partial(_fitted, "vllm"),
}


def _simdistserve(model: str, engine: str | None) -> Simulation:
    """Return DistServe's own simulator: free links, no KV memory, unequal engines."""
    return dataclasses.replace(
        on_a100s(model, "fitted/distserve", inside=None, engine=engine),
        colocated_cost=on_a100s(model, "fitted/vllm").cost,
        prefill_budget_is_memory=True,
        kv_memory=False,
        max_context=10**9,
        extra_tokens=1,
    )


def on_a100s(model: str, cost: str, **fields: Any) -> Simulation:
    """Simulate a model on A100s by a cost model of `COSTS`."""
    return Simulation.of(model, "a100-80g", cost=cost, costs=COSTS, **fields)


def _nodes_of_a100s(model: str, cost: str, engine: str | None) -> Simulation:
    return on_a100s(model, cost, engine=engine, between="25gb")


def _nodes_of_h100s(model: str, engine: str | None) -> Simulation:
    return Simulation.of(
        model, "h100", engine=engine, between="400gb", max_context=8192
    )


# Each by the name of an engine, which only rooflines take, or None.
SIMULATIONS: Mapping[str, Callable[[str | None], Simulation]] = {
    "simdistserve_opt13b": functools.partial(_simdistserve, "opt-13b"),
    "simdistserve_opt66b": functools.partial(_simdistserve, "opt-66b"),
    "opt13b_a100": functools.partial(_nodes_of_a100s, "opt-13b", "fitted/distserve"),
    "opt66b_a100": functools.partial(_nodes_of_a100s, "opt-66b", "fitted/distserve"),
    "opt175b_a100": functools.partial(_nodes_of_a100s, "opt-175b", "roofline"),
    "llama3_8b_h100": functools.partial(_nodes_of_h100s, "llama-3-8b"),
    "llama3_70b_h100": functools.partial(_nodes_of_h100s, "llama-3-70b"),
}


def get_simulation(name: str, engine: str | None = None) -> Simulation:
    """Return the simulation called `name`.

    Args:
      engine: of `get_engine`: whose overheads and limits the instances have.

    Raises:
      ValueError: on an unknown name, or an engine where the simulation is no roofline.
    """
    require(name in SIMULATIONS, f"config: expected one of {sorted(SIMULATIONS)}", name)
    return SIMULATIONS[name](engine)


def placement_simulation(
    model: str,
    hardware: str,
    cost: str | None = None,
    link: str | None = None,
    engine: str | None = None,
    **fields: Any,
) -> Simulation:
    """Simulate a model on devices with one cost model for all systems.

    Args:
      hardware: a device for all, or one for each role: `prefill=h100,decode=a100-80g`.
      cost: by default DistServe's measured coefficients where its profile has the model
        on an a100, and a roofline otherwise, or with an engine.
      link: that KV takes; by default the devices' own, and between unlike devices,
        which do not share a node, 200gb.
      engine: of `get_engine`: whose overheads and limits the instances have.
      fields: other fields of the simulation.

    Raises:
      ValueError: on an unknown name, or a role without a device.
    """
    prefill, decode = devices_by_role(hardware)
    measured = distserve_profile().fits["distserve"]
    fitted = prefill == decode == "a100-80g" and model in measured
    cost = cost or ("fitted/distserve" if fitted and not engine else "roofline")
    if link is not None or prefill != decode:
        fields["inside"] = link or _BETWEEN_UNLIKE
    made = Simulation.of(model, decode, cost=cost, costs=COSTS, engine=engine, **fields)
    if prefill == decode:
        return made
    other = get_cost(cost, made.model, get_hardware(prefill), COSTS, made.engine)
    return dataclasses.replace(made, prefill_cost=other)


def devices_by_role(text: str) -> tuple[str, str]:
    """Return the names of the devices of prefill and of decode instances.

    Raises:
      ValueError: unless it is one name, or one for each of both roles.
    """
    parts = [part.partition("=") for part in text.split(",")]
    if len(parts) == 1 and not parts[0][1]:
        named = {"prefill": text, "decode": text}
    else:
        named = {role: name for role, _, name in parts}
    expected = "hardware: expected one device, or prefill=DEVICE,decode=DEVICE"
    complete = sorted(named) == ["decode", "prefill"] and all(named.values())
    require(complete, expected, text)
    prefill, decode = (_SHORT.get(named[r], named[r]) for r in ("prefill", "decode"))
    return prefill, decode


def trace_requests(
    trace: str | Trace, simulation: Simulation, rate_rps: float | None = None
) -> list[Request]:
    """Return the requests of a trace, with the tokens the simulation adds to each.

    Args:
      rate_rps: None keeps the times of the trace, which must have times then.
    """
    trace = trace if isinstance(trace, Trace) else load_trace(trace)
    return trace_requests_at(trace, simulation, [rate_rps])[rate_rps]


def trace_requests_at(
    trace: Trace, simulation: Simulation, rates_rps: Iterable[float | None]
) -> dict[float | None, list[Request]]:
    """Return `trace_requests` at each rate."""
    rates_rps = list(rates_rps)
    if not trace.timed and None in rates_rps:
        raise ValueError(f"--rate: expected requests/s, as {trace.file} has no times")
    fitted = fit_rows(trace.rows)
    if empty := fitted.left_out_empty:
        print(f"{empty} rows without tokens are left out", file=sys.stderr)
    return {
        rate: [
            dataclasses.replace(r, max_tokens=r.max_tokens + simulation.extra_tokens)
            for r in requests_of_rows(fitted.rows, rate)
        ]
        for rate in rates_rps
    }
