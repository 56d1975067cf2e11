"""The examples of the documents run as they are printed.

The one of experiments/README.md reads a run, so `test_goodput_sweep` runs it.
"""

import pathlib
import re

import pytest

from tests.commands import run_code

ROOT = pathlib.Path(__file__).parents[1]


def examples(name: str) -> dict[str, str]:
    """Return the Python examples of a document, by the line where each begins."""
    text = (ROOT / name).read_text()
    return {
        f"{name}:{len(text[: match.start()].splitlines()) + 1}": match[1]
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    }


EXAMPLES = examples("README.md") | examples("disagg_jax/README.md")


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.jax
@pytest.mark.parametrize("where", EXAMPLES)
def test_it_runs_as_it_is_printed(where: str):
    done = run_code(EXAMPLES[where])
    assert done.returncode == 0, done.stderr
    # An example that asserts nothing could not fail.
    assert re.search(r"^assert ", EXAMPLES[where], re.M)
