import jax
import pytest

from disagg_jax.engine.engine import Engine
from disagg_jax.sim.cost.measured import CalibratedProfile
from experiments.sweep.weights import Model
from tests.experiments.calibrating import (
    calibrated,
    device,
    make_engines,
    make_model,
)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Runs after the first find their programs on disk."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def random_model() -> Model:
    return make_model()


@pytest.fixture(scope="session")
def known(random_model: Model) -> dict[str, Engine]:
    """Engines by system; nothing is compiled."""
    return make_engines(random_model)


@pytest.fixture(scope="session")
def exact(known: dict[str, Engine]) -> CalibratedProfile:
    """What is found on a device that always takes the same time."""
    return calibrated(known.values(), device())


@pytest.fixture(scope="session")
def noisy(known: dict[str, Engine]) -> CalibratedProfile:
    """What is found where each run is 2 % off."""
    return calibrated(known.values(), device(noise=0.02), rounds=5)
