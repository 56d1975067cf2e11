"""The measured profile of the model on this device, as `calibrate` makes it."""

from __future__ import annotations

import math

from disagg_jax.calibration.measure import LEAST_ROUNDS
from disagg_jax.scheduling.system import System
from disagg_jax.sim.cost.measured_profile import profile_to_json
from experiments import calibrate
from experiments.cli.progress import Deadline
from experiments.configs.config import Config, Memory, WorkloadConfig
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import DeviceSizes
from experiments.runs.folder import write_json

PROFILE = "profile.json"
_LONGEST_AT_ONCE = 8  # requests that a pool holds
_REQUESTS, _UNSEEN = 30, 6
_MAX_DRIFT = 0.3


def study(sizes: DeviceSizes) -> Config:
    """Return two systems on two devices, which share programs, on the virtual clock."""
    longest, seqs = sizes.max_context, {"max_seqs": sizes.max_seqs}
    colocated = {**seqs, "max_batched_tokens": longest}
    return Config(
        model=sizes.model,
        attention=sizes.attention,
        systems={
            "vllm_v0": System.of("vllm_v0", "2xcolocated:tp1", colocated=colocated),
            "disaggregated": System.of(
                "disaggregated",
                "prefill:tp1,decode:tp1",
                prefill={**seqs, "token_budget": longest},
                decode=seqs,
            ),
        },
        memory=Memory(
            tokens_per_device=_LONGEST_AT_ONCE * longest, max_context=longest
        ),
        workload=WorkloadConfig(
            num_requests=_REQUESTS,
            prompt_tokens=f"uniform:{longest // 8}:{longest * 3 // 4}",
            output_tokens=f"uniform:8:{longest // 8}",
        ),
        num_seeds=1,
    )


class _WithRounds(Deadline):
    """A deadline that lets a fit have the rounds it needs, however long it compiled."""

    def __init__(self, deadline: Deadline):
        super().__init__(None)
        self._deadline, self._asked = deadline, 0

    def passed(self) -> bool:
        self._asked += 1  # before the warm-up, and before each round
        return self._asked > 1 + LEAST_ROUNDS and self._deadline.passed()


def run(bench: Bench) -> Found:
    """Measure every program of the two systems, and write the profile."""
    sizes = bench.sizes
    on_host = sizes.devices.platform == "cpu"  # of a machine that others use too
    profile = calibrate.run(
        study(sizes),
        sizes.repeats,
        _UNSEEN,
        math.inf if on_host else _MAX_DRIFT,
        speed_probes=on_host,
        deadline=_WithRounds(bench.deadline),
    )
    write_json(bench.out / PROFILE, profile_to_json(profile))
    print(f"{calibrate.table(profile)}\n\n{calibrate.service_table(profile)}")
    said = profile.provenance
    errors = ", ".join(f"{k} {e:.1%}" for k, e in sorted(profile.held_out.items()))
    print(f"\n{said['rounds']} rounds, drift {said['drift']}")
    return Found(f"held out: {errors}", said.get("left out", ""))


PART = Part(
    name="calibration",
    about=f"programs and transfers, into {PROFILE}",
    run=run,
    weight=3,
)
