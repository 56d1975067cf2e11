"""The flags of commands that read a trace file, beside the one of its path."""

from __future__ import annotations

import pathlib
import typing
from typing import Any

from absl import flags

from disagg_jax.workload.traces import Ties, Trace, Unit, load_trace
from models.tokenizer import load_tokenizer

_UNIT = flags.DEFINE_enum(
    "trace_unit",
    "auto",
    typing.get_args(Unit),
    "Unit of the trace's times; auto: as its format says.",
)
_TIES = flags.DEFINE_enum(
    "ties",
    "spread",
    typing.get_args(Ties),
    "Rows of a trace in one tick of a coarse clock: spread them over it, or keep them "
    "at one time, where they really came so.",
)
_ROWS = flags.DEFINE_integer(
    "trace_rows", 0, "Rows of the trace to read; 0: all.", lower_bound=0
)
_TOKENIZER = flags.DEFINE_string(
    "trace_tokenizer",
    None,
    "A tokenizer.json or a .gguf file, for the lengths of ShareGPT's texts.",
)


def open_trace(path: str) -> Trace:
    """Reads a trace as the flags say.

    Raises:
      ValueError, OSError: on a trace, or a tokenizer, that cannot be read.
    """
    # Any: enums of absl are plain text.
    options: dict[str, Any] = {"unit": _UNIT.value, "ties": _TIES.value}
    if _TOKENIZER.value is not None:
        tokenizer = load_tokenizer(pathlib.Path(_TOKENIZER.value))
        options["tokens_of"] = lambda text: len(tokenizer.encode(text))
    return load_trace(path, max_rows=_ROWS.value, **options)
