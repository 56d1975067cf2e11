"""Read Hugging Face folders (config.json and safetensors) of Llama, OPT and Qwen3."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from models import hf_config
from models.config import ModelConfig
from models.files import package_needed, read_json, require_content
from models.hf_config import Settings
from models.quantization import QUANTIZATION
from models.rope import read_scaling
from models.tensors import Take, check_tensors, llama_params, opt_params

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# As safetensors spells them. Other dtypes are quantized and need scales, which we lack.
_DTYPES = ("F64", "F32", "F16", "BF16")


def load_hf(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read the configuration and the weights of a folder by `save_pretrained`.

    Returns:
      The config (float16 becomes bfloat16, our half precision), and NumPy weights of
      its dtype in the structure that `models.transformer` describes, in host memory.

    Raises:
      FileNotFoundError: with the command that gets it, if the folder or a file of it is
        missing.
      ValueError: if the model is of another family or has a part that ours lacks, or a
        tensor is missing, misshapen or not expected.
      ImportError: naming the extra to install, if `safetensors` is missing.
    """
    folder = pathlib.Path(folder)
    settings = read_json(_existing(folder, "config.json"))
    try:
        config = _config(folder, settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    family = _FAMILIES[settings["model_type"]]
    tensors = _open(folder, config.tie_embeddings)
    build = functools.partial(family.params, config)
    where = folder / (_WHOLE if (folder / _WHOLE).is_file() else _INDEX)
    check_tensors(where, build, {name: t.shape for name, t in tensors.items()})
    dtype = jnp.dtype(config.dtype)
    return config, build(
        lambda name, *_: tensors[name].read().astype(dtype, copy=False)
    )


def _config(folder: pathlib.Path, settings: Settings) -> ModelConfig:
    unknown = hf_config.expect_known(settings, _FAMILIES)
    hf_config.warn_of_unknown(str(folder), tuple(unknown))
    family = _FAMILIES[settings["model_type"]]
    for key, value in {**_UNQUANTIZED, **family.required}.items():
        if settings.get(key, value) not in (None, value):
            raise ValueError(f"{key}: expected {value!r}, got {settings[key]!r}")
    if (folder / QUANTIZATION).is_file():
        raise ValueError(f"{QUANTIZATION}: expected unquantised weights, got that file")
    return family.config(folder.name, settings)


# -- files ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in an open file, not read yet."""

    file: Any  # of safetensors, open
    path: pathlib.Path
    name: str  # in the file

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor.

        Raises:
          ValueError: if the tensor is quantized.
        """
        header = self.file.get_slice(self.name)
        if header.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{self.path}: {self.name}: expected one of {_DTYPES}, got "
                f"{header.get_dtype()}: quantized weights are not supported"
            )
        return tuple(header.get_shape())

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def _open(folder: pathlib.Path, tied: bool) -> dict[str, _Stored]:
    """Open the tensors of a folder, by their names in a whole model."""
    index = _index(folder)
    files = [_existing(folder, file) for file in sorted({*index.values()}) or [_WHOLE]]
    found = [tensor for file in files for tensor in _open_part(file)]
    stored = {tensor.name: tensor for tensor in found}
    # The index only matters where two files have the same tensor.
    stored |= {t.name: t for t in found if index.get(t.name) == t.path.name}
    # A model that was saved without its head lacks the prefix.
    whole = any(name.startswith("model.") for name in stored)
    named = {
        name if whole or name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in stored.items()
    }
    return {
        name: tensor for name, tensor in named.items() if not _is_redundant(name, tied)
    }


def _is_redundant(name: str, tied: bool) -> bool:
    """Return whether a file repeats a tied embedding here, or keeps no weight."""
    if name == "lm_head.weight":
        return tied
    return name.endswith((".rotary_emb.inv_freq", ".decoder.version"))


def _index(folder: pathlib.Path) -> dict[str, str]:
    """Return the file of each tensor, or {} if all are in one file.

    Raises:
      ValueError: if the index has no map.
    """
    if (folder / _WHOLE).is_file() or not (folder / _INDEX).is_file():
        return {}
    index = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{folder / _INDEX}: expected a weight_map, got {index!r}")
    return index


def _open_part(path: pathlib.Path) -> list[_Stored]:
    with package_needed("safetensors", "reading Hugging Face folders"):
        from safetensors import SafetensorError, safe_open
    require_content(path)
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got a damaged one ({error}); "
            "get it again"
        ) from error
    return [_Stored(file, path, name) for name in file.keys()]


def _existing(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / name
    if path.is_file():
        return path
    get = f"pip install huggingface_hub && hf download OWNER/NAME --local-dir {folder}"
    kinds = ("pytorch_model*.bin", "*.pt", "*.pth")
    pickled = [path for kind in kinds for path in sorted(folder.glob(kind))]
    if name == _WHOLE and pickled:
        # Never unpickled: a pickle runs whatever its maker wrote.
        raise FileNotFoundError(
            f"expected a Hugging Face model with safetensors, got {pickled[0]}, which "
            "we do not open, as a pickle can run code; where transformers and torch "
            'are installed: python -c "from transformers import AutoModelForCausalLM '
            f"as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    if files := sorted(folder.glob("*.gguf")):
        get = f"name the GGUF file itself, as {files[0]}"
    raise FileNotFoundError(
        f"expected a Hugging Face model with safetensors, got no file {path}: {get}"
    )


# -- families -------------------------------------------------------------------------


def _shared(name: str, settings: Settings) -> dict[str, Any]:
    """Read the fields that config.json spells alike in all families."""
    dtype = hf_config.read_dtype(settings)
    return {
        "name": name,
        **hf_config.read_sizes(settings)._asdict(),
        "max_length": hf_config.read_size(settings, "max_position_embeddings"),
        "dtype": "float32" if dtype in (None, "float32") else "bfloat16",
    }


def _llama_config(name: str, settings: Settings) -> ModelConfig:
    """Read a Llama or Qwen3; they differ in the norm of queries and keys."""
    shared, rope = _shared(name, settings), hf_config.read_rope(settings)
    theta = float(rope["rope_theta"])
    scaling = read_scaling(rope, shared["head_dim"], theta)
    shared["max_length"] = max(shared["max_length"], scaling.context)
    return ModelConfig(
        **shared,
        rope_theta=theta,
        rope_divisors=scaling.divisors,
        rope_attention_factor=scaling.attention_factor,
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        qk_norm=settings["model_type"] == "qwen3",
    )


def _opt_config(name: str, settings: Settings) -> ModelConfig:
    return ModelConfig(
        **_shared(name, settings),
        norm_eps=1e-5,  # torch.nn.LayerNorm's default; config.json has none
        norm="layer",
        positions="learned",
        mlp_kind="relu",
        biases=True,
    )


@dataclasses.dataclass(frozen=True)
class _Family:
    """The readers of one `model_type`."""

    config: Callable[[str, Settings], ModelConfig]
    params: Callable[[ModelConfig, Take], dict[str, Any]]
    required: Settings  # values that config.json must have, or leave out


_UNQUANTIZED = {
    "quantization_config": None,
    "compression_config": None,
    "kv_cache_dtype": "auto",
}
_GATED = {"hidden_act": "silu", "attention_bias": False}
_FAMILIES = {
    "llama": _Family(_llama_config, llama_params, {**_GATED, "mlp_bias": False}),
    "qwen3": _Family(
        _llama_config, llama_params, {**_GATED, "use_sliding_window": False}
    ),
    "opt": _Family(
        _opt_config,
        opt_params,
        {
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
    ),
}
