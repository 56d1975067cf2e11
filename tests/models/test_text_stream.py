"""Text comes as soon as it is whole, and all pieces together are the text."""

from hypothesis import given
from hypothesis import strategies as st

from models.sentencepiece import BYTE, NORMAL, SentencePieceTokenizer
from models.text_stream import TextStream
from models.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def pieces_of(tokenizer, prompt, *tokens: int) -> list[str]:
    """What comes for each of `tokens`, and what is left at the end."""
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add([token]) for token in tokens), stream.rest()]


def test_a_character_waits_for_all_its_bytes():
    assert pieces_of(BYTES, (), *"aé\U0001f600b".encode()) == [
        *("a", "", "é", "", "", "", "\U0001f600", "b", "")
    ]


def test_what_never_becomes_a_character_is_shown_as_such():
    assert pieces_of(BYTES, (), 0xC3, ord("a")) == ["", "\ufffda", ""]
    assert pieces_of(BYTES, (), ord("a"), 0xC3) == ["a", "", "\ufffd"]


def test_a_token_without_text_changes_nothing():
    assert pieces_of(BYTES, (), 0xC3, BYTES.eos_token, 0xA9) == ["", "", "é", ""]


@given(
    st.lists(st.integers(0, 255), max_size=30)
    | st.text(max_size=12).map(lambda text: list(text.encode())),
    st.text(max_size=3),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_all_pieces_together_are_the_text(ids, prompt, cuts):
    """However many tokens come at once, and whatever bytes they are."""
    stream, sent = TextStream(BYTES, BYTES.encode(prompt)), []
    bounds = sorted({0, *cuts, len(ids)})
    for start, end in zip(bounds, bounds[1:], strict=False):
        sent.append(stream.add(ids[start:end]))
        assert not sent[-1].endswith("\ufffd")
    assert "".join(sent) + stream.rest() == BYTES.decode(ids)


SPACED = SentencePieceTokenizer(
    pieces=("\u2581once", "\u2581", "upon", "<0xC3>", "<0xA9>"),
    scores=(0.0,) * 5,
    types=(NORMAL, NORMAL, NORMAL, BYTE, BYTE),
    eos_tokens=(),
)


def test_the_text_continues_the_prompt():
    """SentencePiece would drop the space at the beginning of a text."""
    assert SPACED.decode([0]) == "once"
    assert pieces_of(SPACED, [2], 0, 1, 1, 2) == [" once", " ", " ", "upon", ""]
    assert pieces_of(SPACED, [2], 1, 0, 3, 4) == [" ", " once", "", "é", ""]
