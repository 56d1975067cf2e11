import pytest


@pytest.fixture(scope="session")
def world():
    """Weights, programs and references, shared by all tests of the engine."""
    from tests.engine.harness import World  # with JAX, so not for `-m core`

    return World()


@pytest.fixture(scope="session")
def _tiled():
    from tests.engine.harness import World

    return World()


@pytest.fixture
def tiled_world(_tiled, monkeypatch):
    """Another world, whose devices keep and move KV as a TPU does."""
    from disagg_jax.engine.attention import kv_cache

    monkeypatch.setattr(kv_cache, "is_tiled", lambda mesh: True)
    return _tiled
