"""The library's examples run as they are printed, each in a process of its own."""

import pathlib
import re

import pytest

from tests.commands import run_code

README = (pathlib.Path(__file__).parents[1] / "disagg_jax/README.md").read_text()


def examples(title: str) -> list[str]:
    """The blocks of Python in the section called `title`."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


GENERATE = examples("Generate text")


def test_they_are_short():
    assert GENERATE
    assert all(code.count("\n") <= 12 for code in GENERATE)


@pytest.mark.jax
@pytest.mark.parametrize("code", GENERATE)
def test_text_is_generated(code):
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    printed, progress = done.stdout.splitlines(), done.stderr
    assert "loading tiny" in progress and "compiling prefill_T64_R4 (1 of" in progress
    if "on_piece" in code:
        pieces = {0: "", 1: ""}
        for line in printed:
            index, text = line.split(" ", 1)
            pieces[int(index)] += eval(text)
        assert pieces[0].startswith("\n        ") and pieces[1]
    else:
        assert printed[0].startswith("def read(self):")
        assert any(line.startswith("import ") for line in printed)
        assert done.stdout.count("Stages(prefill_queue_s=") == 2
