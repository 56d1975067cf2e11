"""How a figure's runs are done."""

import dataclasses

from experiments.cli.progress import ProgressLines
from experiments.papers.figure import Lab


@dataclasses.dataclass(frozen=True)
class Asked:
    name: str
    num_requests: int
    seed: int = 7


def test_each_run_is_done_with_every_seed_and_the_longest_first():
    done = []

    def task(run: Asked) -> tuple[str, int]:
        done.append(run.name)
        return run.name, run.seed

    said = []
    lines = ProgressLines(said.append, clock=lambda: 0.0)
    lab = Lab(seeds=2, workers=1, progress=lines)
    found = lab.by_seed(task, {"x": Asked("short", 10), "y": Asked("long", 20)})
    assert found == {"x": [("short", 0), ("short", 1)], "y": [("long", 0), ("long", 1)]}
    assert done == ["long", "long", "short", "short"]
    assert [line.partition("] ")[2] for line in said] == ["0/4 runs", "4/4 runs"]


def test_a_lab_may_shorten_all_runs():
    assert Lab(seeds=3).size(100) == "N=100 x 3 seeds"
    assert Lab(num_requests=8, seeds=3).size(100) == "N=8 x 3 seeds"
