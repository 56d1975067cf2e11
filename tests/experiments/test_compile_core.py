"""`experiments.compile_core`: the same results compiled, and never outdated ones.

The core is compiled in a copy of the checkout, where tests of it run again.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.compile_core import MODULES, PACKAGE, as_compiled

ROOT = Path(__file__).resolve().parents[2]
# By which the core is known: policies, events, spans, faults, and other simulators.
TESTS = (
    "tests/workload/test_closed_loop.py",
    "tests/scheduling/test_colocated_systems.py",
    "tests/control/test_controller.py",
    "tests/control/test_controller_properties.py",
    "tests/control/test_decode_batch.py",
    "tests/runlog/test_event_log.py",
    "tests/control/test_block_pool.py",
    "tests/metrics/test_metrics.py",
    "tests/scheduling/test_scheduling.py",
    "tests/control/test_spans.py",
    "tests/control/test_virtual_clock.py",
    "tests/sim/cost/test_distserve.py",
    "tests/search/test_goodput.py",
    "tests/sim/hardware/test_link.py",
    "tests/sim/test_simulated_deployment.py",
    "tests/sim/test_simdistserve_stages.py",
    "tests/sim/test_streams.py",
    "tests/experiments/test_simulate.py",
    "tests/experiments/test_simulator_speed.py",
)


@pytest.mark.parametrize("module", MODULES)
def test_a_core_has_no_cached_properties(module):
    """Compiled, they would not be cached."""
    assert "cached_property" not in (PACKAGE / f"{module}.py").read_text()


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a checkout; of an editable install the original would come first."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )


def copy_of_checkout(folder: Path) -> Path:
    """The source alone, beside what lies beside the checkout."""
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "runs", ".*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    if (shared := ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(shared)
    return copy


def where(checkout: Path, module: str) -> str:
    """The file that a module is imported from; what went wrong if it is not."""
    code = f"import disagg_jax.{module} as it; print(it.__file__)"
    found = run(checkout, "-c", code)
    return (found.stdout or found.stderr).strip()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A checkout with a compiled core."""
    pytest.importorskip("mypyc")
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    copy = copy_of_checkout(tmp_path_factory.mktemp("compiled"))
    made = run(copy, "-m", "experiments.compile_core")
    assert made.returncode == 0, made.stdout + made.stderr
    assert f"{len(MODULES)} modules" in made.stdout
    return copy


@pytest.mark.slow
def test_a_compiled_core_passes_the_tests_of_the_core(compiled):
    assert where(compiled, "controller").endswith((".so", ".pyd"))
    tested = run(compiled, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


# A policy of one's own, and what goes to worker processes and back.
OWN_POLICY = """
import dataclasses, pickle
from disagg_jax.deployment import Deployment, KVMemory, Role
from disagg_jax.request import Request
from disagg_jax.scheduling import orca
from disagg_jax.sim.cost.linear import LinearCost
from disagg_jax.sim.simulated_deployment import SimulatedDeployment
from experiments.configs.named_simulations import get_simulation

@dataclasses.dataclass(frozen=True, kw_only=True)
class InTurn(orca.Orca):
    prompts: int = 2  # in a step

    def plan(self, instance):
        plan = super().plan(instance)
        return dataclasses.replace(plan, chunks=plan.chunks[: self.prompts])

policy = InTurn(max_seqs=4, prompts=1)
again = pickle.loads(pickle.dumps(policy))
assert again == policy and again.prompts == 1, again
cost = LinearCost(step_base_s=1.0)
simulated = SimulatedDeployment(
    deployment=Deployment.parse("colocated:tp1"),
    policies={Role.COLOCATED: again},
    memory=(KVMemory(num_blocks=64, max_context=64),),
    cost=pickle.loads(pickle.dumps(cost)),
)
sizes = dict(arrival_s=0.0, prompt_tokens=8, max_tokens=2)
requests = pickle.loads(pickle.dumps([Request(id=i, **sizes) for i in (0, 1)]))
first, second = simulated.run(requests).timelines
assert (first.prefill_start_s, second.prefill_start_s) == (0.0, 1.0)
found = pickle.loads(pickle.dumps(first))
assert (found.token_s, found.request) == (first.token_s, requests[0])

built = get_simulation("opt13b_a100").build(Deployment.parse("2xcolocated:tp2"))
runs = [it.run(requests) for it in (built, pickle.loads(pickle.dumps(built)))]
assert runs[0].timelines[1].token_s == runs[1].timelines[1].token_s
print(orca.__file__)
"""


@pytest.mark.slow
def test_policies_of_ones_own_may_be_subclasses_and_records_are_pickled(compiled):
    done = run(compiled, "-c", OWN_POLICY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith((".so", ".pyd"))


@pytest.mark.slow
def test_changed_source_is_never_run_from_what_was_compiled_before(compiled):
    source = compiled / "disagg_jax" / "spans.py"
    so, *_ = source.parent.glob("spans.*so")
    os.utime(source, (so.stat().st_mtime + 1,) * 2)
    message = where(compiled, "spans")
    assert f"{source} was changed after it was compiled to {so.name}" in message
    removed = run(compiled, "-m", "experiments.compile_core", "--remove")
    assert removed.stdout.startswith(f"{len(MODULES) + 1} files removed")
    assert where(compiled, "spans") == str(source)
    assert not [*source.parent.rglob("*.so")]


RECORDS = '''
import dataclasses


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """A record."""

    a: int  # what it means
    b: float = 2.0
    c: list[int] = dataclasses.field(
        default_factory=list[int]
    )
    d: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.d = self.a + 1


@dataclasses.dataclass(kw_only=True, slots=True)
class Named:
    a: int
    b: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    x: int = 1
'''


def test_constructors_are_those_that_dataclasses_makes():
    plain, written = {}, {}
    exec(RECORDS, plain)
    exec(as_compiled(RECORDS), written)
    for values in ((1,), (1, 3.0), (1, 3.0, [4])):
        records = [classes["Record"](*values) for classes in (plain, written)]
        assert dataclasses.asdict(records[0]) == dataclasses.asdict(records[1])
        assert repr(records[0]) == repr(records[1])
    assert written["Record"](1).c is not written["Record"](1).c
    assert written["Record"](a=1, c=[5]).c == [5]
    with pytest.raises(TypeError):
        written["Record"]()
    assert written["Named"](a=1) == written["Named"](a=1, b=2)
    with pytest.raises(TypeError):
        written["Named"](1)


def test_every_record_of_the_core_gets_one_and_parameters_do_not():
    assert as_compiled(RECORDS).count("def __init__") == 2
    for module in MODULES:
        source = (PACKAGE / f"{module}.py").read_text()
        dataclasses = source.count("@dataclasses.dataclass(")
        frozen = source.count("@dataclasses.dataclass(frozen=True")
        as_is = as_compiled(source)
        added = as_is.count("def __init__") - source.count("def __init__")
        assert added == dataclasses - frozen
        assert as_is.count("slots=True, init=False") == added
        assert as_is.count("@mypyc_attr(allow_interpreted_subclasses=True)") == frozen
        assert as_is.count("def __reduce__") == dataclasses


def test_what_is_pickled_are_fields():
    written = {"__name__": __name__}
    exec(as_compiled(RECORDS), written)
    record = written["Record"](5, c=[6])
    rebuild, (kind, fields) = record.__reduce__()
    assert fields == {"a": 5, "b": 2.0, "c": [6]}
    again = rebuild(kind, fields)
    assert (again.a, again.b, again.c, again.d) == (5, 2.0, [6], 6)


def test_without_mypyc_it_says_how_to_get_it(tmp_path):
    copy = copy_of_checkout(tmp_path)
    (copy / "mypyc").mkdir()
    (copy / "mypyc" / "__init__.py").touch()
    (copy / "mypyc" / "build.py").write_text("raise ModuleNotFoundError")
    made = run(copy, "-m", "experiments.compile_core")
    assert made.returncode == 1
    assert "expected mypyc to be installed: pip install -e '.[fast]'" in made.stderr
