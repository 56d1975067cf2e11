"""Tokenizers: text to token ids and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any, Protocol

from models import byte_level_bpe
from models.byte_level_bpe import read_byte_level_bpe
from models.files import package_needed, read_json, require_content
from models.gguf import is_gguf, metadata, open_gguf
from models.sentencepiece import SentencePieceTokenizer, read_sentencepiece

if TYPE_CHECKING:
    import gguf
    import tokenizers

_JSON, _PIECES = "tokenizer.json", "sentencepiece.json"


class Tokenizer(Protocol):
    """Text to token ids and back, as sources of requests and reports need it."""

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """Return the ids that end a generation, the usual one first, or ()."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of the whole text, with the tokens around every text.

        Those are often one for the beginning. Special tokens that the text spells out
        become their ids.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, with special tokens spelled out.

        An incomplete character at an end becomes U+FFFD: to stream, decode all ids so
        far and hold back a trailing U+FFFD.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, then special tokens; only the first of them is used.

    It is for models with random weights. Special tokens have no text: `encode` never
    gives one and `decode` leaves them out.
    """

    eos_token: int = 256
    vocab_size: int = 264  # as in `tiny`: divisible by 8, for sharding

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        return (self.eos_token,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`.

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
    eos_tokens: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class NoText:
    """The end tokens of a model without a tokenizer; random prompts need no more."""

    why: OSError | ValueError  # raised where a text is encoded or decoded
    eos_tokens: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        raise self.why

    def decode(self, ids: list[int]) -> str:
        raise self.why


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file, a `tokenizer.json` or a folder with one.

    A tokenizer.json does not say which tokens end a text: the files beside it do, and
    are read too. A folder without a tokenizer, or a GGUF file with one that we cannot
    rebuild exactly, gives a `NoText`.

    Raises:
      ValueError: if the file is of another kind or damaged.
      FileNotFoundError: if it does not exist.
      ImportError: naming the extra to install, if a package is missing.
    """
    path = pathlib.Path(path)
    with package_needed("tokenizers", "loading a tokenizer"):
        import tokenizers  # noqa: F401
    if not path.exists():
        raise FileNotFoundError(f"expected a tokenizer at {path}, got no file")
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".gguf" or is_gguf(path):
        return _from_gguf(path)
    raise ValueError(f"tokenizer: expected a .gguf or .json file, got {path}")


def save_tokenizer(
    tokenizer: BPETokenizer | SentencePieceTokenizer, folder: str | pathlib.Path
) -> None:
    """Write a tokenizer so that `load_tokenizer(folder)` gives it back."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / _PIECES).write_text(json.dumps(dataclasses.asdict(tokenizer)) + "\n")
        return
    tokenizer.bpe.save(str(folder / _JSON))
    settings = {"eos_token_id": list(tokenizer.eos_tokens)}
    (folder / _GENERATION).write_text(json.dumps(settings, indent=1) + "\n")


def has_tokenizer(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in (_JSON, _PIECES))


def _from_folder(folder: pathlib.Path) -> Tokenizer:
    if (folder / _PIECES).is_file():
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in read_json(folder / _PIECES).items()
        }
        return SentencePieceTokenizer(**fields)
    if (folder / _JSON).is_file():
        return _from_json(folder / _JSON)
    why = FileNotFoundError(
        f"expected a tokenizer at {folder / _JSON}, got no file; without one there are "
        "only random prompts, and no text"
    )
    return NoText(why, _eos_ids(folder))


def _from_json(path: pathlib.Path) -> BPETokenizer:
    import tokenizers

    require_content(path)
    try:
        bpe = tokenizers.Tokenizer.from_str(path.read_bytes().decode("utf-8-sig"))
    except Exception as error:  # of no narrower class
        raise ValueError(
            f"{path}: expected a tokenizer, got a damaged file: {error}"
        ) from error
    # Settings of the tokenizer's training: no prompt may be cut, padded or random.
    bpe.no_truncation()
    bpe.no_padding()
    if isinstance(bpe.model, tokenizers.models.BPE):
        bpe.model.dropout = None
    eos = _eos_named(path.parent, bpe)
    return BPETokenizer(bpe, tuple(dict.fromkeys([*eos, *_eos_ids(path.parent)])))


# -- end tokens -----------------------------------------------------------------------

_GENERATION = "generation_config.json"


def _eos_named(folder: pathlib.Path, bpe: tokenizers.Tokenizer) -> list[int]:
    """Return the end token that a tokenizer's settings name, if any."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        eos = read_json(path).get("eos_token") if path.is_file() else None
        if eos is None:
            continue
        text = eos.get("content") if isinstance(eos, dict) else eos
        id = bpe.token_to_id(text) if isinstance(text, str) else None
        if id is None:
            raise ValueError(
                f"{path}: eos_token: expected one of the vocabulary, got {text!r}"
            )
        return [id]
    return []


def _eos_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """Return the end tokens of a model. As in transformers, generation_config wins."""
    for name in (_GENERATION, "config.json"):
        path = folder / name
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
            raise ValueError(
                f"{path}: eos_token_id: expected a token id, a list of them or null, "
                f"got {eos!r}"
            )
        return tuple(ids)
    return ()


# -- GGUF -----------------------------------------------------------------------------


def _from_gguf(path: pathlib.Path) -> Tokenizer:
    reader = open_gguf(path)
    eos_tokens = _gguf_eos(reader)
    kind = metadata(reader, "tokenizer.ggml.model", None)
    pre = metadata(reader, "tokenizer.ggml.pre", "default")
    try:
        if kind == "llama":
            return read_sentencepiece(reader, eos_tokens)
        if kind == "gpt2" and pre in byte_level_bpe.KINDS:
            return BPETokenizer(read_byte_level_bpe(reader), eos_tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    known = ["llama", *(("gpt2", pre) for pre in byte_level_bpe.KINDS)]
    why = ValueError(
        f"{path}: GGUF tokenizer: expected one of {known}, got {(kind, pre)}; without "
        "one that we know there are only random prompts, and no text"
    )
    return NoText(why, eos_tokens)


def _gguf_eos(reader: gguf.GGUFReader) -> tuple[int, ...]:
    """Return the ends of a text, of a turn and of a message."""
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    ids = [metadata(reader, key, None) for key in keys]
    return tuple(dict.fromkeys(id for id in ids if id is not None))
