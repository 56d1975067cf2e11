"""README's examples run as they are printed, and its documents say what is so."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = {
    title: code
    for title, code in re.findall(
        r"^## (To add [^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```",
        README,
        re.M | re.S,
    )
}


def test_there_is_an_example_of_each_kind():
    assert list(EXAMPLES) == [
        "To add a system",
        "To add a model",
        "To add a cost model",
    ]
    assert README.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_it_runs_as_it_is_printed(title):
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[title]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # An example that asserts nothing could not fail.
    assert re.search(r"^assert ", EXAMPLES[title], re.M)


def test_the_order_of_its_parts():
    parts = re.findall(r"^## (.+)$", README, re.M)
    assert parts[:5] == [
        "Two commands",
        "What you get",
        "Notebooks",
        "Results so far",
        "How far the simulator is from the engine",
    ]
    middle = ["Where things are", *EXAMPLES, "What the numbers mean", "Limits"]
    assert parts[5:11] == middle


def test_lines_are_short_enough_to_read_in_a_terminal():
    """Tables, pictures and commands cannot be broken."""
    whole = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    lines = [line for line in whole.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 90] == []
