"""Workers on a Ray cluster of this machine: the results of local processes."""

import importlib.util
import os
import pathlib
import pickle
import time

import pytest

from disagg_jax.deployment import Deployment
from disagg_jax.metrics import SLO
from disagg_jax.search.goodput import GoodputSearch, find_goodput
from disagg_jax.sim.simulation import Simulation
from disagg_jax.sim.workers import worker_pool
from disagg_jax.workload import RandomWorkload, UniformLengths
from experiments.cli import ray_workers
from experiments.cli.ray_workers import Build, ray_pool
from experiments.cli.workers import open_workers

pytestmark = [
    pytest.mark.slow,
    # Not by importing it: that is for `ray_pool` to do first.
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs the extra [cluster]"
    ),
    # JAX warns of any fork; Ray's begin other programs at once.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def mapper():
    with open_workers("ray") as pool:
        yield pool


def fail(text):
    raise ValueError(text)


def die_once(mark):
    """End the worker's process the first time."""
    if not os.path.exists(mark):
        pathlib.Path(mark).touch()
        os._exit(1)
    return os.getpid()


def test_an_address_where_nothing_is_is_named_at_once():
    with pytest.raises(ValueError, match="address of a Ray cluster, got '127.0.0.1:1'"):
        with ray_pool("127.0.0.1:1"):
            pass


def test_results_come_in_the_order_of_the_items(mapper):
    assert list(mapper(abs, [-1, 2, -3])) == [1, 2, 3]
    assert os.getpid() not in set(mapper(pid_after, [0, 0]))


def pid_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_a_cluster_of_this_machine_is_reached_from_nowhere_else(mapper):
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


def test_an_error_of_a_task_is_raised_here_as_it_was(mapper):
    with pytest.raises(ValueError) as error:
        list(mapper(fail, ["rate: expected > 0, got 0"]))
    assert type(error.value) is ValueError
    assert str(error.value) == "rate: expected > 0, got 0"


def test_a_worker_that_dies_costs_only_its_task(mapper, tmp_path):
    marks = [str(tmp_path / name) for name in "ab"]
    pathlib.Path(marks[1]).touch()  # this one lives
    assert len(list(mapper(die_once, marks))) == 2


def test_a_worker_of_another_build_is_refused(mapper, monkeypatch):
    here = Build.here()
    other = Build(source="0" * 16, jax=here.jax, python=here.python)
    monkeypatch.setattr(ray_workers.Build, "here", staticmethod(lambda: other))
    with pytest.raises(RuntimeError, match="worker: expected Build.*0000.*, got Build"):
        list(mapper(abs, [1]))


def test_a_goodput_is_that_of_local_processes_byte_for_byte(mapper):
    simulation = Simulation.of("opt-13b", hardware="a100-80g", system="disaggregated")
    asked = GoodputSearch(
        simulated=simulation.build(Deployment.parse("prefill:tp1,decode:tp1")),
        workload=RandomWorkload(
            prompt=UniformLengths(low=100, high=500),
            output=UniformLengths(low=10, high=50),
        ),
        slo=SLO(ttft_s=0.4, tpot_s=0.1),
        num_requests=100,
        seeds=(0, 1),
    )
    with worker_pool(2) as local:
        expected = find_goodput(asked, local)
    assert expected.rps > 0
    assert pickle.dumps(find_goodput(asked, mapper)) == pickle.dumps(expected)
