"""The tensors of a file against those that a model takes, before any is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Take = Callable[..., np.ndarray]  # take(name, *shape): a tensor, which must be so


def check_tensors(
    where: object,
    build: Callable[[Take], object],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that a file has the tensors that `build` takes, and no others.

    Args:
      where: the file or folder, for the error.
      build: makes the weights of what it takes.
      shapes: those of the file's tensors, by name.

    Raises:
      ValueError: naming the tensor that is missing, misshapen or not expected.
    """
    left = dict(shapes)

    def take(name: str, *shape: int) -> np.ndarray:
        got = left.pop(name, None)
        if got is None:
            raise ValueError(
                f"{where}: expected a tensor '{name}', got none: it is another model's "
                "or incomplete; get it again"
            )
        if got != shape:
            raise ValueError(f"{where}: {name}: expected shape {shape}, got {got}")
        return np.broadcast_to(np.float32(0), shape)  # of any size, 4 bytes

    build(take)
    if left:
        raise ValueError(
            f"{where}: expected the tensors of its config only, got also "
            f"{sorted(left)[:5]}"
        )
