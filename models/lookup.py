"""A model for cost models, by its name or from a file. No JAX."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from models import hf_blocks, hf_config, quantization
from models.config import PRESETS, ModelConfig, Widths, get_config
from models.files import read_json
from models.model_config import of_blocks
from models.quantization import QUANTIZATION

# These and users' models are as wide as they run. Published ones are billed at 16 bits,
# or as their published weights are quantised.
_OURS = ("tiny", "tiny-opt", "tiny-qwen3", "m32", "kv")
# The keys of a file in our form, with the types of some.
_SIZES = ("layers", "embed", "q_heads", "kv_heads", "head_dim", "mlp", "vocab")
_FLAGS = ("gated_mlp", "tie_embeddings")
_WIDTHS: dict[str, tuple[type, ...]] = {
    "weight_dtype_bytes": (int, float),
    "table_dtype_bytes": (int, float, type(None)),
    "kv_dtype_bytes": (int,),
    "activation_dtype_bytes": (int,),
}


def find_model(name: str) -> ModelConfig:
    """Return the model of that name, or the one that a file describes.

    Args:
      name: as in `get_config`, or the path of a .json file: a Hugging Face config.json,
        or the keys layers, embed, q_heads, kv_heads, head_dim, mlp, vocab, gated_mlp
        and tie_embeddings, and some of name, weight_dtype_bytes, table_dtype_bytes,
        kv_dtype_bytes and activation_dtype_bytes. Weights and KV have the widths in the
        file (by default 16 bits), and matmuls those of its quantisation. Of a model of
        text and images it is the part for text.

    Raises:
      ValueError: naming the presets, if none has that name, or the fault of the file.
      FileNotFoundError: if there is no such file.
    """
    if name.endswith(".json"):
        return _from_file(pathlib.Path(name))
    try:
        model = get_config(name)
    except ValueError as error:
        raise ValueError(f"{error}; a .json file may describe one too") from error
    published = name in PRESETS and name not in _OURS
    return dataclasses.replace(model, dtype="bfloat16") if published else model


def _from_file(path: pathlib.Path) -> ModelConfig:
    fields = read_json(path)
    try:
        if "model_type" in fields or "architectures" in fields:
            return _hugging_face(path, fields)
        return _own(path, fields)
    except ValueError as error:
        raise ValueError(f"model: {path}: {error}") from error


def _own(path: pathlib.Path, fields: dict[str, Any]) -> ModelConfig:
    required = {*_SIZES, *_FLAGS}
    missing = sorted(required - set(fields))
    unknown = sorted(set(fields) - required - {*_WIDTHS, "name"})
    if missing or unknown:
        raise ValueError(
            f"expected {sorted({*required, *_WIDTHS})}, or a Hugging Face config.json, "
            f"got no {missing} and unknown {unknown}"
        )
    for key, value in fields.items():
        kinds = _WIDTHS.get(key, (int,))
        kinds = (bool,) if key in _FLAGS else (str,) if key == "name" else kinds
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key}: expected {names}, got {value!r}")
    weight, table = fields.get("weight_dtype_bytes", 2), fields.get("table_dtype_bytes")
    return _model(
        str(fields.get("name", path.stem)),
        {key: fields[key] for key in (*_SIZES, "tie_embeddings") if key != "vocab"}
        | {"vocab_size": fields["vocab"]},
        gated_mlp=fields["gated_mlp"],
        widths=Widths(
            weight=weight,
            table=weight if table is None else table,
            kv=fields.get("kv_dtype_bytes", 2),
            activation=fields.get("activation_dtype_bytes", 2),
        ),
    )


def _hugging_face(path: pathlib.Path, settings: dict[str, Any]) -> ModelConfig:
    beside = path.parent / QUANTIZATION
    if path.name == "config.json" and beside.is_file():
        settings.setdefault("quantization_config", read_json(beside))
    text, unknown = hf_blocks.text_settings(settings)
    unknown += quantization.unknown_keys(text)
    hf_config.warn_of_unknown(str(path), tuple(unknown))
    layers = hf_blocks.read_layers(text)
    widths = quantization.read_widths(text, layers)
    kinds = hf_blocks.blocks(layers)
    if hf_blocks.is_dense(kinds):
        sizes = hf_config.read_sizes(text)._asdict()
        gated = text["model_type"] != "opt"
        return _model(path.stem, sizes, gated_mlp=gated, widths=widths)
    return of_blocks(
        path.stem,
        kinds,
        vocab_size=hf_config.read_size(text, "vocab_size"),
        tie_embeddings=bool(text.get("tie_word_embeddings")),
        max_length=1,
        widths=widths,
    )


def _model(
    name: str, sizes: dict[str, Any], *, gated_mlp: bool, widths: Widths
) -> ModelConfig:
    """Describe a model of these sizes; cost models ignore its norm and length."""
    return ModelConfig(
        name=name,
        **sizes,
        mlp_kind="swiglu" if gated_mlp else "relu",
        norm_eps=1e-5,
        max_length=1,
        dtype="bfloat16",
        widths=widths,
    )
