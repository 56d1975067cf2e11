"""A project that has a `models` folder of its own is told so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_beside(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in `folder`, whose modules are found before this project's."""
    script = folder / "script.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("room", ["scheduling", "control", "sim.cost.linear"])
@pytest.mark.parametrize("name", ["models", "sharding"])
def test_the_folder_is_named(tmp_path, room, name):
    foreign = tmp_path / name / "__init__.py"
    foreign.parent.mkdir()
    foreign.write_text("raise SystemExit('imported')")
    done = run_beside(tmp_path, f"import disagg_jax.{room}")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: disagg_jax: expected its own package")
    assert f"'{name}' in {ROOT}, got {foreign}, which Python finds first" in message


def test_a_module_is_named_too_and_one_that_is_loaded(tmp_path):
    foreign = tmp_path / "models.py"
    foreign.write_text("")
    done = run_beside(tmp_path, "import models, disagg_jax.sim")
    assert f"got {foreign}" in done.stderr.splitlines()[-1]


def test_rooms_that_need_no_models_work_beside_one(tmp_path):
    (tmp_path / "models.py").write_text("raise SystemExit('imported')")
    done = run_beside(tmp_path, "import disagg_jax.metrics, disagg_jax.workload")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_python_does_not_find_first_does_no_harm(tmp_path):
    """Without an __init__.py it is behind any package."""
    (tmp_path / "models").mkdir()
    done = run_beside(tmp_path, "import disagg_jax.sim")
    assert done.returncode == 0, done.stderr


@pytest.mark.jax
def test_the_engine_says_so_before_it_imports_jax(tmp_path):
    (tmp_path / "models.py").write_text("")
    code = "import sys\ntry: import disagg_jax.engine\n"
    code += "except ImportError as e: print(e, 'jax' in sys.modules)"
    done = run_beside(tmp_path, code)
    assert "models.py, which Python finds first" in done.stdout
    assert done.stdout.rstrip().endswith("False")
