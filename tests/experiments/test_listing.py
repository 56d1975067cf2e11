"""The list of commands is the commands there are, in the document too."""

import pathlib
import re

from experiments.__main__ import COMMANDS, listing

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


def test_every_command_is_listed_once():
    listed = [name for commands in COMMANDS.values() for name in commands]
    there = {path.stem for path in FOLDER.glob("*.py")}
    assert sorted(listed) == sorted(there - {"__init__", "__main__", "here"})
    for name in listed:
        assert f"\n  {name} " in listing()


def test_the_document_has_the_same_list():
    text = (FOLDER / "README.md").read_text()
    listed: dict[str, dict[str, str]] = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE):
        title, _, rows = part.partition("\n")
        if "| `python -m experiments.` | |" in rows:
            listed[title] = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", rows, re.M))
    assert listed == COMMANDS
