"""Greedy tokens and logits in bfloat16 against float32."""

from __future__ import annotations

import numpy as np

from disagg_jax.deployment import Deployment
from disagg_jax.engine.dtype_comparison import compare_dtypes
from disagg_jax.engine.served_deployment import devices_for
from experiments.device.part import Bench, Found, Part
from experiments.device.sizes import DeviceSizes, weight_bytes
from models import transformer

_PROMPTS, _MAX_TOKENS = (33, 64, 100, 128), 16
_BESIDE = 1.3  # of the weights: pools, programs and what they need


def problem(sizes: DeviceSizes) -> str:
    """Return the memory that both copies of the weights would need."""
    config, room_bytes = sizes.config, sizes.devices.room_bytes
    # Those that were drawn, and a float32 copy of them.
    drawn = weight_bytes(config) if config.dtype != "float32" else 0
    needed = _BESIDE * (drawn + weight_bytes(config, 4))
    if needed <= room_bytes:
        return ""
    return f"needs {needed / 2**30:.0f} GiB, a device has {room_bytes / 2**30:.0f}"


def run(bench: Bench) -> Found:
    """Compare them as they are served by a prefill and a decode pool."""
    sizes, config = bench.sizes, bench.sizes.config
    rng = np.random.default_rng(0)
    prompts = [rng.integers(config.vocab_size, size=n).tolist() for n in _PROMPTS]
    deployment = Deployment.parse("prefill:tp1,decode:tp1")
    found = compare_dtypes(
        config,
        transformer.init_params(config, 0),
        prompts,
        _MAX_TOKENS,
        devices_for(deployment, shared=True)[: deployment.devices],
        deployment=str(deployment),
        attention=sizes.attention,
    )
    print(found)
    said = f"{found.agreeing:.1%} of greedy tokens agree, rms error {found.rms:.3g}"
    return Found(
        said if found.holds else f"{said}: outside the rule", wrong=not found.holds
    )


PART = Part(
    name="tokens",
    about="bfloat16 against float32",
    run=run,
    problem=problem,
    weight=2,
)
