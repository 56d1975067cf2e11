"""Checkpoints: the weights of a model by Orbax, with its config and tokenizer.

FOLDER/model.json   the fields of `ModelConfig`
FOLDER/params/      Orbax; each device can read its own shards
FOLDER/tokenizer.json, generation_config.json (the end tokens), or
FOLDER/sentencepiece.json   absent where tokens are bytes
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, TypeAlias

import jax

from models import transformer
from models.config import ModelConfig
from models.files import read_json

_CONFIG, _PARAMS = "model.json", "params"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights on disk, to be restored once for each mesh."""

    folder: pathlib.Path
    config: ModelConfig  # weights are restored to its dtype, whatever the file's

    @classmethod
    def open(cls, folder: str | pathlib.Path) -> Checkpoint:
        """Open the checkpoint in `folder`: read its config and its weights' shapes.

        Raises:
          FileNotFoundError: with the command that makes one, if there is none.
          ValueError: naming the file, if its config is damaged or of other weights.
        """
        folder = pathlib.Path(folder).resolve()
        if not is_checkpoint(folder) or not (folder / _PARAMS).is_dir():
            raise FileNotFoundError(
                f"expected {_CONFIG} and {_PARAMS}/ in {folder}; to make them: python "
                f"-m experiments.convert_checkpoint --from=PATH --out={folder}"
            )
        fields = read_json(folder / _CONFIG)
        if divisors := fields.get("rope_divisors"):
            fields["rope_divisors"] = tuple(divisors)
        try:
            config = ModelConfig(**fields)
        except (TypeError, ValueError) as error:  # a TypeError: other fields
            raise ValueError(
                f"{folder / _CONFIG}: expected a ModelConfig: {error}"
            ) from error
        if _stored_shapes(folder) != _shapes(transformer.param_shapes(config)):
            raise ValueError(
                f"{folder / _PARAMS}: expected the weights of {config.name}, got "
                "damaged ones, or another model's; convert the model again"
            )
        return cls(folder, config)

    def restore(self, shardings: Any) -> transformer.Params:
        """Restore the weights with `shardings`: one, or a tree in the form of `Params`.

        Each device reads no more than its shards.
        """
        import orbax.checkpoint as ocp  # takes a second; only checkpoints need it

        def target(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        shapes = transformer.param_shapes(self.config)
        targets = jax.tree.map(target, shapes, jax.tree.broadcast(shardings, shapes))
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self.folder / _PARAMS, targets)


# In memory, or on disk: each mesh then restores its own shards.
Weights: TypeAlias = transformer.Params | Checkpoint


def _stored_shapes(folder: pathlib.Path) -> Any:
    """Read the shapes of the weights; None if Orbax cannot tell."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / _PARAMS).item_metadata
    return None if stored is None else _shapes(stored.tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def is_checkpoint(folder: str | pathlib.Path) -> bool:
    """Return whether `folder` has the config of a checkpoint."""
    return (pathlib.Path(folder) / _CONFIG).is_file()


def save(
    folder: str | pathlib.Path, config: ModelConfig, params: transformer.Params
) -> Checkpoint:
    """Write a checkpoint of `params`, arrays of JAX or NumPy.

    Raises:
      ValueError: by Orbax, if the folder has one already.
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _PARAMS, params)
    # Last: a checkpoint that was cut short has no config.
    (folder / _CONFIG).write_text(
        json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    )
    return Checkpoint(folder, config)
