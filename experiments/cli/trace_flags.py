"""The flags of commands that read a trace file, beside the one of its path."""

from __future__ import annotations

import pathlib
import typing
from typing import Any

from absl import flags

from disagg_jax.workload.traces import Ties, Trace, Unit, load_trace
from experiments.cli.flags import Flags
from models.tokenizer import load_tokenizer


class TraceFlags:
    """Flags that say how a trace file is read, in a command's namespace `own`."""

    def __init__(self, own: Flags):
        self._unit = own.enum(
            "trace_unit",
            "auto",
            typing.get_args(Unit),
            "Unit of the trace's times; auto: as its format says.",
        )
        self._ties = own.enum(
            "ties",
            "spread",
            typing.get_args(Ties),
            "Rows of a trace in one tick of a coarse clock: spread them over it, or "
            "keep them at one time, where they really came so.",
        )
        self._rows = own.integer(
            "trace_rows", 0, "Rows of the trace to read; 0: all.", lower_bound=0
        )
        self._tokenizer = own.string(
            "trace_tokenizer",
            None,
            "A tokenizer.json or a .gguf file, for the lengths of ShareGPT's texts.",
        )

    @property
    def holders(self) -> tuple[flags.FlagHolder[Any], ...]:
        """Return the flags, which matter where a trace is read."""
        return self._unit, self._ties, self._rows, self._tokenizer

    def open(self, path: str) -> Trace:
        """Read a trace as the flags say.

        Raises:
          ValueError, OSError: on a trace, or a tokenizer, that cannot be read.
        """
        # Any: enums of absl are plain text.
        options: dict[str, Any] = {"unit": self._unit.value, "ties": self._ties.value}
        if self._tokenizer.value is not None:
            tokenizer = load_tokenizer(pathlib.Path(self._tokenizer.value))
            options["tokens_of"] = lambda text: len(tokenizer.encode(text))
        return load_trace(path, max_rows=self._rows.value, **options)
