"""Format numbers: what is written is read, and what is not known is refused."""

import pytest

from disagg_jax.formats import Format

FORMAT = Format(name="a log", number=3, oldest=1, command="make_a_log")


def test_what_is_written_is_read_and_its_number_comes_first():
    written = FORMAT.write({"a": 1, "b": [2]})
    assert list(written.items()) == [("format", 3), ("a", 1), ("b", [2])]
    assert FORMAT.read(written) == {"a": 1, "b": [2]}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_older_formats_are_read(number):
    assert FORMAT.read({"format": number, "a": 1}) == {"a": 1}


def test_without_a_number_it_is_0():
    older = Format(name="a log", number=3, command="make_a_log")
    assert older.read({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="expected format 1 to 3, .* got 0"):
        FORMAT.read({"a": 1})


@pytest.mark.parametrize("number", [0, 4, "3", 3.0, True, None])
def test_others_are_refused(number):
    message = f"^a log: expected format 1 to 3, as made by make_a_log, got {number!r}$"
    with pytest.raises(ValueError, match=message):
        FORMAT.read({"format": number, "a": 1})
