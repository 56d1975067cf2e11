"""Strict settings for every test, made before JAX starts a backend; the mark `core`."""

import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest

from models.gguf import smollm2_path

# The machine's speed is no property of the code, so no example has a deadline. CI draws
# the same examples every time; elsewhere each run draws new ones.
# No test sets a number of examples: --hypothesis-profile=thorough holds for all.
hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=10_000)
hypothesis.settings.register_profile(
    "fixed", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("fixed" if os.environ.get("CI") else "local")


class _WithoutJax:
    """Skips what imports JAX: a test, or all tests of a module."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name in ("jax", "jaxlib"):
            pytest.skip("needs jax", allow_module_level=True)


def pytest_configure(config: pytest.Config) -> None:
    """Without JAX for `-m core`; otherwise with its settings for tests."""
    if _core_only(config):
        sys.meta_path.insert(0, _WithoutJax())  # pyright: ignore[reportArgumentType]
        return
    # Every test but those that need a GPU or TPU stays on the CPU devices.
    asks_for_device = re.search(r"(?<!not )\b[tg]pu\b", config.option.markexpr)
    looks_at_programs = re.search(r"(?<!not )\b[tg]pu_aot\b", config.option.markexpr)
    _share_compiled_programs(config)
    if not asks_for_device and not looks_at_programs:
        _compile_fast()
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if not asks_for_device and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def _core_only(config: pytest.Config) -> bool:
    """Whether only the library's tests without JAX are asked for."""
    asked = config.option.markexpr
    if not re.search(r"\bcore\b", asked):
        return False
    if "core" not in asked.split(" and ") or re.search(r"\bor\b", asked):
        raise pytest.UsageError(f"expected -m core or -m 'core and ...', got {asked!r}")
    return True


def _share_compiled_programs(config: pytest.Config) -> None:
    """Lets workers, and the processes that tests start, compile a program once.

    JAX reads the variables when it is imported. Whoever sets the folder keeps it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="disagg-jax-programs-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def _compile_fast() -> None:
    """Has programs compiled in half the time, into slower ones.

    A test runs a program a few times, so that compiling it is what it costs. JAX reads
    the variables when it is imported, also in the processes that tests start. Whoever
    sets either keeps his own: with XLA_FLAGS= programs are compiled as users have them.
    """
    if {"JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"} & os.environ.keys():
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    # A process ends at a flag that its jaxlib does not know; 0.12 has lost this one.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_ignore_collect(
    collection_path: Path, config: pytest.Config
) -> Literal[True] | None:
    """Leaves the commands' tests out of `core`: they take longer than all others."""
    commands = collection_path == Path(__file__).parent / "experiments"
    return True if commands and _core_only(config) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Marks what was collected without JAX as `core`."""
    if _core_only(config):
        for item in items:
            if not any(map(item.get_closest_marker, ("slow", "gpu", "tpu", "jax"))):
                item.add_marker("core")


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
