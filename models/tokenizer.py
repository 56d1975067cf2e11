"""Text to token ids and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Protocol

from models.gguf import metadata, open_gguf

if TYPE_CHECKING:
    import tokenizers

# `tokenizer.ggml.token_type` of GGUF: tokens that text must spell out exactly.
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer(Protocol):
    """What the engine and the server need of a tokenizer."""

    @property
    def eos_token(self) -> int:
        """The id that ends a generation."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens spelled out.

        An incomplete character at an end becomes U+FFFD: to stream, decode all ids so
        far and hold back a trailing U+FFFD.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, then specials, of which only the first has a use.

    For models with random weights. Special tokens have no text: `encode` never gives
    one and `decode` leaves them out.
    """

    eos_token: int = 256
    vocab_size: int = 264  # that of `tiny`: divisible by 8, for sharding

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`.

        Raises:
          ValueError: if an id is not of this vocabulary.
        """
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {unknown}")
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
    """Byte-pair encoding by the `tokenizers` package."""

    bpe: tokenizers.Tokenizer
    eos_token: int

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids, skip_special_tokens=False)


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a `.gguf` file or a `tokenizer.json`.

    A tokenizer.json does not say which token ends a text; the `tokenizer_config.json`
    that Hugging Face puts beside it does, and is read too.

    Raises:
      ValueError: if the file is of another kind, or a GGUF tokenizer is of one that we
        cannot rebuild exactly.
      FileNotFoundError: if it, or the config beside it, does not exist.
      ImportError: naming the extra to install, if a package is missing.
    """
    path = pathlib.Path(path)
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "loading a tokenizer needs the package tokenizers: pip install "
            "'disagg-jax[weights]'"
        ) from error
    if not path.exists():
        raise FileNotFoundError(f"expected a tokenizer at {path}, got no file")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.suffix == ".json":
        return _from_json(path)
    raise ValueError(f"tokenizer: expected a .gguf or .json file, got {path}")


def save_tokenizer(tokenizer: BPETokenizer, folder: str | pathlib.Path) -> None:
    """Writes `tokenizer.json`, and beside it which token ends a text."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.bpe.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": tokenizer.bpe.id_to_token(tokenizer.eos_token)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _from_json(path: pathlib.Path) -> BPETokenizer:
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(path))
    settings = json.loads((path.parent / "tokenizer_config.json").read_text())
    eos = settings["eos_token"]
    text = eos["content"] if isinstance(eos, dict) else eos
    eos_token = bpe.token_to_id(text)
    if eos_token is None:
        raise ValueError(f"eos_token: expected one of the vocabulary, got {text!r}")
    return BPETokenizer(bpe, eos_token)


def _from_gguf(path: pathlib.Path) -> BPETokenizer:
    """Rebuilds the byte-level BPE that GGUF keeps as vocabulary and merges.

    The file names its rule for splitting text before merging and does not contain it;
    `smollm` is: every digit alone, then GPT-2's pattern. Compared with llama.cpp on 26
    texts, equal on all.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

    reader = open_gguf(path)
    kind = (
        metadata(reader, "tokenizer.ggml.model"),
        metadata(reader, "tokenizer.ggml.pre", "default"),
    )
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"GGUF tokenizer: expected ('gpt2', 'smollm'), got {kind}")
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    types = metadata(reader, "tokenizer.ggml.token_type")
    merges = metadata(reader, "tokenizer.ggml.merges")

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    if metadata(reader, "tokenizer.ggml.add_bos_token", False):
        bos = tokens[metadata(reader, "tokenizer.ggml.bos_token_id")]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return BPETokenizer(bpe, metadata(reader, "tokenizer.ggml.eos_token_id"))
