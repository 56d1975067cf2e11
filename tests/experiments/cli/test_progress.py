"""Progress and deadlines on a clock by hand."""

import pytest

from experiments.cli.flags import Flags
from experiments.cli.progress import Deadline, MinutesFlag, ProgressLines, time_text


class Hand:
    """A clock that is set."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def made():
    clock, said = Hand(), []
    return clock, said, ProgressLines(said.append, clock, every_s=5.0)


def test_a_line_has_the_seconds_since_the_start():
    clock, said, progress = made()
    clock.now_s += 2.5
    progress("hello")
    assert said == ["[   2.5 s] hello"]


def test_what_is_left_follows_from_what_is_done_of_the_part():
    """Two of six steps took 20 s, so four take 40; another part begins anew."""
    clock, said, progress = made()
    progress.step("cells", 0, 6)
    clock.now_s += 20
    progress.step("cells", 2, 6, "best 3")
    progress.step("seeds", 0, 3)
    clock.now_s += 100
    progress.step("seeds", 1, 3)
    assert said == [
        "[   0.0 s] 0/6 cells",
        "[  20.0 s] 2/6 cells, best 3, about 40 s left",
        "[  20.0 s] 0/3 seeds",
        "[ 120.0 s] 1/3 seeds, about 3 min left",
    ]


def test_a_part_may_begin_again_under_its_name():
    """Two steps took 20 s the first time, and 6 s the second time."""
    clock, said, progress = made()
    progress.step("runs", 0, 2)
    clock.now_s += 20
    progress.step("runs", 2, 2)
    progress.step("runs", 0, 4)
    clock.now_s += 6
    progress.step("runs", 2, 4)
    assert said[2:] == ["[  20.0 s] 0/4 runs", "[  26.0 s] 2/4 runs, about 6 s left"]


def test_steps_are_said_every_few_seconds_and_the_last_one_always():
    clock, said, progress = made()
    for done in range(11):
        progress.step("cells", done, 10)
        clock.now_s += 2
    shown = [line.partition("] ")[2].split()[0] for line in said]
    assert shown == ["0/10", "3/10", "6/10", "9/10", "10/10"]
    assert "left" not in said[-1]


def test_times_to_come_are_rough():
    assert [time_text(s) for s in (0.4, 1, 99, 130)] == ["", "1 s", "99 s", "2 min"]


def test_a_deadline_passes_once_and_none_never():
    clock = Hand()
    deadline, none = Deadline(0.5, clock), Deadline(None, clock)
    clock.now_s += 29
    assert not deadline.passed()
    clock.now_s += 1
    assert deadline.passed() and not none.passed()


def test_what_is_left_of_a_deadline_is_never_less_than_nothing():
    clock = Hand()
    deadline = Deadline(0.5, clock)
    clock.now_s += 29
    assert deadline.left_s == 1
    clock.now_s += 29
    assert deadline.left_s == 0
    assert Deadline(None, clock).left_s is None


def test_no_time_at_all_is_refused():
    flags = Flags()
    minutes = MinutesFlag(flags, "cells")
    flags.values(["x", "--minutes=0"])
    with pytest.raises(ValueError, match=r"--minutes: expected > 0, got 0\.0"):
        minutes.start()
