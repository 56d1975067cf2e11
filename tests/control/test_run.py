"""What a run says of the time that devices worked."""

from disagg_jax.control.run import Run
from disagg_jax.deployment import Deployment


def test_busy_shares_are_by_instance_and_stage():
    deployment = Deployment.parse("prefill:tp1pp2,decode:tp2")
    busy_s = {(0,): 1.0, (0, 1): 2.0, (1,): 4.0, (-3, 0, 1): 3.0}
    run = Run(timelines=[], end_s=4.0, busy_s=busy_s)
    assert run.busy_shares(deployment) == [(0.25, 0.5), (1.0,)]
    nothing = Run(timelines=[], end_s=0.0, busy_s={})
    assert nothing.busy_shares(deployment) == [(0.0, 0.0), (0.0,)]


def test_links_that_moved_kv_have_names():
    busy_s = {(0,): 1.0, (-3, 0, 1): 3.0, (-2, 4): 2.0, (-1, 0): 1.0, (1, 1): 1.0}
    run = Run(timelines=[], end_s=4.0, busy_s=busy_s)
    assert run.busy_links() == {
        "instance 0 to 1": 0.75,
        "into instance 4": 0.5,
        "network of node 0": 0.25,
    }
