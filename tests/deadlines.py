"""Deadlines that pass without a clock."""


class After:
    """A `Deadline` that has passed once it was asked so often."""

    def __init__(self, asked: int):
        self._left = asked

    def passed(self) -> bool:
        self._left -= 1
        return self._left < 0
