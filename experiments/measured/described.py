"""A measured row in the simulator's terms: its model, precision, devices and engine."""

from __future__ import annotations

import dataclasses

from disagg_jax.errors import require
from disagg_jax.sim import Simulation
from disagg_jax.sim.device_cost import roofline
from disagg_jax.sim.engines import EngineProfile
from disagg_jax.sim.hardware import get_hardware
from experiments.measured.rows import Loop, MeasuredRow
from models.config import ModelConfig
from models.lookup import find_model
from models.quantization import at_precision

# Families whose FP8 checkpoints have a scale for each block of 128 x 128 weights, so
# that activations get scales in every step. The others' have one for each matrix.
_BLOCK_SCALED = ("deepseek", "qwen3", "minimax")
_REFUSED = {"glm-5": "one with sparse attention"}
# 4-bit checkpoints that leave all but the experts at 16 bits.
_EXPERTS_ALONE = ("deepseek", "kimi", "gpt-oss")


def model_of(row: MeasuredRow) -> ModelConfig:
    """Return the model of a row at its precision.

    The columns name one precision for a whole checkpoint, also where the published one
    keeps a part at 16 bits. What the servers' KV had is not in them: 8 bits is taken
    for quantised models. With 16 bits some loops on vLLM would not fit beside the
    weights, and their first tokens come ten times as late as measured.

    Raises:
      ValueError: if there is no such model or precision.
    """
    expected = f"{row.model}: expected a model that is modelled"
    require(row.model not in _REFUSED, expected, _REFUSED.get(row.model))
    model = find_model(row.model)
    gemm, experts = row.gemm, row.experts
    if row.model.startswith(_BLOCK_SCALED):
        gemm, experts = (name.replace("fp8_block", "fp8") for name in (gemm, experts))
        gemm, experts = (f"{n}_block" if n == "fp8" else n for n in (gemm, experts))
    if row.model.startswith("gpt-oss"):  # published in MXFP4 alone
        gemm, experts = "bf16", "mxfp4"
    elif row.model.startswith(_EXPERTS_ALONE) and experts in ("nvfp4", "int4_wo"):
        gemm = "bf16"
    kv = "bf16" if row.precision == "bf16" else "fp8"
    return at_precision(model, gemm=gemm, experts=experts, kv=kv)


def simulation_of(row: MeasuredRow, loop: Loop, profile: EngineProfile) -> Simulation:
    """Return the simulation of a row by an engine's profile.

    A benchmark starts its server for the clients that it has, so as many requests may
    run at a time.

    Raises:
      ValueError: if the model, its precision or the devices are unknown.
    """
    model, hardware = model_of(row), get_hardware(row.hardware)
    seqs = min(profile.token_budget, loop.clients)
    started = dataclasses.replace(profile, max_seqs=seqs)
    return Simulation(
        model=model,
        cost=roofline(model, hardware, started),
        policies=started.policies,
        inside=hardware.hop.name,
        between=hardware.between.name if hardware.between else None,
        node_devices=hardware.node_devices,
        max_context=row.prompt_tokens + row.output_tokens,
    )
