"""The systems that can be compared. To add one: a policy file, and its line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from disagg_jax.deployment import Role
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.orca import Orca
from disagg_jax.scheduling.prefill_chunked import PrefillChunked
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.scheduling.sarathi import Sarathi
from disagg_jax.scheduling.sarathi_serve import SarathiServe
from disagg_jax.scheduling.splitfuse import SplitFuse
from disagg_jax.scheduling.vllm_v0 import PrefillFirst

# A system is a policy for each role it uses; the default parameters are the papers'.
SYSTEMS: Mapping[str, Mapping[Role, Policy]] = {
    "orca": {Role.COLOCATED: Orca()},
    "vllm": {Role.COLOCATED: PrefillFirst()},
    "sarathi": {Role.COLOCATED: Sarathi()},
    "sarathi_serve": {Role.COLOCATED: SarathiServe()},
    "splitfuse": {Role.COLOCATED: SplitFuse()},
    "disaggregated": {Role.PREFILL: PrefillOnly(), Role.DECODE: DecodeOnly()},
    "disaggregated_chunked": {
        Role.PREFILL: PrefillChunked(),
        Role.DECODE: DecodeOnly(),
    },
}


def get_system(name: str, **changes: Mapping[str, object]) -> Mapping[Role, Policy]:
    """Return the policies of system `name`, by role.

    Args:
      changes: parameters that a role's policy has instead: `prefill={"max_seqs": 8}`.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system: expected one of {sorted(SYSTEMS)}, got '{name}'")
    return {
        role: dataclasses.replace(cast(Any, policy), **changes.get(role.value, {}))
        for role, policy in SYSTEMS[name].items()
    }
