"""Reads Hugging Face folders (config.json and safetensors) of Llama, OPT and Qwen3."""

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
from models.files import read_json, require_content
from models.hf_config import Settings
from models.quantization import QUANTIZATION
from models.rope import read_scaling
from models.tensors import Take, check_tensors

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# As safetensors spells them. Others are quantized: they need scales, which we lack.
_DTYPES = ("F64", "F32", "F16", "BF16")


def load_hf(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the weights of a model that `save_pretrained` wrote.

    Returns:
      The config (float16 becomes bfloat16, our half precision), and NumPy weights of
      its dtype in the structure that `models.transformer` describes, in host memory.

    Raises:
      FileNotFoundError: with the command that gets it, if the folder or a file of it is
        missing.
      ValueError: if the model is of another family or has what ours has not; if a
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
    build = functools.partial(_params, family, config)
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


def _params(family: _Family, config: ModelConfig, take: Take) -> dict[str, Any]:
    params = family.params(config, take)
    if not config.tie_embeddings:
        params["unembed"] = take("lm_head.weight", config.vocab_size, config.embed).T
    return params


# -- files ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor that is not read yet."""

    file: Any  # of safetensors, open
    path: pathlib.Path
    name: str  # in the file

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape.

        Raises:
          ValueError: if it is quantized.
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
    """The tensors of a folder by their names in a whole model; nothing is read yet."""
    index = _index(folder)
    files = [_existing(folder, file) for file in sorted({*index.values()}) or [_WHOLE]]
    found = [tensor for file in files for tensor in _open_part(file)]
    stored = {tensor.name: tensor for tensor in found}
    # The index only matters where two files have a tensor: all are open anyway.
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
    """Some files repeat a tied embedding, or keep what is no weight."""
    if name == "lm_head.weight":
        return tied
    return name.endswith((".rotary_emb.inv_freq", ".decoder.version"))


def _index(folder: pathlib.Path) -> dict[str, str]:
    """The file of each tensor, where a folder says it: else all are in one file.

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
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "reading Hugging Face folders needs the package safetensors: pip install "
            "'disagg-jax[weights]'"
        ) from error
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
    """What config.json calls the same in all families."""
    dtype = hf_config.read_dtype(settings)
    return {
        "name": name,
        **hf_config.read_sizes(settings)._asdict(),
        "max_length": hf_config.read_size(settings, "max_position_embeddings"),
        "dtype": "float32" if dtype in (None, "float32") else "bfloat16",
    }


def _llama_config(name: str, settings: Settings) -> ModelConfig:
    """Llama's and Qwen3's, which differ in the norm of queries and keys."""
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


def _llama_params(config: ModelConfig, take: Take) -> dict[str, Any]:
    E, F = config.embed, config.mlp

    def layer(i: int) -> dict[str, Any]:
        at = f"model.layers.{i}"
        return {
            "attention_norm": {"scale": take(f"{at}.input_layernorm.weight", E)},
            "attention": _attention(config, take, f"{at}.self_attn", out="o_proj"),
            "mlp_norm": {"scale": take(f"{at}.post_attention_layernorm.weight", E)},
            "mlp": {
                "w_gate": take(f"{at}.mlp.gate_proj.weight", F, E).T,
                "w_up": take(f"{at}.mlp.up_proj.weight", F, E).T,
                "w_down": take(f"{at}.mlp.down_proj.weight", E, F).T,
            },
        }

    return {
        "embed": take("model.embed_tokens.weight", config.vocab_size, E),
        "layers": [layer(i) for i in range(config.layers)],
        "final_norm": {"scale": take("model.norm.weight", E)},
    }


def _opt_params(config: ModelConfig, take: Take) -> dict[str, Any]:
    E, F = config.embed, config.mlp

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": take(f"{name}.weight", E), "bias": take(f"{name}.bias", E)}

    def layer(i: int) -> dict[str, Any]:
        at = f"model.decoder.layers.{i}"
        return {
            "attention_norm": norm(f"{at}.self_attn_layer_norm"),
            "attention": _attention(config, take, f"{at}.self_attn", out="out_proj"),
            "mlp_norm": norm(f"{at}.final_layer_norm"),
            "mlp": {
                "w_up": take(f"{at}.fc1.weight", F, E).T,
                "b_up": take(f"{at}.fc1.bias", F),
                "w_down": take(f"{at}.fc2.weight", E, F).T,
                "b_down": take(f"{at}.fc2.bias", E),
            },
        }

    at = "model.decoder"
    # Position p is row p + 2: the first two rows are for padding, which we never embed.
    positions = take(f"{at}.embed_positions.weight", config.max_length + 2, E)[2:]
    return {
        "embed": take(f"{at}.embed_tokens.weight", config.vocab_size, E),
        "positions": positions,
        "layers": [layer(i) for i in range(config.layers)],
        "final_norm": norm(f"{at}.final_layer_norm"),
    }


def _attention(
    config: ModelConfig, take: Take, at: str, *, out: str
) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
    """Files keep every matrix as [out, in] and heads flat; ours are [in, out]."""
    E, N, K, H = config.embed, config.q_heads, config.kv_heads, config.head_dim
    heads = {"q": N, "k": K, "v": K}
    weights: dict[str, Any] = {
        f"w{x}": take(f"{at}.{x}_proj.weight", n * H, E).T.reshape(E, n, H)
        for x, n in heads.items()
    }
    weights["wo"] = take(f"{at}.{out}.weight", E, N * H).T.reshape(N, H, E)
    if config.biases:
        for x, n in heads.items():
            weights[f"b{x}"] = take(f"{at}.{x}_proj.bias", n * H).reshape(n, H)
        weights["bo"] = take(f"{at}.{out}.bias", E)
    if config.qk_norm:
        for x in "qk":
            weights[f"{x}_norm"] = {"scale": take(f"{at}.{x}_norm.weight", H)}
    return weights


@dataclasses.dataclass(frozen=True)
class _Family:
    """How a `model_type` is read."""

    config: Callable[[str, Settings], ModelConfig]
    params: Callable[[ModelConfig, Take], dict[str, Any]]
    required: Settings  # what config.json must say, unless it is silent


_UNQUANTIZED = {
    "quantization_config": None,
    "compression_config": None,
    "kv_cache_dtype": "auto",
}
_GATED = {"hidden_act": "silu", "attention_bias": False}
_FAMILIES = {
    "llama": _Family(_llama_config, _llama_params, {**_GATED, "mlp_bias": False}),
    "qwen3": _Family(
        _llama_config, _llama_params, {**_GATED, "use_sliding_window": False}
    ),
    "opt": _Family(
        _opt_config,
        _opt_params,
        {
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
    ),
}
