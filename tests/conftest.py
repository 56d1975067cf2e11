"""Strict settings for every test, made before JAX starts a backend."""

import os
import re
from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The machine's speed is no property of the code, so no example has a deadline. CI draws
# the same examples every time; elsewhere each run draws new ones.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps every test but the gpu ones on the CPU devices, GPU or not."""
    asks_for_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if not asks_for_gpu and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden files, traces and profiles beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"no reference data: {path} is missing")
    return path
