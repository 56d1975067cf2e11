"""`-m core` selects the tests that need no JAX, and runs without it."""

import subprocess
import sys

import pytest

from tests.commands import ROOT

pytest_plugins = "pytester"

# As `python -m pytest -m core` begins; what it collected is not run again here.
COLLECT = """
import sys, pytest
status = pytest.main([*sys.argv[1:], "--collect-only", "-q", "-p", "no:cacheprovider"])
print("loaded:", sorted({"jax", "jaxlib", "flax", "orbax", "optax"} & set(sys.modules)))
sys.exit(status)
"""


def collect(*args):
    return subprocess.run(
        [sys.executable, "-c", COLLECT, *args], cwd=ROOT, capture_output=True, text=True
    )


def test_collecting_core_imports_no_jax():
    done = collect("-m", "core")
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "loaded: []"
    ids = {line for line in lines if "::" in line}
    # More than half of all tests; fewer would mean that the core began to need JAX.
    assert len(ids) > 1500
    assert any("test_scheduling.py::" in id for id in ids)
    assert not any("test_attention.py::" in id for id in ids)
    assert not any("tests/experiments/" in id for id in ids)


@pytest.mark.parametrize("asked", ["not core", "core or slow", "slow and not core"])
def test_a_choice_that_would_need_jax_to_know_is_refused(asked):
    done = collect("-m", asked, "tests/test_core_mark.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"expected -m core or -m 'core and ...', got '{asked}'" in done.stderr


MODULE = """
import pytest
{at_the_top}
def test_that_needs_it():
    import jax
@pytest.mark.jax
def test_that_starts_a_process(): pass
@pytest.mark.slow
def test_that_is_slow(): pass
def test_without(): pass
"""


@pytest.mark.parametrize(
    ("at_the_top", "outcomes"),
    [
        # What a test imports when it runs is skipped too.
        ("", {"passed": 1, "skipped": 1, "deselected": 2}),
        ("import jax", {"skipped": 1}),
        ("import optax", {"skipped": 1}),
    ],
)
def test_what_is_core(pytester, monkeypatch, at_the_top, outcomes):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(MODULE.format(at_the_top=at_the_top))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n core\n jax\n slow\n gpu\n")
    pytester.runpytest_subprocess("-m", "core").assert_outcomes(**outcomes)
