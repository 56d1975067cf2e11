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

from experiments.compile_core import MODULES, PACKAGE, with_constructors

ROOT = Path(__file__).resolve().parents[2]
# By which the core is known: policies, events, spans, faults, and other simulators.
TESTS = (
    "tests/test_closed_loop.py",
    "tests/test_colocated_systems.py",
    "tests/test_controller.py",
    "tests/test_controller_properties.py",
    "tests/test_decode_batch.py",
    "tests/test_event_log.py",
    "tests/test_kv_blocks.py",
    "tests/test_spans.py",
    "tests/test_virtual_clock.py",
    "tests/sim/test_simulate.py",
    "tests/sim/test_simdistserve_stages.py",
    "tests/sim/test_streams.py",
    "tests/experiments/test_simulate.py",
    "tests/experiments/test_simulator_speed.py",
)


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


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    x: int = 1
'''


def test_constructors_are_those_that_dataclasses_makes():
    plain, written = {}, {}
    exec(RECORDS, plain)
    exec(with_constructors(RECORDS), written)
    for values in ((1,), (1, 3.0), (1, 3.0, [4])):
        records = [classes["Record"](*values) for classes in (plain, written)]
        assert dataclasses.asdict(records[0]) == dataclasses.asdict(records[1])
        assert repr(records[0]) == repr(records[1])
    assert written["Record"](1).c is not written["Record"](1).c
    assert written["Record"](a=1, c=[5]).c == [5]
    with pytest.raises(TypeError):
        written["Record"]()


def test_every_record_of_the_core_gets_one_and_parameters_do_not():
    assert with_constructors(RECORDS).count("def __init__") == 1
    for module in MODULES:
        source = (PACKAGE / f"{module}.py").read_text()
        records = source.count("@dataclasses.dataclass(slots=True")
        added = with_constructors(source).count("def __init__")
        assert added - source.count("def __init__") == records


def test_without_mypyc_it_says_how_to_get_it(tmp_path):
    copy = copy_of_checkout(tmp_path)
    (copy / "mypyc").mkdir()
    (copy / "mypyc" / "__init__.py").touch()
    (copy / "mypyc" / "build.py").write_text("raise ModuleNotFoundError")
    made = run(copy, "-m", "experiments.compile_core")
    assert made.returncode == 1
    assert "expected mypyc to be installed: pip install -e '.[fast]'" in made.stderr
