"""Models and their weights: random, GGUF files, Hugging Face folders, checkpoints."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from disagg_jax.engine.place_weights import Weights
from experiments.configs.config import Config
from models import transformer
from models.checkpoint import Checkpoint, is_checkpoint
from models.config import ModelConfig, get_config
from models.gguf import load_gguf, smollm2_path
from models.hf import load_hf
from models.tokenizer import ByteTokenizer, Tokenizer, has_tokenizer, load_tokenizer

# One for each preset that `experiments.train_tiny` was run for.
_TRAINED = pathlib.Path(__file__).parents[1] / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its weights and the tokenizer that goes with it."""

    config: ModelConfig
    params: Weights
    tokenizer: Tokenizer


def load_model(config: Config) -> Model:
    """The model that `config` names.

    Raises:
      ValueError: if the name is unknown or the weights are another model's.
      FileNotFoundError: if the weights are missing; says how to get them.
    """
    preset = None if config.model == "auto" else get_config(config.model)
    if config.weights == "random":
        if preset is None:
            raise ValueError("model: expected a preset for weights=random, got auto")
        params = transformer.init_params(preset, config.seed)
        return Model(preset, params, ByteTokenizer())
    path = find_weights(config.weights, config.model)
    loaded, params = read_weights(path)
    preset = preset or loaded
    sizes = dataclasses.replace(loaded, name=preset.name, dtype=preset.dtype)
    if sizes != preset:
        raise ValueError(
            f"weights: expected those of {config.model}, {preset}; {path} has {loaded};"
            " model=auto takes what it has"
        )
    return Model(preset, as_preset(params, preset), read_tokenizer(path))


def find_weights(weights: str, model: str) -> pathlib.Path:
    """Where `smollm2`, `trained` (those of the preset `model`) or a path is.

    Raises:
      FileNotFoundError: if nothing is there; says how to get it.
    """
    if weights == "smollm2":
        return smollm2_path()
    path = _TRAINED / model if weights == "trained" else pathlib.Path(weights)
    if not path.exists():
        raise FileNotFoundError(
            "weights: expected random, trained, smollm2, a .gguf file, a Hugging Face "
            f"folder or a checkpoint, got '{path}', which does not exist"
        )
    return path


def read_weights(path: pathlib.Path) -> tuple[ModelConfig, Weights]:
    """What a file or folder holds; of a checkpoint, its config only.

    Raises:
      ValueError, FileNotFoundError: if it is damaged, incomplete or of another kind.
    """
    if path.is_file():
        return load_gguf(path)
    if not is_checkpoint(path):
        return load_hf(path)
    checkpoint = Checkpoint.open(path)
    return checkpoint.config, checkpoint


def as_preset(weights: Weights, preset: ModelConfig) -> Weights:
    """`weights` in the dtype of their preset."""
    if isinstance(weights, Checkpoint):
        return dataclasses.replace(weights, config=preset)
    dtype = jnp.dtype(preset.dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), weights)


def read_tokenizer(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a file or folder; bytes for a checkpoint that has none."""
    if is_checkpoint(path) and not has_tokenizer(path):
        return ByteTokenizer()
    return load_tokenizer(path)
