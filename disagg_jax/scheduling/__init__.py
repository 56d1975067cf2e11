"""Who runs next: the policies, and the systems that they make.

A policy plans the next step of an instance, from a view of it. A system is a policy for
each role of instances. To add a system: a policy file, and its line here; or a module
of your own, whose system `get_system` finds by the name `module:attribute`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, cast

from disagg_jax import own_packages as own_packages  # first: it checks the path
from disagg_jax.deployment import Role
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import (
    Chunk,
    InstanceView,
    Plan,
    Policy,
    PullPolicy,
    RequestView,
    StepLimits,
)
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.preemption import decode_all, fits
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.routing import ROUTERS, Router, get_router
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.tensorrt_llm import NoEvict
from disagg_jax.scheduling.tuning import StepSize
from disagg_jax.scheduling.vllm_v0 import PrefillFirst
from disagg_jax.scheduling.vllm_v1 import RunningFirst
from models.named import find_named

__all__ = [
    "DISAGGREGATED",
    "ROUTERS",
    "SYSTEMS",
    "Chunk",
    "InstanceView",
    "Plan",
    "Policy",
    "PullPolicy",
    "RequestView",
    "Router",
    "StepLimits",
    "StepSize",
    "decode_all",
    "find_system",
    "fits",
    "get_router",
    "get_system",
]

DISAGGREGATED = "disaggregated"  # the system of prefill and decode instances

# A system is a policy for each role it uses; the default parameters are the papers'.
SYSTEMS: Mapping[str, Mapping[Role, Policy]] = {
    "orca": {Role.COLOCATED: Orca()},
    "vllm_v0": {Role.COLOCATED: PrefillFirst()},
    "vllm_v1": {Role.COLOCATED: RunningFirst()},
    "tensorrt_llm": {Role.COLOCATED: NoEvict()},
    "sarathi": {Role.COLOCATED: Sarathi()},
    "sarathi_serve": {Role.COLOCATED: SarathiServe()},
    "splitfuse": {Role.COLOCATED: SplitFuse()},
    DISAGGREGATED: {Role.PREFILL: PrefillOnly(), Role.DECODE: DecodeOnly()},
    "disaggregated_chunked": {
        Role.PREFILL: PrefillChunked(),
        Role.DECODE: DecodeOnly(),
    },
}

# Names of before, in old run directories, placements and command lines.
_RENAMED = {"vllm": "vllm_v0"}


def find_system(name: str, names: Collection[str]) -> str:
    """Return the one of `names` that is system `name`, by its name of today or before.

    Return `name` itself if there is none.
    """
    if name in names:
        return name
    today = _RENAMED.get(name, name)
    return next((n for n in names if _RENAMED.get(n, n) == today), name)


def get_system(
    name: str,
    systems: Mapping[str, Mapping[Role, Policy]] = SYSTEMS,
    **changes: Mapping[str, object],
) -> Mapping[Role, Policy]:
    """Return the policies of system `name`, by role.

    Args:
      name: a key of `systems`, by its name of today or before, or what `find_named`
        finds, such as `my_module:my_system`.
      changes: parameters that a role's policy has instead: `prefill={"max_seqs": 8}`.

    Raises:
      ValueError: on an unknown name.
    """
    found = find_named(
        find_system(name, systems),
        systems,
        kind="system",
        what="a mapping of roles to policies",
        is_one=_is_system,
    )
    if not changes:
        return found
    return {
        role: dataclasses.replace(cast(Any, policy), **changes.get(role.value, {}))
        for role, policy in found.items()
    }


def _is_system(found: Any) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(role, Role) and hasattr(policy, "plan") and hasattr(policy, "limits")
        for role, policy in cast(Mapping[object, object], found).items()
    )
