"""How far two runs decided alike."""

import dataclasses

from disagg_jax.calibration.decision_agreement import agreement
from tests.sim.linear_runs import COST, burst, run


def test_runs_agree_with_themselves_and_not_with_slower_ones():
    lines, _, _ = run("prefill:tp1,decode:tp1", COST, burst())
    same = agreement(lines, lines)
    assert same.decided == same.shared == same.before > 20
    slow = dataclasses.replace(COST, step_base_s=4.0)
    others, _, _ = run("prefill:tp1,decode:tp1", slow, burst())
    found = agreement(lines, others)
    assert found.decided == same.decided
    assert 0 < found.before <= found.shared < found.decided
