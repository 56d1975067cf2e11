"""`-m core` selects the tests that need no JAX, and runs without it."""

import argparse
import re
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
def test_a_choice_that_would_need_jax_to_know_is_refused(pytestconfig, asked):
    plugins = pytestconfig.pluginmanager
    conftest = plugins.get_plugin(str(ROOT / "tests" / "conftest.py"))
    config = argparse.Namespace(option=argparse.Namespace(markexpr=asked))
    message = f"expected -m core or -m 'core and ...', got '{asked}'"
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        conftest.pytest_configure(config)


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


def test_what_is_core(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, at_the_top in {"a": "", "b": "import jax", "c": "import optax"}.items():
        pytester.makepyfile(**{f"test_{name}": MODULE.format(at_the_top=at_the_top)})
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n core\n jax\n slow\n gpu\n")
    found = pytester.runpytest_subprocess("-m", "core")
    # Of the first module. What a test imports when it runs is skipped too, and so are
    # the other modules.
    found.assert_outcomes(passed=1, skipped=1 + 2, deselected=2)
