"""Notebooks are what their sources are, and show what they made. CI runs them."""

import json
import pathlib
import re
import subprocess
import sys

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
HOME = "github.com/disagg-jax/disagg-jax"


def test_there_are_four_and_no_other_files():
    names = {path.stem for path in SOURCES}
    assert names == {
        "disaggregation_in_five_minutes",
        "on_a_tpu_slice_or_multi_gpu_host",
        "reproducing_distserve",
        "will_disaggregation_help_me",
    }
    listed = subprocess.run(
        ["git", "ls-files", "."], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    expected = {f"{name}{end}" for name in names for end in (".py", ".ipynb")}
    assert set(listed.stdout.split()) == expected


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param


@pytest.fixture
def notebook(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def what(cell):
    """What a cell says, without what came out of it."""
    return cell.cell_type, cell.source, cell.metadata.get("tags", [])


def test_it_is_what_its_source_is(source, notebook):
    command = f"jupytext --to ipynb --execute experiments/notebooks/{source.name}"
    cells = [what(cell) for cell in jupytext.read(source).cells]
    assert [what(cell) for cell in notebook.cells] == cells, f"run {command}"


def is_run(cell):
    return cell.cell_type == "code" and "skip-execution" not in cell.metadata.get(
        "tags", []
    )


def test_it_was_run_from_top_to_bottom_and_shows_what_came_out(notebook):
    cells = [cell for cell in notebook.cells if is_run(cell)]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert [o for o in outputs if "image/png" in o.get("data", {})]
    for cell in notebook.cells:
        if cell.cell_type == "code" and not is_run(cell):
            assert not cell.outputs


def test_no_path_of_the_machine_that_ran_it(notebook):
    shown = json.dumps(
        [
            [output.get("text"), output.get("data", {}).get("text/plain")]
            for cell in notebook.cells
            if cell.cell_type == "code"
            for output in cell.outputs
        ]
    )
    assert not re.findall(r"(?<![\w.])/(?:tmp|work|root|home|content|usr)/\S+", shown)


def test_it_begins_with_its_badge_its_code_and_its_devices(source, notebook):
    first, second, *rest = notebook.cells
    badge = f"colab.research.google.com/{HOME.replace('.com', '')}/blob/main/"
    assert first.source.startswith("[![Open in Colab]")
    assert f"{badge}experiments/notebooks/{source.stem}.ipynb)" in first.source
    title, purpose = re.search(r"^# (.+)\n\n(.+)", first.source, re.M).groups()
    assert title and purpose
    assert '"google.colab" in sys.modules' in second.source
    assert f"https://{HOME}" in second.source
    words, devices = rest[:2]
    assert "8 devices (" in words.source
    assert "machine.look()" in devices.source
    assert "8 devices (cpu: cpu)" in devices.outputs[0].text


def test_what_comes_from_colab_is_the_same_in_all():
    setups = {jupytext.read(path).cells[1].source for path in SOURCES}
    assert len(setups) == 1


def test_every_notebook_names_a_command_that_does_the_same(notebook):
    words = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert re.findall(r"python -m experiments\.\w+", words)


# -- the first cell -------------------------------------------------------------------

# Runs the cell as often as is asked, on Colab or not, and shows where it ends up.
DRIVER = """
import os, pathlib, subprocess, sys
cell, times, colab = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "colab"
def run(command, **_):
    print(*command)
    if "clone" in command:
        pathlib.Path("disagg-jax/experiments").mkdir(parents=True)
        pathlib.Path("disagg-jax/experiments/here.py").touch()
subprocess.run = run
if colab:
    sys.modules["google.colab"] = sys
for _ in range(times):
    exec(cell)
print(os.getcwd(), sys.path.count(os.getcwd()))
"""


def first_cell(cwd, times=1, where="laptop"):
    cell = jupytext.read(SOURCES[0]).cells[1].source
    return subprocess.run(
        [sys.executable, "-c", DRIVER, cell, str(times), where],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(
    "cwd", [FOLDER, FOLDER.parents[1], FOLDER.parents[1] / "tests"]
)
def test_the_first_cell_finds_the_checkout_however_often_it_runs(cwd, times):
    done = first_cell(cwd, times)
    assert done.stdout == f"{FOLDER.parents[1]} 1\n", done.stderr


def test_outside_a_checkout_it_says_what_to_do(tmp_path):
    (tmp_path / "setup.py").touch()  # of another project
    for _ in range(2):
        done = first_cell(tmp_path)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert f"git clone https://{HOME}\n" in done.stderr
        assert "pip install -e ./disagg-jax" in done.stderr
        assert not done.stdout
    # And when that is done beside the notebook, it goes on.
    (tmp_path / "disagg-jax" / "experiments").mkdir(parents=True)
    (tmp_path / "disagg-jax" / "experiments" / "here.py").touch()
    assert first_cell(tmp_path, 2).stdout == f"{tmp_path / 'disagg-jax'} 1\n"


def test_colab_gets_the_code_once_also_after_a_restart(tmp_path):
    first = first_cell(tmp_path, 2, "colab")
    lines = first.stdout.splitlines()
    assert [line.split()[0] for line in lines].count("git") == 1, first.stderr
    assert lines[-1] == f"{tmp_path / 'disagg-jax'} 1"
    again = first_cell(tmp_path, 1, "colab")  # a new kernel, where the first began
    lines = again.stdout.splitlines()
    assert len(lines) == 2 and lines[0].endswith(f"-qe {tmp_path / 'disagg-jax'}")
    assert lines[1] == f"{tmp_path / 'disagg-jax'} 1"


def test_a_kernel_says_it_without_a_traceback(tmp_path):
    """In a kernel: the message alone, and the cells after it do not run."""
    source = jupytext.read(SOURCES[0])
    cells = [source.cells[1], nbformat.v4.new_code_cell("print('went on')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120)
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        client.execute(cwd=str(tmp_path))
    outputs = json.dumps(notebook.cells[0].outputs)
    assert "git clone" in outputs and "Traceback (most recent call" not in outputs
    assert not notebook.cells[1].outputs
