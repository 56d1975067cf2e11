"""A model from any source of weights: random, GGUF, Hugging Face, checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from models import transformer
from models.checkpoint import Checkpoint, Weights, is_checkpoint
from models.config import PRESETS, ModelConfig, get_engine_config
from models.gguf import load_gguf, smollm2_path
from models.hf import load_hf
from models.tokenizer import ByteTokenizer, Tokenizer, has_tokenizer, load_tokenizer

# Checkpoints that come with this package, each under the name of its preset. They are
# made by `experiments.train_tiny`.
TRAINED = pathlib.Path(__file__).parent / "trained"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its weights and the tokenizer that goes with it."""

    config: ModelConfig
    params: Weights
    tokenizer: Tokenizer


def load_model(
    name: str, weights: str, *, seed: int = 0, dtype: str | None = None
) -> Model:
    """Return the model `name` with `weights`.

    Args:
      name: a preset, or "auto" for the model that the weights describe.
      weights: "random", or what `find_weights` takes.
      seed: of random weights.
      dtype: of weights, activations and KV cache; by default the preset's, or with
        "auto" that of the weights.

    Raises:
      ValueError: if the name or the dtype is unknown, the model is not dense, or the
        weights are another model's.
      FileNotFoundError: if the weights are missing; says how to get them.
    """
    preset = None if name == "auto" else _in_dtype(get_engine_config(name), dtype)
    if weights == "random":
        if preset is None:
            raise ValueError("model: expected a preset for weights=random, got auto")
        params = transformer.init_params(preset, seed)
        return Model(preset, params, ByteTokenizer(vocab_size=preset.vocab_size))
    path = find_weights(name, weights)
    loaded, params = read_weights(path)
    preset = preset or _in_dtype(loaded, dtype)
    sizes = dataclasses.replace(loaded, name=preset.name, dtype=preset.dtype)
    if sizes != preset:
        raise ValueError(
            f"weights: expected those of {name}, {preset}; {path} has {loaded};"
            " model=auto takes what it has"
        )
    return Model(preset, cast(params, preset), read_tokenizer(path))


def _in_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """Return `config` with another dtype, if one is given."""
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)


def find_weights(name: str, weights: str) -> pathlib.Path:
    """Return the file or folder that `weights` stands for.

    Args:
      name: the preset whose checkpoint is meant by "trained".
      weights: "trained", the preset of a checkpoint in `TRAINED` ("tiny"), "smollm2" or
        a path.

    Raises:
      FileNotFoundError: if nothing is there; says how to get it.
    """
    if weights == "smollm2":
        return smollm2_path()
    path = TRAINED / (name if weights == "trained" else weights)
    comes_with_us = weights in PRESETS and path.is_dir()
    if weights != "trained" and not comes_with_us:
        path = pathlib.Path(weights)
    if not path.exists():
        raise FileNotFoundError(
            "weights: expected random, trained, tiny, smollm2, a .gguf file, a Hugging "
            f"Face folder or a checkpoint, got '{path}', which does not exist"
        )
    return path


def read_weights(path: pathlib.Path) -> tuple[ModelConfig, Weights]:
    """Read the config and the weights in a file or folder; of a checkpoint the config.

    Raises:
      ValueError, FileNotFoundError: if it is damaged, incomplete or of another kind.
    """
    if path.is_file():
        return load_gguf(path)
    if not is_checkpoint(path):
        return load_hf(path)
    checkpoint = Checkpoint.open(path)
    return checkpoint.config, checkpoint


def cast(weights: Weights, preset: ModelConfig) -> Weights:
    """Return `weights` in the dtype of their preset; a checkpoint is restored to it."""
    if isinstance(weights, Checkpoint):
        return dataclasses.replace(weights, config=preset)
    dtype = jnp.dtype(preset.dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), weights)


def read_tokenizer(path: pathlib.Path) -> Tokenizer:
    """Read the tokenizer of a file or folder; a checkpoint without one has bytes."""
    if is_checkpoint(path) and not has_tokenizer(path):
        return ByteTokenizer()
    return load_tokenizer(path)
