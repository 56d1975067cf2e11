"""Model shapes for the simulator, those of the engine's presets included."""

from __future__ import annotations

from disagg_jax.sim.model_shape import MODEL_SHAPES, ModelShape
from models.config import PRESETS, ModelConfig


def shape_of(config: ModelConfig) -> ModelShape:
    """What a cost model sees of an engine's model."""
    return ModelShape(
        name=config.name,
        layers=config.layers,
        embed=config.embed,
        q_heads=config.q_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        mlp=config.mlp,
        gated_mlp=config.mlp_kind == "swiglu",
        vocab=config.vocab_size,
        tie_embeddings=config.tie_embeddings,
        weight_dtype_bytes=config.dtype_bytes,
        kv_dtype_bytes=config.dtype_bytes,
        activation_dtype_bytes=config.dtype_bytes,
    )


def get_shape(name: str) -> ModelShape:
    """The preset of the simulator with that name, or else of the engine.

    Raises:
      ValueError: naming the presets, if there is none of that name.
    """
    if name in MODEL_SHAPES:
        return MODEL_SHAPES[name]
    if name in PRESETS:
        return shape_of(PRESETS[name])
    known = sorted({*MODEL_SHAPES, *PRESETS})
    raise ValueError(f"model: expected one of {known}, got {name!r}")
