"""SentencePiece's BPE, as GGUF files of kind `llama` describe it.

The code is ours, because the `tokenizers` package ranks pairs and SentencePiece ranks
pieces: of two pairs that make the same piece, or pieces of one score, it merges the
first in the text (`bpe_model.cc`, github.com/google/sentencepiece).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import re
from typing import TYPE_CHECKING

from models.gguf import added_token, metadata

if TYPE_CHECKING:
    import gguf

# Token types of GGUF, which are SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"  # a space inside a piece


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """Pieces with scores: of two neighbours that make a piece, the best merge first.

    A character that is no piece becomes its UTF-8 bytes if they are pieces, else the
    unknown piece. Control and user-defined pieces are found in the text as spelled. The
    text behind one begins like a new text, as in llama.cpp.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    eos_tokens: tuple[int, ...]
    before: tuple[int, ...] = ()  # ids that every text begins with
    after: tuple[int, ...] = ()
    unknown: int | None = None
    add_space_prefix: bool = True  # whether every text begins with a space

    def __post_init__(self) -> None:
        sizes = {len(self.pieces), len(self.scores), len(self.types)}
        if len(sizes) != 1:
            raise ValueError(
                "tokenizer: expected a score and a type for each of "
                f"{len(self.pieces)} pieces, got {len(self.scores)}, {len(self.types)}"
            )

    def encode(self, text: str) -> list[int]:
        ids = list(self.before)
        # Every second part is a special piece, from the pattern's group.
        for i, part in enumerate(self._special_pattern.split(text)):
            if i % 2:
                ids.append(self._specials[part])
            elif part:
                ids += self._encode_plain(part)
        return [*ids, *self.after]

    def decode(self, ids: list[int]) -> str:
        data = b"".join(self._bytes_of(id) for id in ids)
        text = data.decode(errors="replace")
        return text.removeprefix(" ") if self.add_space_prefix else text

    def _encode_plain(self, text: str) -> list[int]:
        prefix = " " if self.add_space_prefix else ""
        ids: list[int] = []
        for part in self._merge((prefix + text).replace(" ", _SPACE)):
            found = self._ids_of(part)
            # SentencePiece gives a run of unknown characters one id.
            if found != [self.unknown] or ids[-1:] != found:
                ids += found
        return ids

    def _ids_of(self, part: str) -> list[int]:
        if part in self._plain:
            return [self._plain[part]]
        values = part.encode()
        if all(value in self._byte_ids for value in values):
            return [self._byte_ids[value] for value in values]
        if self.unknown is None:
            raise ValueError(f"tokenizer: expected a piece for {part!r}, got none")
        return [self.unknown]

    def _merge(self, text: str) -> list[str]:
        """Merge characters until no two neighbours make a piece."""
        parts = [*text]
        before, after = [*range(-1, len(parts) - 1)], [*range(1, len(parts) + 1)]
        halves: dict[str, tuple[str, str]] = {}  # of each merged piece
        heap: list[tuple[float, int, int, str]] = []  # the best, then the leftmost

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(parts):
                return
            merged = parts[left] + parts[right]
            if (id := self._plain.get(merged)) is not None:
                halves[merged] = parts[left], parts[right]
                heapq.heappush(heap, (-self.scores[id], left, right, merged))

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while heap:
            _, left, right, merged = heapq.heappop(heap)
            if not parts[right] or parts[left] + parts[right] != merged:
                continue  # a half has been merged otherwise
            parts[left], parts[right] = merged, ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [piece for part in parts if part for piece in self._used(part, halves)]

    def _used(self, part: str, halves: dict[str, tuple[str, str]]) -> list[str]:
        """Take a part apart again if it is an unused piece."""
        id = self._plain.get(part)
        if id is None or self.types[id] != UNUSED or part not in halves:
            return [part]
        return [piece for half in halves[part] for piece in self._used(half, halves)]

    def _bytes_of(self, id: int) -> bytes:
        """Return the bytes of a piece; b"" for an id with an embedding and no piece."""
        if not 0 <= id < len(self.pieces):
            return b""
        piece, kind = self.pieces[id], self.types[id]
        if kind == BYTE:
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return piece.encode()
        return piece.replace(_SPACE, " ").encode()

    @functools.cached_property
    def _plain(self) -> dict[str, int]:
        """Pieces that merging may make."""
        return self._of_types(NORMAL, USER_DEFINED, UNUSED)

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        """Pieces that are found in a text before merging."""
        specials = self._of_types(CONTROL, USER_DEFINED, UNKNOWN)
        return {piece: id for piece, id in specials.items() if piece}

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        pieces = self._of_types(BYTE)
        return {int(piece[3:5], 16): id for piece, id in pieces.items()}

    def _of_types(self, *types: int) -> dict[str, int]:
        return {
            piece: id
            for id, (piece, kind) in enumerate(
                zip(self.pieces, self.types, strict=True)
            )
            if kind in types
        }


def read_sentencepiece(
    reader: gguf.GGUFReader, eos_tokens: tuple[int, ...]
) -> SentencePieceTokenizer:
    """Read the tokenizer of kind `llama` in a GGUF file, with llama.cpp's defaults."""
    pieces = metadata(reader, "tokenizer.ggml.tokens")
    types = metadata(reader, "tokenizer.ggml.token_type", [NORMAL] * len(pieces))
    unknown = metadata(reader, "tokenizer.ggml.unknown_token_id", None)
    if unknown is None and UNKNOWN in types:
        unknown = types.index(UNKNOWN)
    return SentencePieceTokenizer(
        pieces=tuple(pieces),
        scores=tuple(metadata(reader, "tokenizer.ggml.scores", [0.0] * len(pieces))),
        types=tuple(types),
        eos_tokens=eos_tokens,
        before=added_token(reader, "bos", len(pieces), default=True),
        after=added_token(reader, "eos", len(pieces), default=False),
        unknown=unknown,
        add_space_prefix=metadata(reader, "tokenizer.ggml.add_space_prefix", True),
    )
