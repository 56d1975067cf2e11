"""A device whose times are known: a formula says how long programs take.

The engines it is asked about compile nothing.
"""

import math

import numpy as np

from disagg_jax.calibration.measure import calibrate
from disagg_jax.calibration.profile_keys import TransferKey, key_of
from disagg_jax.engine.engine import Engine
from disagg_jax.sim.cost import step_time_terms
from experiments.configs.config import Config, Memory, System
from experiments.sweep.serving import build_engines
from models.config import get_config
from models.load import Model
from models.tokenizer import ByteTokenizer
from tests.engine.harness import random_params

TINY = get_config("tiny")


def seqs(n, **more):
    return {"max_seqs": n, **more}


# Several `max_seqs`, and two layouts.
CONFIG = Config(
    memory=Memory(block_tokens=16),
    systems={
        "vllm_v0": System.of("vllm_v0", "colocated:tp1", colocated=seqs(16)),
        "orca": System.of(
            "orca", "colocated:tp1", colocated=seqs(8, max_batched_tokens=512)
        ),
        "sarathi_serve": System.of(
            "sarathi_serve", "colocated:tp1", colocated=seqs(16, token_budget=256)
        ),
        "disaggregated": System.of(
            "disaggregated",
            "prefill:tp1,decode:tp1pp2",
            prefill=seqs(8, token_budget=256),
            decode=seqs(16),
        ),
        "chunked": System.of(
            "disaggregated_chunked",
            "prefill:tp1,decode:tp1",
            prefill=seqs(4, token_budget=96),
            decode=seqs(16),
        ),
        "stages": System.of("sarathi", "colocated:tp1pp2", colocated=seqs(16)),
    },
)
# Of each stage, by kind; see `step_time_terms.TERMS`. No prefill instance has two.
TRUE = (
    {
        "prefill": (2e-3, 3e-5, 4e-9, 2e-5, 1e-5, 0.0, 2e-5, 0.0),
        "decode": (1e-3, 3e-5, 4e-6, 2e-7),
        "mixed": (2e-3, 4e-5, 1e-7, 5e-6, 1e-5, 3e-6, 1e-7, 1e-5, 0.0, 2e-5, 0.0),
    },
    {
        "decode": (3e-3, 1e-4, 0.0, 1e-7),
        "mixed": (1e-3, 2e-5, 0.0, 2e-6, 3e-5, 0.0, 2e-7, 0.0, 1e-5, 0.0, 0.0),
    },
)


def true_s(program, pp=1):
    """Seconds on each stage."""
    return [step_time_terms.time_s(program, stage[program.kind]) for stage in TRUE[:pp]]


def device(noise=0.0):
    """A `TimeParts` of programs by `TRUE`, of transfers 0.2 ms and 10 us a block."""
    rng = np.random.default_rng(0)

    def parts(engine, work):
        key = key_of(engine, work)
        if isinstance(key, TransferKey):
            exact = [2e-4 + 1e-5 * key.blocks]
        else:
            exact = true_s(key.program, key.layout.pp)
        return [part_s * math.exp(noise * rng.normal()) for part_s in exact]

    return parts


def make_model() -> Model:
    return Model(TINY, random_params(TINY), ByteTokenizer())


def make_engines(model: Model) -> dict[str, Engine]:
    return build_engines(CONFIG, model)


def calibrated(engines, time_parts, **changes):
    options = dict(
        name="known",
        provenance={
            **{"model": "tiny", "dtype": "float32", "device": "cpu"},
            **{"date": "today", "commit": "none"},
        },
        rounds=3,
        count=6,
        max_drift=0.3,
    )
    return calibrate(list(engines), time_parts, **{**options, **changes})
