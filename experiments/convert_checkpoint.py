"""Make a checkpoint that every instance restores straight into its own sharding.

    python -m experiments.convert_checkpoint --from=FILE.gguf --out=checkpoints/smollm2
    python -m experiments.convert_checkpoint --from=HF_FOLDER --out=checkpoints/qwen3

Serve it with `--set weights=checkpoints/qwen3 --set model=auto`.
"""

from __future__ import annotations

import pathlib

from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from models import checkpoint
from models.load import read_tokenizer, read_weights
from models.sentencepiece import SentencePieceTokenizer
from models.tokenizer import BPETokenizer, NoText, save_tokenizer

FLAGS = Flags()
_FROM = FLAGS.string("from", REQUIRED, "GGUF file or Hugging Face folder.")
_OUT = FLAGS.string("out", REQUIRED, "Folder of the new checkpoint.")


def convert(source: pathlib.Path, out: pathlib.Path) -> checkpoint.Checkpoint:
    """Write the weights, config and tokenizer of `source` to `out`.

    Raises:
      ValueError, FileNotFoundError: if `source` cannot be read, or `out` is taken.
    """
    config, weights = read_weights(source)
    if checkpoint.is_checkpoint(out) or isinstance(weights, checkpoint.Checkpoint):
        raise ValueError(
            f"expected a model of another kind and a new folder, got {source}, {out}"
        )
    tokenizer = read_tokenizer(source)
    if isinstance(tokenizer, NoText):
        raise tokenizer.why  # a checkpoint without one has bytes for tokens
    if isinstance(tokenizer, BPETokenizer | SentencePieceTokenizer):
        save_tokenizer(tokenizer, out)
    return checkpoint.save(out, config, weights)


@command(FLAGS)
def main() -> None:
    made = convert(pathlib.Path(_FROM.value), pathlib.Path(_OUT.value))
    print(f"{made.config}\ncheckpoint: {made.folder}")


if __name__ == "__main__":
    main()
