"""What belongs to a serving engine and not to the device: overheads, limits, policy.

A profile is fitted to end-to-end measurements of an engine (`experiments.fit_engine`),
and serves all models and parallelism on all devices: it has no constant for one of
them. The presets are the files beside this module.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from disagg_jax.deployment import Role
from disagg_jax.errors import require
from disagg_jax.formats import ENGINE_PROFILE
from disagg_jax.scheduling import DISAGGREGATED, get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.tuning import limited
from disagg_jax.sim.cost.profile_json import as_mapping, as_number
from disagg_jax.sim.cost.step_terms import EngineFactors
from models.files import read_json

_FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitError:
    """How far simulated rows were from measured ones that the fit had not seen.

    Errors are means of |simulated / measured - 1|.
    """

    model: str  # a model's name, or "" for all
    hardware: str  # likewise
    precision: str  # likewise: 16 bits, fp8, fp4, int4
    rows: int
    tpot: float
    ttft: float
    latency: float  # of a request: TTFT + (output tokens - 1) TPOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """One version of a serving engine.

    Raises:
      ValueError: on a limit below 1, or a share of memory that is none.
    """

    name: str  # such as vllm-0.12
    engine: str  # vllm, trtllm, sglang or ideal
    versions: tuple[str, ...]  # the beginnings of those it is for
    is_default: bool  # whether it is for all other versions of the engine too
    factors: EngineFactors
    # Who runs next on a colocated instance: vllm_v0 (prompts first), or vllm_v1 or
    # tensorrt_llm (prompts beside decodes).
    system: str
    token_budget: int  # tokens of a step, for each attention replica
    max_seqs: int  # requests with KV at a time, for each attention replica
    memory_utilisation: float  # share of a device's memory for weights and KV
    # Steps by which a first token is late: servers take up requests, and hand tokens
    # out, every few steps only. It is in no step's time, and not in simulated runs.
    first_token_steps: float = 0.0
    errors: tuple[FitError, ...] = ()  # cross-validated, the first over all rows
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_seqs"):
            value = getattr(self, name)
            require(value >= 1, f"{self.name}: {name}: expected >= 1", value)
        share = self.memory_utilisation
        expected = f"{self.name}: memory_utilisation: expected in (0, 1]"
        require(0 < share <= 1, expected, share)

    @property
    def policies(self) -> Mapping[Role, Policy]:
        """Return who runs next, on colocated instances and on both sides of others."""
        return self.limit({**get_system(self.system), **get_system(DISAGGREGATED)})

    def limit(self, policies: Mapping[Role, Policy]) -> Mapping[Role, Policy]:
        """Return policies with the engine's limits, as far as they have such limits.

        The limits are those of an attention replica; `Simulation.build` multiplies them
        by the replicas of an instance.
        """
        return {
            role: limited(policy, self.token_budget, self.max_seqs)
            for role, policy in policies.items()
        }

    def checked(self, model: str, hardware: str, precision: str) -> str:
        """Return how far the profile was from measurements of such a case, in words."""
        for error in self.errors:
            if (error.model, error.hardware, error.precision) == (
                model,
                hardware,
                precision,
            ):
                return (
                    f"engine {self.name}: TPOT within {error.tpot:.1%} on average of "
                    f"{error.rows} measured rows of {model} on {hardware} "
                    "(cross-validated)"
                )
        overall = next((e for e in self.errors if not e.model), None)
        if overall is None:
            return f"engine {self.name}: not checked against any measurement"
        return (
            f"engine {self.name}: not checked for {model} on {hardware}, {precision}; "
            f"TPOT within {overall.tpot:.1%} on average of {overall.rows} other rows"
        )


def to_json(profile: EngineProfile) -> dict[str, Any]:
    """Return the content of a profile's file."""
    return ENGINE_PROFILE.write(dataclasses.asdict(profile))


def from_json(record: Mapping[str, Any]) -> EngineProfile:
    """Return the profile that `to_json` wrote.

    Raises:
      ValueError: on another format, fields that are missing or unknown, or values of
        another kind.
    """
    where = "engine profile"
    fields: dict[str, Any] = ENGINE_PROFILE.read(record)
    _expect_fields(EngineProfile, fields, where)
    for name in ("versions", "errors"):
        listed = isinstance(fields[name], list | tuple)
        require(listed, f"{where}.{name}: expected a list", fields[name])
    factors = _expect_fields(EngineFactors, fields["factors"], f"{where}.factors")
    fields["factors"] = EngineFactors(**factors)
    fields["versions"] = tuple(fields["versions"])
    fields["errors"] = tuple(
        FitError(**_expect_fields(FitError, error, f"{where}.errors"))
        for error in fields["errors"]
    )
    return EngineProfile(**fields)


def _expect_fields(kind: type, record: Any, where: str) -> Mapping[str, Any]:
    """Return a record of the fields of a dataclass; numbers where it has numbers."""
    fields = as_mapping(record, where)
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    expected = f"{where}: expected {sorted(types)}"
    require(set(fields) == set(types), expected, sorted(fields))
    for name, type_ in types.items():
        if type_ in ("int", "float"):
            as_number(fields[name], f"{where}.{name}")
    return fields


@functools.cache
def _presets() -> Mapping[str, EngineProfile]:
    paths = sorted(_FOLDER.glob("*.json"))
    read = [from_json(json.loads(path.read_text())) for path in paths]
    return {profile.name: profile for profile in read}


def engine_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def get_engine(name: str) -> EngineProfile:
    """Return the preset of that name, or the profile in a file.

    Args:
      name: of a preset, or the path of a .json file that `experiments.fit_engine` made.

    Raises:
      ValueError: naming the presets, if none has that name, or the fault of the file.
      FileNotFoundError: if there is no such file.
    """
    if name.endswith(".json"):
        return from_json(read_json(pathlib.Path(name)))
    expected = f"engine: expected one of {engine_names()} or a .json file"
    require(name in _presets(), expected, name)
    return _presets()[name]


def engine_of(engine: str, version: str) -> EngineProfile:
    """Return the preset for a version of an engine, else that engine's default.

    Raises:
      ValueError: naming the engines, if there is none for it.
    """
    of_engine = [p for p in _presets().values() if p.engine == engine]
    engines = sorted({p.engine for p in _presets().values()})
    require(bool(of_engine), f"engine: expected one of {engines}", engine)
    for profile in of_engine:
        if profile.versions and version.startswith(profile.versions):
            return profile
    return next(profile for profile in of_engine if profile.is_default)
