"""Where the time of a row's steps goes."""

from disagg_jax.work import StepLoad
from experiments.measured.step_times import (
    describe_steps,
    time_by_kind,
    time_by_term,
)
from tests.experiments.measured.measurements import fields, read_one
from tests.sim.test_simulated_deployment import simulated


def test_terms_add_up_by_instance():
    prompt, decode = StepLoad(((0, 8),), 0, 0), StepLoad((), 2, 20)

    def terms(instance, load):
        return {"tokens": load.prompt_tokens + load.decodes, "context": load.context}

    found = time_by_term([(1, decode), (0, prompt), (1, decode)], terms)
    assert found == {0: {"tokens": 8, "context": 0}, 1: {"tokens": 4, "context": 40}}


def test_kinds():
    terms = time_by_kind(simulated("colocated:tp1").cost)
    assert terms(0, StepLoad(((0, 8),), 0, 0)) == {"prompts": 1.0}
    assert terms(0, StepLoad(((0, 8),), 1, 9)) == {"mixed": 1.0}
    assert terms(0, StepLoad((), 1, 9)) == {"decodes": 1.0}


def test_a_row_alone(tmp_path):
    # 34 requests one after another: a prompt and two decodes each, of 1 s.
    row = read_one(tmp_path, fields(concurrency=1, isl=4, osl=3))
    table = describe_steps(simulated("colocated:tp1"), row, row.loop)
    head, _, line = table.splitlines()
    names = ["steps", "ms a step", "decodes, %", "prompts, %", "prompt tokens"]
    assert [head.index(name) for name in names] == sorted(map(head.index, names))
    steps, step_ms, decodes, prompts, tokens, *_ = line.split()[2:]
    assert (steps, step_ms, decodes, prompts) == ("102", "1000.00", "66.7", "33.3")
    assert tokens == "1.3"  # 4 of 3 steps
