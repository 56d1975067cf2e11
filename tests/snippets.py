"""The Python examples of a document, run as they are printed, section by section."""

import os
import pathlib
import re
import subprocess
import sys

_FILE = re.compile(r"# (\w+\.py)\b")


def sections(document: pathlib.Path) -> dict[str, list[str]]:
    """Return the examples below each heading that has some."""
    parts = re.split(r"^## (.+)\n", document.read_text(), flags=re.M)
    found = {
        title: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: examples for title, examples in found.items() if examples}


def run(examples: list[str], folder: pathlib.Path, library: pathlib.Path) -> str:
    """Run the examples of a section in `folder`, and return what they print.

    One whose first line names a file is written to it, and those that follow import it.

    Args:
      library: the folder to import the packages from.
    """
    printed = ""
    for i, example in enumerate(examples):
        named = _FILE.match(example)
        file = folder / (named[1] if named else f"example_{i}.py")
        file.write_text(example)
        if named:
            continue
        done = subprocess.run(
            [sys.executable, file.name],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(library)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return printed


def lines(example: str) -> list[str]:
    """Return the lines of code, without comments and empty ones."""
    rows = (line.strip() for line in example.splitlines())
    return [row for row in rows if row and not row.startswith("#")]
