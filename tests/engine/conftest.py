import pytest


@pytest.fixture(scope="session")
def world():
    """Weights, programs and references, shared by all tests of the engine."""
    from tests.engine.harness import World  # with JAX, so not for `-m core`

    return World()
