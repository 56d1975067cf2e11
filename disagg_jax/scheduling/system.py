"""A scheduling system on a deployment: what is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from disagg_jax.deployment import Role
from disagg_jax.errors import require
from disagg_jax.scheduling import SYSTEMS, get_system
from disagg_jax.scheduling.interface import Policy
from disagg_jax.scheduling.tuning import capped, has_rule, resized


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """Policies by role on a deployment."""

    deployment: str  # such as 2xcolocated:tp1 or prefill:tp2,decode:tp1
    policies: Mapping[Role, Policy]

    @classmethod
    def of(
        cls, system: str, deployment: str, **changes: Mapping[str, object]
    ) -> System:
        """Put a system of `scheduling.SYSTEMS` on a deployment; see `get_system`."""
        return cls(
            deployment=deployment, policies=get_system(system, SYSTEMS, **changes)
        )

    def within(self, *, tokens: int, rows: int) -> System:
        """Return it with no larger step than `tokens` and no more requests than `rows`.

        Parameters that are smaller stay.
        """
        policies = {
            role: capped(policy, tokens, rows) for role, policy in self.policies.items()
        }
        return dataclasses.replace(self, policies=policies)

    def resized(self, step_tokens: int) -> System:
        """Return it with steps of that size, for policies whose papers tune it."""
        policies = {
            role: resized(policy, step_tokens) if has_rule(policy) else policy
            for role, policy in self.policies.items()
        }
        return dataclasses.replace(self, policies=policies)


def get_systems(names: Sequence[str]) -> Mapping[Role, Policy]:
    """Return the policies of several systems; each serves the roles that it has.

    Raises:
      ValueError: on an unknown name, or two systems of one role.
    """
    systems = [get_system(name) for name in names]
    policies = {role: p for system in systems for role, p in system.items()}
    apart = len(policies) == sum(map(len, systems))
    require(apart, "--system: expected systems of different roles", list(names))
    return policies
