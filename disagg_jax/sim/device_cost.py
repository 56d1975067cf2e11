"""What a model costs on a kind of device: step times and KV capacity, by name."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

from disagg_jax.deployment import Parallelism
from disagg_jax.errors import require
from disagg_jax.sim.cost.interface import InstanceCost
from disagg_jax.sim.cost.measured import CalibratedProfile
from disagg_jax.sim.cost.measured_profile import profile_from_json
from disagg_jax.sim.cost.roofline import RooflineCost
from disagg_jax.sim.engines.profile import EngineProfile
from disagg_jax.sim.hardware.device import Hardware
from models.config import ModelConfig
from models.files import read_json
from models.named import find_named


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """A `CostModel` of one model on one kind of device, and its KV capacity."""

    name: str  # printed beside results, such as roofline/h100
    # The durations on an instance; raises ValueError where there are none.
    instance: Callable[[Parallelism], InstanceCost]
    kv_tokens: Callable[[Parallelism], int]  # tokens that fit beside the weights
    # How far it was from measurements, for outputs to say; "" of a cost model that is
    # measured itself, or not of this project.
    checked: str = ""
    engine: EngineProfile | None = None  # whose overheads the durations have
    # Whose programs each instance runs, padded as its policy asks for, and whose
    # transfers its KV takes. `instance` is without padding then.
    profile: CalibratedProfile | None = None


MakeCost = Callable[[ModelConfig, Hardware], DeviceCost]


def roofline(
    model: ModelConfig, hardware: Hardware, engine: EngineProfile | None = None
) -> DeviceCost:
    """Return the times that follow from data sheets; see `cost.roofline`.

    Args:
      engine: whose overheads the steps have, and whose share of a device's memory.
    """
    if engine is None:
        cost = RooflineCost(model=model, hardware=hardware)
        name, checked = f"roofline/{hardware.name}", "engine none: not checked"
    else:
        cost = RooflineCost(
            model=model,
            hardware=hardware,
            factors=engine.factors,
            memory_utilisation=engine.memory_utilisation,
        )
        name = f"roofline/{hardware.name}/{engine.name}"
        checked = engine.checked(model.name, hardware.name, model.precision)
    return DeviceCost(
        name=name,
        instance=cost.instance,
        kv_tokens=cost.kv_tokens,
        checked=checked,
        engine=engine,
    )


COST_MODELS: Mapping[str, MakeCost] = {"roofline": roofline}
_UNCHECKED = "{}: without links inside a step, and without the host"


def profiled(path: pathlib.Path, model: ModelConfig, hardware: Hardware) -> DeviceCost:
    """Return the times of a profile, and its KV memory; see `cost.measured_profile`.

    Raises:
      ValueError: if the file is no profile, or of another model, or hardware.
      FileNotFoundError: if there is no such file.
    """
    try:
        profile = profile_from_json(read_json(path))
    except ValueError as error:
        raise ValueError(
            "cost: expected a profile of experiments.calibrate or of compile_check, "
            f"got '{path}': {error}"
        ) from error
    asked = {"model": model.name, "dtype": model.dtype, "hardware": hardware.name}
    for key, value in asked.items():
        # A measured one has no hardware: JAX names devices otherwise.
        came = profile.provenance.get(key, value)
        require(value == came, f"cost: {path} is of {key} {came}: expected it", value)
    return DeviceCost(
        name=f"profile/{profile.name}",
        instance=profile.instance,
        kv_tokens=profile.kv_tokens,
        checked=_UNCHECKED.format(profile.mark) if profile.compiled else "",
        profile=profile,
    )


def get_cost(
    name: str,
    model: ModelConfig,
    hardware: Hardware,
    costs: Mapping[str, MakeCost] = COST_MODELS,
    engine: EngineProfile | None = None,
) -> DeviceCost:
    """Return what a model costs on hardware by the cost model of that name.

    Args:
      name: a key of `costs`; the path of a profile, a .json file; or what `find_named`
        finds, such as `my_module:my_cost`: a function of the model and the hardware.
      engine: whose overheads the steps have, by the roofline.

    Raises:
      ValueError: on an unknown name, a model that the cost model does not know, or an
        engine beside another cost model.
    """
    if engine is not None:
        expected = "engine: expected the cost model roofline, which takes overheads"
        require(name == "roofline", expected, name)
        return roofline(model, hardware, engine)
    if name.endswith(".json"):
        return profiled(pathlib.Path(name), model, hardware)
    make = find_named(
        name,
        costs,
        kind="cost model",
        what="a function of a ModelConfig and a Hardware",
        is_one=callable,
    )
    cost = make(model, hardware)
    if not isinstance(cost, DeviceCost):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"cost model: expected a DeviceCost of '{name}', got {cost!r}")
    return cost
