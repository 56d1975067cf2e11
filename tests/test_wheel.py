"""The built wheel holds every sub-package and imports from another directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("disagg_jax", "models", "sharding")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which nothing but the wheel has been installed.

    Built from a copy, because setuptools leaves build/ and *.egg-info in the tree. The
    copy has experiments and tests, so that leaving them out is the wheel's own doing.
    """
    scratch = tmp_path_factory.mktemp("wheel")
    copy = scratch / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "experiments", "tests"):
        # Source alone decides what goes in; run directories can be large.
        for path in (ROOT / name).rglob("*.py"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-index")
    dist = scratch / "dist"
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", dist, copy, cwd=scratch)
    (wheel,) = dist.glob("disagg_jax-*.whl")
    run(*pip, "install", *offline, "--target", scratch / "site", wheel, cwd=scratch)
    return scratch / "site"


def test_every_module_imports_from_the_wheel(site: Path, tmp_path: Path):
    modules = []
    for path in sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(p for p in parts if p != "__init__"))
    assert {"disagg_jax.request", "disagg_jax.engine", "models", "sharding"} <= {
        *modules
    }
    code = (
        "import importlib, json, sys\n"
        "files = {n: importlib.import_module(n).__file__ for n in sys.argv[1:]}\n"
        "print(json.dumps(files))"
    )
    printed = run(
        sys.executable, "-c", code, *modules, cwd=tmp_path, PYTHONPATH=str(site)
    )
    files = json.loads(printed)
    elsewhere = {n: f for n, f in files.items() if not f or site not in Path(f).parents}
    assert not elsewhere


def test_wheel_holds_nothing_else(site: Path):
    packages = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert packages == set(PACKAGES)
