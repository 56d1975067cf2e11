"""Strict settings for every test, made before JAX starts a backend."""

import json
import os
import re
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest

from models.gguf import smollm2_path

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The machine's speed is no property of the code, so no example has a deadline. CI draws
# the same examples every time; elsewhere each run draws new ones.
# With --hypothesis-profile=thorough tests that set no number of their own draw 10,000.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=10_000)
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


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    try:
        return smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_cases(shared_dir: Path) -> list[dict[str, Any]]:
    """Prompts, their ids and 48 greedy tokens, by an independent implementation."""
    file = shared_dir / "golden" / "smollm2_greedy.json"
    if not file.exists():
        pytest.skip(f"no golden outputs: {file} is missing")
    return json.loads(file.read_text())["cases"]
