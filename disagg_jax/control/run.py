"""The result of serving requests on a deployment: simulated, or an engine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from disagg_jax.deployment import Deployment
from disagg_jax.request import Timeline


@dataclasses.dataclass
class StepTotals:
    """Counts of the steps of one kind that an engine has run, and of their padding."""

    steps: int = 0
    tokens: int = 0  # computed
    width: int = 0  # that went through the layers, padding included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The result of one run of `SimulatedDeployment` or `ServedDeployment`.

    Attributes:
      timelines: of the requests, in order of arrival.
      busy_s: seconds of work on the virtual clock; empty on the wall clock. A key
        (instance,) is the first stage of an instance, (instance, k) a later one; links
        have the names that `Network` gives them, or (-3, src, dst).
      totals: by kind of step, if programs ran.
    """

    timelines: list[Timeline]
    end_s: float
    busy_s: Mapping[tuple[int, ...], float]
    totals: Mapping[str, StepTotals] | None = None

    def busy_shares(self, deployment: Deployment) -> list[tuple[float, ...]]:
        """Return for each instance the share of the time that each stage worked.

        The rest of the time it waited, for requests and in pipeline bubbles.
        """

        def share(instance: int, stage: int) -> float:
            resource = (instance, stage) if stage else (instance,)
            return self.busy_s.get(resource, 0.0) / self.end_s if self.end_s else 0.0

        return [
            tuple(share(i, stage) for stage in range(spec.parallelism.pp))
            for i, spec in enumerate(deployment.instances)
        ]

    def busy_links(self) -> dict[str, float]:
        """Return by name the share of the time that each link moved KV.

        A link that moved nothing is left out.
        """
        names = {-1: "network of node {}", -2: "into instance {}"}
        return {
            names.get(link[0], "instance {} to {}").format(*link[1:]): seconds
            / self.end_s
            for link, seconds in sorted(self.busy_s.items())
            if link[0] < 0 and self.end_s
        }
