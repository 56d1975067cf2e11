"""Engines that compile nothing, and what is found of their times.

What needs JAX is imported by the fixtures, so that `-m core` does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from disagg_jax.engine.engine import Engine
    from disagg_jax.sim.cost.measured import CalibratedProfile
    from models.load import Model


@pytest.fixture(scope="session")
def random_model() -> Model:
    from tests.experiments.calibrating import make_model

    return make_model()


@pytest.fixture(scope="session")
def known(random_model: Model) -> dict[str, Engine]:
    """Engines by system; nothing is compiled."""
    from tests.experiments.calibrating import make_engines

    return make_engines(random_model)


@pytest.fixture(scope="session")
def exact(known: dict[str, Engine]) -> CalibratedProfile:
    """What is found on a device that always takes the same time."""
    from tests.experiments.calibrating import calibrated, device

    return calibrated(known.values(), device())


@pytest.fixture(scope="session")
def noisy(known: dict[str, Engine]) -> CalibratedProfile:
    """What is found where each run is 2 % off."""
    from tests.experiments.calibrating import calibrated, device

    return calibrated(known.values(), device(noise=0.02), rounds=5)
