"""`experiments.interference`: each system's way of failing, seen in its own numbers."""

import pytest

from disagg_jax.sim import Simulation
from experiments import interference
from experiments.interference import WORKLOAD, chunked_prompt_s, simulate, stretch
from tests.commands import run_command
from tests.timelines import served


class PerToken:
    """A second for each pass and each token in it, on either of two stages."""

    def stages_s(self, load):
        half_s = (1 + load.prompt_tokens + load.decodes) / 2
        return half_s, half_s


def test_a_prompt_in_chunks_pays_for_each_pass():
    assert chunked_prompt_s(PerToken(), prompt=10, chunk=10) == 11
    assert chunked_prompt_s(PerToken(), prompt=10, chunk=4) == 13  # 4, 4 and 2


def test_a_chunk_stretches_the_step_of_decodes():
    assert stretch(PerToken(), 33) == 2.0  # 32 decodes: 33 s, and 33 s more


@pytest.mark.parametrize(
    ("token_s", "stalled"),
    [([0.0, 1.0, 2.0, 4.0], False), ([0.0, 1.0, 2.0, 4.5], True), ([0.0], False)],
)
def test_a_stall_is_longer_than_twice_the_median_gap(token_s, stalled):
    assert interference._stalled(served(token_s)) is stalled


@pytest.fixture(scope="module")
def found():
    simulation = Simulation.of("opt-13b", "a100-80g")
    return simulate(simulation, WORKLOAD.requests(120, 6.0, 0), budget=512)


def test_who_mixes_prompts_and_decodes(found):
    mixing = {name for name, traits in found.items() if traits.steps["mixed"]}
    assert mixing == {"orca", "vllm_v1", "sarathi", "sarathi_serve", "splitfuse"}
    for name, traits in found.items():
        assert (traits.beside_prompts > 0) == (name in mixing)


def test_each_systems_failure_shows(found):
    longest_s = {name: traits.gaps_s.max() for name, traits in found.items()}
    chunked = ("vllm_v1", "sarathi", "sarathi_serve", "splitfuse")
    # Whole prompts stall decodes for longer than chunks do.
    assert min(longest_s["vllm_v0"], longest_s["orca"]) > 1.5 * max(
        longest_s[name] for name in chunked
    )
    # Chunks are paid for by the prompts.
    for name in chunked:
        assert found[name].stages.prefill_s > found["vllm_v0"].stages.prefill_s
    # Only disaggregation moves KV, and its prefill device waits for work.
    apart = found["disaggregated"]
    moves = {name: traits.stages.transfer_s > 0 for name, traits in found.items()}
    assert moves == {name: name == "disaggregated" for name in found}
    assert apart.idle["prefill"] > 0.3 > apart.idle["decode"]
    assert apart.stalls < min(found[name].stalls for name in found if moves[name] == 0)


def test_a_budget_that_no_system_can_have_is_an_error(tmp_path):
    done = run_command("interference", "--budget=10", f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "Sarathi.chunk_tokens: expected >= max_seqs (64)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_everything_is_written(tmp_path):
    done = run_command("interference", "--num_requests=20", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "interference.txt").read_text()
    assert "N=20, seed 0" in text and text in done.stdout
    assert (tmp_path / "interference.png").stat().st_size > 10_000
