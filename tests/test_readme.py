"""README's examples run as they are printed."""

import pathlib
import re

import pytest

from tests.commands import run_code

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


@pytest.mark.jax
@pytest.mark.parametrize("title", EXAMPLES)
def test_it_runs_as_it_is_printed(title):
    done = run_code(EXAMPLES[title])
    assert done.returncode == 0, done.stderr
    # An example that asserts nothing could not fail.
    assert re.search(r"^assert ", EXAMPLES[title], re.M)
