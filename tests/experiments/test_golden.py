"""The smoke run, given step times, against the summary that is kept here."""

import pathlib

import pytest

from experiments import goodput_sweep
from experiments.configs.named import get_config

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.slow
def test_given_step_times_give_the_golden_summary(tmp_path):
    r"""The bytes are equal: nothing in them is measured or depends on jax's version.

    `golden/step_times.json` is made up: a device on which one system fails at the
    higher rate. Make the summary again only where scheduling, metrics or the form of
    `summary.json` change on purpose, and say in the commit which numbers moved and why:

        rm -r runs/golden
        python -m experiments.goodput_sweep --config=smoke --out=runs/golden \
            --step_times=tests/experiments/golden/step_times.json
        cp runs/golden/summary.json tests/experiments/golden/
    """
    times = GOLDEN / "step_times.json"
    goodput_sweep.run(get_config("smoke"), tmp_path / "run", str(times))
    found = (tmp_path / "run" / "summary.json").read_text()
    assert found == (GOLDEN / "summary.json").read_text()
