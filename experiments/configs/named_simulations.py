"""Named simulations: models, cost models and links for `simulate` and others."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from disagg_jax.errors import require
from disagg_jax.request import Request
from disagg_jax.sim.cost.distserve import FittedProfile, profile_from_json
from disagg_jax.sim.cost.roofline import RooflineCost
from disagg_jax.sim.hardware import LINKS, get_hardware
from disagg_jax.sim.simulation import DeviceCost, Simulation
from disagg_jax.workload.traces import Trace, fit_rows, load_trace
from disagg_jax.workload.workload import requests_of_rows
from models.lookup import find_model

PROFILES = pathlib.Path(__file__).parents[1] / "profiles"
DISTSERVE = PROFILES / "distserve_a100_opt.json"


@functools.cache
def distserve_profile() -> FittedProfile:
    """Return DistServe's released A100 coefficients."""
    return profile_from_json(json.loads(DISTSERVE.read_text()))


def device_cost(name: str, model: str) -> DeviceCost:
    """Return the durations of a model by name.

    Args:
      name: fitted/ENGINE, DistServe's A100 coefficients of one engine, or
        roofline/HARDWARE.

    Raises:
      ValueError: on an unknown name, or a model that was not measured.
    """
    kind, _, rest = name.partition("/")
    kinds = "'fitted/ENGINE' or 'roofline/HARDWARE'"
    known = kind in ("fitted", "roofline") and rest != ""
    require(known, f"cost: expected {kinds}", name)
    if kind == "fitted":
        fitted = distserve_profile()
        cost = fitted.cost_model(rest, model)
        tokens = functools.partial(fitted.kv_tokens, model)
        return DeviceCost(name=name, model=cost, kv_tokens=tokens)
    roofline = RooflineCost(model=find_model(model), hardware=get_hardware(rest))
    return DeviceCost(name=name, model=roofline, kv_tokens=roofline.kv_tokens)


def named_simulation(
    model: str, cost: str, colocated_cost: str | None = None, **fields: Any
) -> Simulation:
    """Return a simulation whose model and costs have these names.

    Args:
      fields: other fields of `Simulation`.

    Raises:
      ValueError: on an unknown name.
    """
    return Simulation(
        model=find_model(model),
        cost=device_cost(cost, model),
        colocated_cost=device_cost(colocated_cost, model) if colocated_cost else None,
        **fields,
    )


def _simdistserve(model: str) -> Simulation:
    """Return DistServe's own simulator: free links, no KV memory, unequal engines."""
    return named_simulation(
        model,
        "fitted/distserve",
        "fitted/vllm",
        prefill_budget_is_memory=True,
        kv_memory=False,
        max_context=10**9,
        extra_tokens=1,
    )


def _on_a100s(model: str, cost: str = "fitted/distserve") -> Simulation:
    """Return one engine for all systems, with KV memory and links."""
    return named_simulation(model, cost, inside="nvlink-a100", between="25gb")


def _on_h100s(model: str) -> Simulation:
    links = {"inside": "nvlink-h100", "between": "400gb"}
    return named_simulation(model, "roofline/h100", max_context=8192, **links)


SIMULATIONS: Mapping[str, Callable[[], Simulation]] = {
    "simdistserve_opt13b": lambda: _simdistserve("opt-13b"),
    "simdistserve_opt66b": lambda: _simdistserve("opt-66b"),
    "opt13b_a100": lambda: _on_a100s("opt-13b"),
    "opt66b_a100": lambda: _on_a100s("opt-66b"),
    "opt175b_a100": lambda: _on_a100s("opt-175b", "roofline/a100-80g"),
    "llama3_8b_h100": lambda: _on_h100s("llama-3-8b"),
    "llama3_70b_h100": lambda: _on_h100s("llama-3-70b"),
}


def get_simulation(name: str) -> Simulation:
    """Return the simulation called `name`."""
    require(name in SIMULATIONS, f"config: expected one of {sorted(SIMULATIONS)}", name)
    return SIMULATIONS[name]()


def link_inside(hardware: str) -> str | None:
    """Return the link between two devices in a node; None if `hardware` has none."""
    link = get_hardware(hardware).hop.name
    return link if link in LINKS else None


def roofline_simulation(
    model: str, hardware: str, max_context: int = 2048
) -> Simulation:
    """Simulate a model on a device by a roofline; KV moves over the device's own link.

    Raises:
      ValueError: on an unknown name, or a device without such a link.
    """
    link = link_inside(hardware)
    expected = "hardware: expected a device with a link to others"
    require(link is not None, expected, hardware)
    return named_simulation(
        model, f"roofline/{hardware}", inside=link, max_context=max_context
    )


def placement_simulation(model: str, hardware: str) -> Simulation:
    """Simulate a model on a device with one cost model for all systems.

    Durations are DistServe's measured coefficients where its profile has the model on
    an a100, and a roofline otherwise.

    Raises:
      ValueError: on an unknown name.
    """
    device = {"a100": "a100-80g"}.get(hardware, hardware)
    measured = distserve_profile().fits["distserve"]
    fitted = device == "a100-80g" and model in measured
    cost = "fitted/distserve" if fitted else f"roofline/{device}"
    return named_simulation(model, cost, inside=link_inside(device))


def trace_requests(
    trace: str | Trace, simulation: Simulation, rate_rps: float | None = None
) -> list[Request]:
    """Return the requests of a trace, with the tokens the simulation adds to each.

    Args:
      rate_rps: None keeps the times of the trace, which must have times then.
    """
    if not isinstance(trace, Trace):
        trace = load_trace(trace)
    if not trace.timed and rate_rps is None:
        raise ValueError(f"--rate: expected requests/s, as {trace.file} has no times")
    fitted = fit_rows(trace.rows)
    if empty := fitted.left_out_empty:
        print(f"{empty} rows without tokens are left out", file=sys.stderr)
    return [
        dataclasses.replace(r, max_tokens=r.max_tokens + simulation.extra_tokens)
        for r in requests_of_rows(fitted.rows, rate_rps)
    ]
