"""Models and devices for the simulator: presets, the engine's, and your own."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from disagg_jax.sim.hardware import Hardware
from disagg_jax.sim.hardware_presets import get_hardware
from disagg_jax.sim.model_shape import MODEL_SHAPES, ModelShape
from models.config import PRESETS, ModelConfig

# Families of Hugging Face models whose layers are ModelShape's; of each, whether its
# MLP is gated.
_FAMILIES = {
    "llama": True,
    "mistral": True,
    "qwen2": True,
    "qwen3": True,
    "opt": False,
}
# What may differ from the device that a device is like.
_NUMBERS = ("peak_flops", "hbm_bytes_s", "memory_bytes", "step_s")


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
    """The preset of the simulator with that name, or else of the engine, or a file's.

    Args:
      name: or the path of a .json file: the fields of `ModelShape`, or a Hugging Face
        config.json (16-bit weights and KV are assumed).

    Raises:
      ValueError: naming the presets, if there is none of that name; or what is wrong
        with the file.
      FileNotFoundError: if there is no such file.
    """
    if name.endswith(".json"):
        return _shape_from(pathlib.Path(name))
    if name in MODEL_SHAPES:
        return MODEL_SHAPES[name]
    if name in PRESETS:
        return shape_of(PRESETS[name])
    known = sorted({*MODEL_SHAPES, *PRESETS})
    raise ValueError(f"model: expected one of {known} or a .json file, got {name!r}")


def _shape_from(path: pathlib.Path) -> ModelShape:
    fields = _read(path)
    if "model_type" in fields:
        fields = _hugging_face(path, fields)
    known = {field.name for field in dataclasses.fields(ModelShape)} - {"name"}
    optional = {name for name in known if name.endswith("_dtype_bytes")}
    missing, unknown = known - optional - set(fields), set(fields) - known - {"name"}
    if missing or unknown:
        raise ValueError(
            f"model: {path}: expected {sorted(known)}, or a Hugging Face config.json, "
            f"got no {sorted(missing)} and unknown {sorted(unknown)}"
        )
    return ModelShape(**{"name": path.stem, **fields})


def _hugging_face(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    family = settings["model_type"]
    if family not in _FAMILIES:
        raise ValueError(
            f"model: {path}: model_type: expected one of {sorted(_FAMILIES)}, got "
            f"{family!r}; write ModelShape's fields instead"
        )
    heads, embed = settings["num_attention_heads"], settings["hidden_size"]
    gated = _FAMILIES[family]
    tied_by_default = family == "opt"
    return {
        "layers": settings["num_hidden_layers"],
        "embed": embed,
        "q_heads": heads,
        "kv_heads": settings.get("num_key_value_heads") or heads,
        "head_dim": settings.get("head_dim") or embed // heads,
        "mlp": settings["intermediate_size" if gated else "ffn_dim"],
        "gated_mlp": gated,
        "vocab": settings["vocab_size"],
        "tie_embeddings": settings.get("tie_word_embeddings", tied_by_default),
    }


def get_device(name: str) -> Hardware:
    """The preset of that name, or a file's.

    Args:
      name: or the path of a .json file: `like`, a preset, and of peak_flops,
        hbm_bytes_s, memory_bytes and step_s those that differ from it. The shares of
        the peaks that are reached are taken to be the preset's.

    Raises:
      ValueError: naming the presets, if there is none of that name; or what is wrong
        with the file.
      FileNotFoundError: if there is no such file.
    """
    if not name.endswith(".json"):
        return get_hardware(name)
    path = pathlib.Path(name)
    fields = _read(path)
    unknown = sorted(set(fields) - {"like", *_NUMBERS})
    if "like" not in fields or unknown:
        raise ValueError(
            f"hardware: {path}: expected 'like', a preset, and some of "
            f"{list(_NUMBERS)}, got {sorted(fields)}"
        )
    preset = get_hardware(fields.pop("like"))
    return dataclasses.replace(preset, name=path.stem, **fields)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {content!r}")
    return content
