"""The engine's models and the simulator's shapes of them say the same sizes.

Neither may import the other (the core imports no models), so they stand twice.
"""

import pytest

from disagg_jax.sim.model_shape import MODEL_SHAPES
from models.config import PRESETS

SHARED = sorted(PRESETS.keys() & MODEL_SHAPES.keys())


def test_some_are_shared():
    assert SHARED == ["llama-3-8b", "opt-13b", "opt-66b", "smollm2-135m"]


@pytest.mark.parametrize("name", SHARED)
def test_shapes_agree(name):
    config, shape = PRESETS[name], MODEL_SHAPES[name]
    for ours, theirs in (
        ("layers", "layers"),
        ("embed", "embed"),
        ("q_heads", "q_heads"),
        ("kv_heads", "kv_heads"),
        ("head_dim", "head_dim"),
        ("mlp", "mlp"),
        ("vocab_size", "vocab"),
        ("tie_embeddings", "tie_embeddings"),
    ):
        assert getattr(config, ours) == getattr(shape, theirs), ours
    assert (config.mlp_kind == "swiglu") == shape.gated_mlp
