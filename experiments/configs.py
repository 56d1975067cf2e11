"""The named configs. Each says what it asks, what it costs and what to expect."""

from __future__ import annotations

from experiments.config import Config, Memory, System, Workload

# The systems of the default comparison: the same two devices for each.
_MAX_SEQS = 16
_TWO_DEVICES = {
    "vllm": System.of(
        "vllm",
        "2xcolocated:tp1",
        colocated={"max_batched_tokens": 512, "max_seqs": _MAX_SEQS},
    ),
    "disaggregated": System.of(
        "disaggregated",
        "prefill:tp1,decode:tp1",
        prefill={"token_budget": 256, "max_seqs": _MAX_SEQS},
        decode={"max_seqs": _MAX_SEQS},
    ),
}


def tiny() -> Config:
    """The main job: `python -m experiments.goodput_sweep`.

    The random `tiny` model, colocated continuous batching against one prefill and one
    decode device. About 3 minutes on 2 cores; no network, no accelerator.
    """
    return Config(systems=_TWO_DEVICES)


def smoke() -> Config:
    """A minute's check that everything runs; its numbers mean nothing."""
    return Config(
        systems=_TWO_DEVICES,
        workload=Workload(num_requests=12, prompt_tokens="uniform:8:60"),
        memory=Memory(blocks_per_device=64, max_context=128),
        rates=(20.0, 200.0),
        num_seeds=2,
        timing_repeats=2,
    )


CONFIGS = {build.__name__: build for build in (tiny, smoke)}


def get_config(name: str) -> Config:
    """The config called `name`; ValueError naming the known ones if there is none."""
    if name not in CONFIGS:
        raise ValueError(f"--config: expected one of {sorted(CONFIGS)}, got '{name}'")
    return CONFIGS[name]()
