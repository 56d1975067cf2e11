"""Where the time of a row's steps goes."""

import dataclasses

from disagg_jax.sim.cost.step_terms import EngineFactors
from disagg_jax.sim.engines import get_engine
from experiments.measured.step_times import describe_steps
from tests.experiments.measured.measurements import fields, read_one, workers

NOTHING = dict.fromkeys(
    ("linear", "experts", "expanded", "attention", "kv", "reduce", "exchange"), 0.0
)
# Of host work alone: 3 ms a step, and 1 ms a sequence.
HOST = dataclasses.replace(
    get_engine("ideal"), factors=EngineFactors(**NOTHING, step_s=3e-3, sequence_s=1e-3)
)


def cells(folder, row, profile=HOST):
    """The names of the columns, and the cells of each instance."""
    read = read_one(folder, row)
    head, _, *lines = describe_steps(read, read.loop, profile).splitlines()
    return head.split("  "), [line.split() for line in lines]


def test_a_row_alone(tmp_path):
    # 34 requests one after another: a prompt and two decodes each.
    head, (line,) = cells(tmp_path, fields(concurrency=1, isl=4, osl=3, tp_size=1))
    names = [name.strip() for name in head if name.strip()]
    assert names == ["instance", "steps", "ms a step", "sequence_s, %", "step_s, %"]
    assert line == ["0:", "colocated:tp1", "102", "4.00", "25.0", "75.0"]


def test_every_instance_has_a_line(tmp_path):
    row = workers((1, 1, 1, 0), (1, 2, 1, 0), concurrency=1, isl=4, osl=3)
    _, (prefill, decode) = cells(tmp_path, row)
    assert prefill[:4] == ["0:", "prefill:tp1", "34", "4.00"]
    assert decode[:4] == ["1:", "decode:tp2", "68", "4.00"]


def test_terms_that_take_no_time_have_no_column(tmp_path):
    row = fields(concurrency=1, isl=400, osl=3, tp_size=1)
    head, (line,) = cells(tmp_path, row, get_engine("ideal"))
    names = [name.strip() for name in head if name.strip()]
    assert names[3:] == ["linear, %", "attention, %", "kv, %"]
    shares = [float(share) for share in line[4:]]
    assert abs(sum(shares) - 100) < 0.2
