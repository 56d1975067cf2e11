"""Models and devices for the simulator: presets, the engine's, and your own."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from disagg_jax.sim.hardware.device import Hardware
from disagg_jax.sim.hardware.presets import get_hardware
from disagg_jax.sim.model_shape import MODEL_SHAPES, ModelShape
from models import hf_config, quantization
from models.config import PRESETS, ModelConfig
from models.files import read_json
from models.quantization import QUANTIZATION

# Families of Hugging Face models whose layers are ModelShape's.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
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
        config.json. Weights and KV are as wide as it says (16 bits if it does not),
        also quantised; compute is billed at the device's one peak, that of 16 bits.

    Raises:
      ValueError: naming the presets, if there is none of that name; or what is wrong
        with the file, or in it and not modelled.
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
    fields = read_json(path)
    if "model_type" in fields or "architectures" in fields:
        try:
            fields = _hugging_face(path, fields)
        except ValueError as error:
            raise ValueError(f"model: {path}: {error}") from error
    known = {field.name for field in dataclasses.fields(ModelShape)} - {"name"}
    optional = {name for name in known if name.endswith("_dtype_bytes")}
    missing, unknown = known - optional - set(fields), set(fields) - known - {"name"}
    if missing or unknown:
        raise ValueError(
            f"model: {path}: expected {sorted(known)}, or a Hugging Face config.json, "
            f"got no {sorted(missing)} and unknown {sorted(unknown)}"
        )
    for key, value in fields.items():
        kinds = _kinds(key)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"model: {path}: {key}: expected {names}, got {value!r}")
    return ModelShape(**{"name": path.stem, **fields})


def _kinds(key: str) -> tuple[type, ...]:
    """What a field of `ModelShape` may be in a file."""
    if key in ("gated_mlp", "tie_embeddings"):
        return (bool,)
    if key == "table_dtype_bytes":
        return (int, float, type(None))
    if key == "weight_dtype_bytes":
        return (int, float)
    return (str,) if key == "name" else (int,)


def _hugging_face(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    beside = path.parent / QUANTIZATION
    if path.name == "config.json" and beside.is_file():
        settings.setdefault("quantization_config", read_json(beside))
    unknown = hf_config.expect_known(settings, _FAMILIES)
    unknown += quantization.unknown_keys(settings)
    hf_config.warn_of_unknown(str(path), tuple(unknown))
    sizes = hf_config.read_sizes(settings)
    wide, width = (
        quantization.activation_bytes(settings),
        quantization.weight_bytes(settings, sizes),
    )
    return {
        **sizes._asdict(),
        "gated_mlp": settings["model_type"] != "opt",
        "weight_dtype_bytes": width,
        "table_dtype_bytes": None if width == wide else wide,
        "kv_dtype_bytes": quantization.kv_bytes(settings),
        "activation_dtype_bytes": wide,
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
    fields = read_json(path)
    unknown = sorted(set(fields) - {"like", *_NUMBERS})
    if "like" not in fields or unknown:
        raise ValueError(
            f"hardware: {path}: expected 'like', a preset, and some of "
            f"{list(_NUMBERS)}, got {sorted(fields)}"
        )
    preset = get_hardware(fields.pop("like"))
    return dataclasses.replace(preset, name=path.stem, **fields)
