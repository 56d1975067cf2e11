"""Models: their description, their weights from any source, and their mathematics.

`config` describes a model in numbers and needs no JAX, nor does `lookup`, by which cost
models find it. `transformer` computes with the weights that `load` reads, and
`tokenizer` turns text into tokens. The room knows neither devices nor requests.
"""

from models.config import PRESETS, ModelConfig, get_config

__all__ = ["PRESETS", "ModelConfig", "get_config"]
