"""The model that a `Config` names."""

from __future__ import annotations

import pathlib

from experiments.configs.config import Config
from models import load

# One checkpoint for each preset that `experiments.train_tiny` was run for.
TRAINED = pathlib.Path(__file__).parents[1] / "checkpoints"


def load_model(config: Config) -> load.Model:
    """Load the model of `config`; see `models.load.load_model` for the errors."""
    return load.load_model(
        config.model, config.weights, seed=config.seed, trained=TRAINED
    )
