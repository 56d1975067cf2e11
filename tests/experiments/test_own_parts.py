"""Commands with a system, a router, a model and a cost model of a user's own module.

The module lies in the folder where the command is started, and nothing is installed.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.jax
ROOT = pathlib.Path(__file__).parents[2]
MINE = """
import dataclasses
from disagg_jax.deployment import Role
from disagg_jax.scheduling.decode_only import DecodeOnly
from disagg_jax.scheduling.interface import Chunk, Plan, StepLimits
from disagg_jax.scheduling.preemption import decode_all, fits
from disagg_jax.scheduling.prefill_only import PrefillOnly
from disagg_jax.sim import DeviceCost
from models.config import PRESETS

@dataclasses.dataclass(frozen=True)
class ShortestFirst:
    max_seqs: int = 8

    @property
    def limits(self):
        return StepLimits(prefill_tokens=64, prefill_rows=1, decode_rows=self.max_seqs)

    def plan(self, instance):
        for shortest in sorted(instance.waiting, key=lambda r: r.num_tokens)[:1]:
            if instance.resident < self.max_seqs and fits(instance, shortest, 0.01):
                return Plan([Chunk.whole(shortest)])
        return decode_all(instance)

shortest = {Role.COLOCATED: ShortestFirst()}
apart = {Role.PREFILL: PrefillOnly(max_seqs=1), Role.DECODE: DecodeOnly()}

def last(request, instances):
    return instances[len(instances) - 1]

@dataclasses.dataclass(frozen=True)
class OneSecond:
    def stages_s(self, load):
        return (1.0,)

    def decode_s(self, decodes, context):
        return 1.0

def one_second(model, hardware):
    return DeviceCost(
        name=f"one second/{hardware.name}",
        instance=lambda _: OneSecond(),
        kv_tokens=lambda _: 10_000,
    )

model = dataclasses.replace(PRESETS["tiny"], name="own model")
"""
TRACE = "arrival_s,prompt_tokens,output_tokens\n0,100,2\n0,50,2\n0.5,10,1\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path


def command(folder, name, *args):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_simulate_with_all_of_ones_own(folder):
    shown = command(
        folder,
        "simulate",
        *("--trace=trace.csv", "--deployment=2xcolocated:tp1", "--out=out"),
        *("--model=mine:model", "--hardware=h100", "--cost=mine:one_second"),
        *("--system=mine:shortest", "--prefill_router=mine:last"),
    )
    idle, busy = (line for line in shown.splitlines() if "instance" in line)
    assert idle.startswith("instance 0, colocated:tp1 ") and idle.endswith("  0.0%")
    assert busy.startswith("instance 1, colocated:tp1 ") and busy.endswith(" 100.0%")
    # Each step takes a second: the prompts of 50, 10 and 100 tokens, then a decode.
    rows = (folder / "out" / "requests.csv").read_text().splitlines()[1:]
    ttft_s = [float(row.split(",")[4]) for row in rows]
    assert ttft_s == [3.0, 1.0, 1.5]
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["system"] == "mine:shortest"
    assert config["simulation"]["model"] == "own model"
    assert config["simulation"]["cost"] == "one second/h100"
    assert config["simulation"]["prefill_router"] == "mine:last"


def test_an_own_system_is_compared_in_worker_processes(folder):
    """And said not to be tuned beside those that are."""
    shown = command(
        folder,
        "compare_systems",
        *("--model=mine:model", "--devices=2", "--map=targets", "--workers=2"),
        *("--systems=sarathi_serve,mine:shortest,mine:apart", "--seeds=1"),
        *("--ttfts=0.5", "--tpots=0.05", "--workload=fixed:512x8"),
        *("--num_requests=9", "--max_requests=9", "--tolerance=0.5", "--out=out"),
    )
    assert "mine:shortest" in shown
    assert "not tuned: ShortestFirst declares no step size" in shown
    found = json.loads((folder / "out" / "maps.json").read_text())
    assert found["question"]["systems"][1:] == ["mine:shortest", "mine:apart"]
    policies = found["question"]["policies"]["mine:shortest"]["colocated"]
    assert policies == {"type": "ShortestFirst", "max_seqs": 8}


def test_an_own_system_is_placed(folder):
    command(
        folder,
        "placement_search",
        *("--model=mine:model", "--hardware=h100", "--devices=2", "--slo=0.5,0.05"),
        *("--workload=fixed:64x8", "--num_requests=9", "--algorithm=joint"),
        *("--systems=mine:shortest,mine:apart", "--workers=1", "--out=out"),
    )
    found = json.loads((folder / "out" / "placement.json").read_text())["joint"]
    assert found["system"] in ("mine:shortest", "mine:apart")
    names = {row["candidate"].split()[0] for row in found["candidates"]}
    assert "mine:shortest" in names and "vllm_v0" not in names


@pytest.mark.slow  # compiles the programs of two systems
def test_an_own_system_in_the_main_job(folder):
    shown = command(
        folder,
        "goodput_sweep",
        *("--config=smoke", "--systems=vllm_v0,mine:shortest", "--out=out"),
        *("--set", "rates=20", "--set", "num_seeds=1", "--set", "timing_repeats=1"),
        *("--set", "systems.mine:shortest.policies.colocated.max_seqs=4"),
        *("--set", "prefill_router=mine:last"),
    )
    assert "mine:shortest: colocated not tuned: ShortestFirst declares no" in shown
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["systems"]["mine:shortest"] == {
        "type": "System",
        "deployment": "2xcolocated:tp1",
        "policies": {"colocated": {"type": "ShortestFirst", "max_seqs": 4}},
    }
    assert config["prefill_router"] == "mine:last"
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert set(summary["systems"]) == {"vllm_v0", "mine:shortest"}
