"""The built wheel holds every sub-package and imports from another directory.

With it alone the library's examples run as they are printed. Compiled, it has the
results of the source.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import snippets

pytestmark = pytest.mark.jax
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("disagg_jax", "models", "sharding")


def data() -> list[Path]:
    """The files beside the source that the wheel carries: a checkpoint, profiles."""
    trained = [path for path in (ROOT / "models/trained").rglob("*") if path.is_file()]
    return [*trained, *(ROOT / "disagg_jax/sim/engines").glob("*.json")]


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
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools leaves build/ and *.egg-info in the tree.

    It has experiments and tests, so that leaving them out is the wheel's own doing.
    """
    copy = tmp_path_factory.mktemp("copy")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    # Source and data decide what goes in; run directories can be large.
    rooms = (*PACKAGES, "experiments", "tests")
    source = [path for name in rooms for path in (ROOT / name).rglob("*.py")]
    for path in [*source, *data()]:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return copy


def install(copy: Path, scratch: Path, compile: str) -> Path:
    """Build a wheel, and install it into a directory where nothing else is."""
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-index")
    build = (*pip, "wheel", *offline, "--no-build-isolation", "-w", scratch / "dist")
    run(*build, copy, cwd=scratch, DISAGG_JAX_COMPILE=compile)
    (wheel,) = (scratch / "dist").glob("disagg_jax-*.whl")
    assert wheel.name.endswith("-none-any.whl") == (compile != "1")
    run(*pip, "install", *offline, "--target", scratch / "site", wheel, cwd=scratch)
    return scratch / "site"


@pytest.fixture(scope="module")
def site(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(copy, tmp_path_factory.mktemp("wheel"), compile="0")


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


EXAMPLES = snippets.sections(ROOT / "disagg_jax" / "README.md")
# What the examples of a section print.
PRINTED = {
    "Generate text": r"(?ms)^def read\(self\):.* Stages\(prefill_queue_s=.*^[01] '",
    "Simulate": r"goodput [\d.]+ requests/s, 95 % interval [\d.]+ to [\d.]+ \(3 seeds",
    "Add a system": r"vllm_v0: mean TTFT [\d.]+ s\nmy_systems:mine: mean TTFT [\d.]+ s",
    "Add a router": r"least_loaded: .* [\d.]+ s\nmy_routers:most_free: .* [\d.]+ s",
    "Add a model": r"qwen3-0.6b: \d+ tokens .*\nmine: \d+ tokens of KV beside",
    "Add an attention kernel": r"xla (.*)\nmy_kernels:Dense \1\n",
    # 400 tokens on two devices take 10 ms and 10; then 10 ms a token, and the transfer.
    "Add a cost model": r"TTFT 20.0 ms, TPOT 10.0 ms",
}


def test_there_is_an_example_of_each_kind():
    assert set(EXAMPLES) == set(PRINTED)


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_short(title: str):
    """A kernel has three kinds of attention to override."""
    most = 20 if title == "Add an attention kernel" else 12
    assert max(len(snippets.lines(each)) for each in EXAMPLES[title]) <= most


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_runs_as_it_is_printed(title: str, site: Path, tmp_path: Path):
    printed = snippets.run(EXAMPLES[title], tmp_path, site)
    assert re.search(PRINTED[title], printed), printed


def test_wheel_holds_nothing_else(site: Path):
    packages = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert packages == set(PACKAGES)


def test_wheel_has_the_weights_of_tiny_and_the_profiles_of_engines(site: Path):
    assert ROOT / "models/trained/tiny/model.json" in data()
    assert ROOT / "disagg_jax/sim/engines/vllm.json" in data()
    for path in data():
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


# Every system, and a policy of one's own that is a subclass: here, and in workers.
SIMULATIONS = """
import dataclasses, json
from disagg_jax.control import controller
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.scheduling import SYSTEMS
from disagg_jax.scheduling.orca import Orca
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from disagg_jax.sim.workers import worker_pool
from disagg_jax.workload import RandomWorkload, UniformLengths

@dataclasses.dataclass(frozen=True, kw_only=True)
class InTurn(Orca):
    prompts: int = 1  # in a step

    def plan(self, instance):
        plan = super().plan(instance)
        return dataclasses.replace(plan, chunks=plan.chunks[: self.prompts])

def simulate(simulated):
    lengths = UniformLengths(low=1, high=90)
    workload = RandomWorkload(prompt=lengths, output=lengths)
    requests = workload.requests(150, 40.0, seed=0)
    return simulated.run(requests).timelines

MEMORY = KVMemory(num_blocks=30, block_tokens=16, max_context=200)

def build(policies):
    split = Role.PREFILL in policies
    text = "2xprefill:tp1pp2,decode:tp1" if split else "2xcolocated:tp1pp2"
    return SimulatedDeployment(
        deployment=Deployment.parse(text),
        policies=policies,
        memory=(MEMORY,) * (2 + split),
        cost=LinearCost(
            step_base_s=5e-3,
            prefill_token_s=1e-4,
            context_token_s=1e-6,
            transfer_token_s=1e-5,
            transfer_parts=4,
            pp=(2, 2, 1),
        ),
        streams=split,
    )

if __name__ == "__main__":
    cases = [build(policies) for policies in SYSTEMS.values()]
    cases.append(build({Role.COLOCATED: InTurn(max_seqs=4)}))
    here = [simulate(case) for case in cases]
    with worker_pool(2) as mapper:
        assert [*mapper(simulate, cases)] == here
    assert any(timeline.preemptions for run in here for timeline in run)
    print(json.dumps({"controller": controller.__file__, "runs": [*map(repr, here)]}))
"""


@pytest.mark.slow
def test_compiled_it_has_the_results_of_the_source(copy: Path, tmp_path: Path):
    compiled = install(copy, tmp_path, compile="1")
    assert not [*(copy / "disagg_jax").rglob("*.so")]
    script = tmp_path / "simulations.py"
    script.write_text(SIMULATIONS)
    built, source = (
        json.loads(run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(folder)))
        for folder in (compiled, ROOT)
    )
    assert Path(source["controller"]) == ROOT / "disagg_jax/control/controller.py"
    assert Path(built["controller"]).suffix in (".so", ".pyd")
    assert built["runs"] == source["runs"]


def test_an_editable_install_is_not_compiled(copy: Path):
    build = subprocess.run(
        [sys.executable, "setup.py", "editable_wheel"],
        cwd=copy,
        env=os.environ | {"DISAGG_JAX_COMPILE": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 1
    assert "expected an install that is not editable" in build.stderr
