"""The list of commands is the commands there are."""

import pathlib

from experiments.__main__ import COMMANDS, listing

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


def test_every_command_is_listed_once():
    listed = [name for commands in COMMANDS.values() for name in commands]
    there = {path.stem for path in FOLDER.glob("*.py")}
    assert sorted(listed) == sorted(there - {"__init__", "__main__", "here"})
    for name in listed:
        assert f"\n  {name} " in listing()
