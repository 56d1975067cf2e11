"""Text of tokens that come one by one: no character is shown before it is whole."""

from __future__ import annotations

from collections.abc import Sequence

from models.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text that continues a prompt, piece by piece.

    A character may take several tokens, of some of its bytes each. Then the text waits
    until a later token completes the character, or shows that none will.

    A piece is decoded behind the tokens of the piece before it, since tokenizers treat
    the beginning of a text differently: SentencePiece drops a space there. Older tokens
    are not needed, so a token takes equally long in a text of any length.

    Args:
      prompt: token ids; their text belongs to no piece.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._before = list(prompt)  # what the next piece is decoded behind
        self._pending: list[int] = []  # without a piece yet

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is whole with these tokens, '' if there is none."""
        self._pending += tokens
        piece = self._decode_pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._before, self._pending = self._pending, []
        return piece

    def rest(self) -> str:
        """Return the text of tokens without a piece, U+FFFD where it is not whole."""
        piece = self._decode_pending()
        self._before, self._pending = self._pending or self._before, []
        return piece

    def _decode_pending(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._pending)[len(before) :]
