import pytest

from tests.engine.harness import World


@pytest.fixture(scope="session")
def world() -> World:
    """Weights, programs and references, shared by all tests of the engine."""
    return World()
