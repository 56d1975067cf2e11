"""Tokenizers in GGUF files, against other implementations of the same rules."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sentencepiece import SentencePieceTokenizer
from models.tokenizer import BPETokenizer, NoText, load_tokenizer, save_tokenizer

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from tests.models.gguf_files import write_gguf  # noqa: E402

CORPUS = (pathlib.Path(__file__).read_text() + "Grüße, naïve señor! 你好世界 ") * 2
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces \n\n\tand a tab",
    "in 2024: 1234567 items, 3.14",
    "I'LL say don't, they've",
    "Grüße 你好 🙂‍↔️ e\u0301 \u00a0x",
    "<s>a</s> b<unk>",
    "def f(x):\n    return x ** 2  # 'square'\r\n",
    "\u2581 is a space",
]

# -- SentencePiece --------------------------------------------------------------------

SPECIALS = {"<unk>": 2, "<s>": 3, "</s>": 3}  # and their types
BYTES = [f"<0x{value:02X}>" for value in range(256)]
FIRST = len(SPECIALS) + len(BYTES)


def trained_pieces(size: int = 400) -> list[str]:
    """The best first, characters last; each is made of two others or is a character."""
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.train_from_iterator(CORPUS.splitlines(), trainer)
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in by_id]
    return [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]


def sentencepiece(
    folder: pathlib.Path, pieces: list[str], scores: list[float], **metadata: Any
) -> SentencePieceTokenizer:
    keys = {
        "model": "llama",
        "tokens": [*SPECIALS, *BYTES, *pieces],
        "scores": [0.0] * FIRST + scores,
        "token_type": [*SPECIALS.values(), *[6] * len(BYTES), *[1] * len(pieces)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **metadata,
    }
    file = write_gguf(
        folder / "t.gguf", {f"tokenizer.ggml.{key}": keys[key] for key in keys}
    )
    tokenizer = load_tokenizer(file)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def plain_ids(pieces: dict[str, float], text: str) -> list[int]:
    """SentencePiece's algorithm as its paper tells it, in quadratic time."""
    parts = [*text.replace(" ", "\u2581")]
    ids = {piece: FIRST + i for i, piece in enumerate(pieces)}
    while True:
        pairs = ["".join(parts[i : i + 2]) for i in range(len(parts) - 1)]
        known = [(-pieces[pair], i) for i, pair in enumerate(pairs) if pair in pieces]
        if not known:
            break
        _, i = min(known)
        parts[i : i + 2] = [pairs[i]]
    return [
        id
        for part in parts
        for id in ([ids[part]] if part in ids else [3 + b for b in part.encode()])
    ]


def ranked(pieces: list[str]) -> list[float]:
    return [-float(i) for i in range(len(pieces))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    pieces = trained_pieces()
    folder = tmp_path_factory.mktemp("trained")
    return sentencepiece(folder, pieces, ranked(pieces), add_bos_token=False)


@pytest.fixture(scope="module")
def converted(trained: SentencePieceTokenizer) -> Any:
    """What transformers makes of such a model: merges in the order of their scores."""
    pieces = trained.pieces[FIRST:]
    vocab = {piece: i for i, piece in enumerate(trained.pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces  # the best first
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    bpe.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("\u2581"),
            tokenizers.normalizers.Replace(" ", "\u2581"),
        ]
    )
    bpe.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIALS]
    )
    return bpe


def check_converted(trained: SentencePieceTokenizer, converted: Any, text: str) -> None:
    ids = trained.encode(text)
    assert ids == converted.encode(text).ids
    assert trained.decode(ids) == converted.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", [*TEXTS, CORPUS[:3000]])
def test_sentencepiece_equals_its_conversion(
    trained: SentencePieceTokenizer, converted: Any, text: str
) -> None:
    check_converted(trained, converted, text)
    assert len(trained.encode(CORPUS[:3000])) < 2000  # or nothing would be merged


@given(st.text(max_size=60) | st.text("retun <s>/ \u2581", max_size=60))
def test_sentencepiece_equals_its_conversion_on_any_text(
    trained: SentencePieceTokenizer, converted: Any, text: str
) -> None:
    check_converted(trained, converted, text)


@given(
    st.dictionaries(
        st.text("ab\u2581", min_size=1, max_size=5), st.integers(-2, 0), max_size=30
    ),
    st.text("ab c", max_size=30),
)
def test_of_equal_scores_the_first_in_the_text_is_merged(
    scores: dict[str, int], text: str
) -> None:
    """Ties are where SentencePiece is no list of merges; spaces are not added here."""
    pieces = {piece: float(score) for piece, score in scores.items()}
    tokenizer = SentencePieceTokenizer(
        pieces=(*SPECIALS, *BYTES, *pieces),
        scores=(*[0.0] * FIRST, *pieces.values()),
        types=(*SPECIALS.values(), *[6] * len(BYTES), *[1] * len(pieces)),
        eos_tokens=(2,),
        add_space_prefix=False,
    )
    assert tokenizer.encode(text) == plain_ids(pieces, text)


def test_a_text_begins_with_a_space_unless_the_file_says_no(
    tmp_path: pathlib.Path,
) -> None:
    pieces = ["\u2581a", "a", "\u2581"]
    a, bare, space = (FIRST + i for i in range(3))
    with_space = sentencepiece(tmp_path, pieces, ranked(pieces), add_bos_token=False)
    # A text that begins with one begins with two, and is told from one without.
    assert with_space.encode("a a") == [a, a]
    assert with_space.encode(" a") == [space, a]
    assert [with_space.decode(ids) for ids in ([a, a], [space, a])] == ["a a", " a"]
    # As in llama.cpp, what follows a control token begins like a text.
    assert with_space.encode("a</s>a") == [a, 2, a]
    without = sentencepiece(
        tmp_path,
        pieces,
        ranked(pieces),
        add_bos_token=False,
        add_space_prefix=False,
    )
    assert without.encode("a a") == [bare, a]
    assert without.decode([a]) == " a"


@pytest.mark.parametrize(
    "metadata, before, after",
    [
        ({}, [1], []),  # llama.cpp's default for this kind
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"bos_token_id": 5}, [5], []),
        ({"bos_token_id": None}, [], []),
        ({"bos_token_id": 2**32 - 1}, [], []),  # -1: none
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: pathlib.Path,
    metadata: dict[str, Any],
    before: list[int],
    after: list[int],
) -> None:
    tokenizer = sentencepiece(tmp_path, ["\u2581a"], [0.0], **metadata)
    assert tokenizer.encode("a") == [*before, FIRST, *after]
    assert tokenizer.encode("") == [*before, *after]


def test_special_pieces_are_found_and_spelled_out(tmp_path: pathlib.Path) -> None:
    """The longest first; user-defined ones as control tokens."""
    pieces = ["<|a|>", "<|a|><|b|>", "x", "<", "|"]
    types = [*SPECIALS.values(), *[6] * 256, 4, 3, 1, 1, 1]
    tokenizer = sentencepiece(
        tmp_path,
        pieces,
        ranked(pieces),
        token_type=types,
        add_bos_token=False,
        add_space_prefix=False,
    )
    ids = tokenizer.encode("x<|a|><|b|><|a|>x<|")
    assert ids == [FIRST + i for i in (2, 1, 0, 2, 3, 4)]
    assert tokenizer.decode([1, *ids, 2]) == "<s>x<|a|><|b|><|a|>x<|</s>"


def test_only_their_spelling_makes_control_tokens(tmp_path: pathlib.Path) -> None:
    """Not a merge: the space before a text is none that it spells."""
    types = [*SPECIALS.values(), *[6] * 256, 3, 1, 1]
    pieces = ["\u2581a", "\u2581", "a"]
    tokenizer = sentencepiece(tmp_path, pieces, ranked(pieces), token_type=types)
    assert tokenizer.encode("a") == [1, FIRST + 1, FIRST + 2]
    assert tokenizer.encode("\u2581a") == [1, FIRST]


def test_a_user_defined_piece_may_be_merged_and_is_spelled_as_it_is(
    tmp_path: pathlib.Path,
) -> None:
    """Unlike a control token; its spaces stay signs in a text."""
    types = [*SPECIALS.values(), *[6] * 256, 4, 1, 1]
    pieces = ["\u2581a", "\u2581", "a"]
    tokenizer = sentencepiece(
        tmp_path, pieces, ranked(pieces), token_type=types, add_bos_token=False
    )
    assert tokenizer.encode("a") == [FIRST]
    assert tokenizer.decode([FIRST, FIRST + 1, FIRST + 2]) == "\u2581a a"


def test_what_a_file_leaves_out_is_as_in_llama_cpp(tmp_path: pathlib.Path) -> None:
    """Equal scores, normal pieces; the unknown piece is the one of that type."""

    def read(tokens: list[str], **more: Any) -> SentencePieceTokenizer:
        keys = {"model": "llama", "tokens": tokens, "add_space_prefix": False, **more}
        file = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", file))
        assert isinstance(tokenizer, SentencePieceTokenizer)
        return tokenizer

    plain = read(["ab", "bc", "a", "b", "c"])
    assert (plain.scores, plain.types) == ((0.0,) * 5, (1,) * 5)
    assert plain.unknown is None
    assert plain.encode("abc") == [0, 4]  # the first in the text
    few = ["<s>", "a", "<unk>"]
    known = read(few, token_type=[3, 1, 2], bos_token_id=0)
    assert known.unknown == 2 and known.encode("xa") == [0, 2, 1]
    assert read(few, token_type=[2, 1, 1], unknown_token_id=2).unknown == 2


def test_an_id_that_no_piece_has_is_not_put_around_a_text(
    tmp_path: pathlib.Path,
) -> None:
    """The first that is none, and the last that is one."""
    size = FIRST + 1
    for id, before in ((size, []), (size - 1, [size - 1])):
        tokenizer = sentencepiece(tmp_path, ["\u2581a"], [0.0], bos_token_id=id)
        assert tokenizer.encode("a") == [*before, FIRST]
        assert tokenizer.decode([size, FIRST]) == "a"


def test_unused_pieces_are_taken_apart_again(tmp_path: pathlib.Path) -> None:
    pieces = ["abc", "ab", "a", "b", "c"]
    types = [*SPECIALS.values(), *[6] * 256, 5, 1, 1, 1, 1]
    tokenizer = sentencepiece(
        tmp_path,
        pieces,
        ranked(pieces),
        token_type=types,
        add_bos_token=False,
        add_space_prefix=False,
    )
    assert tokenizer.encode("abcab") == [FIRST + i for i in (1, 4, 1)]


def test_without_bytes_a_run_of_unknown_characters_is_one_token() -> None:
    fields: dict[str, Any] = {
        "pieces": ("<unk>", "a"),
        "scores": (0.0, 0.0),
        "types": (2, 1),
        "eos_tokens": (),
        "add_space_prefix": False,
    }
    tokenizer = SentencePieceTokenizer(**fields, unknown=0)
    assert tokenizer.encode("xyaza") == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="expected a piece for 'x', got none"):
        SentencePieceTokenizer(**fields).encode("x")
    with pytest.raises(ValueError, match="for each of 2 pieces, got 1, 2"):
        SentencePieceTokenizer(**fields | {"scores": (0.0,)})


def test_half_a_character_and_unknown_ids_are_no_errors(
    trained: SentencePieceTokenizer,
) -> None:
    """Streams end anywhere, and there may be more embeddings than pieces."""
    half = [3 + value for value in "🙂".encode()[:2]]
    assert trained.decode(half) == "\ufffd"
    assert trained.decode([10**6, *trained.encode("ab"), -1]) == "ab"


def test_a_saved_sentencepiece_tokenizer_comes_back(
    trained: SentencePieceTokenizer, tmp_path: pathlib.Path
) -> None:
    save_tokenizer(trained, tmp_path)
    assert load_tokenizer(tmp_path) == trained


# -- byte-level BPE -------------------------------------------------------------------


UNUSED = ["Ā ā"]  # of bytes 0 and 1: files have at least one merge


def byte_level(
    folder: pathlib.Path, pre: str, merges: list[str] = UNUSED, **metadata: Any
) -> BPETokenizer:
    """Two control tokens, all bytes, and what the merges make."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|begin|>", "<|end|>", *alphabet, *made]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **metadata,
    }
    file = write_gguf(
        folder / "t.gguf", {f"tokenizer.ggml.{key}": keys[key] for key in keys}
    )
    tokenizer = load_tokenizer(file)
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


SPLITS = {
    "I'LL pay it'Sx": (["I", "'LL", " pay", " it", "'S", "x"],) * 2,
    "a\r  b": (["a", "\r", " ", " b"],) * 2,
    "x 1234567": (
        ["x", " ", "123", "456", "7"],
        ["x", " ", "1", "2", "3", "4", "5", "6", "7"],
    ),
    "a  b\n\n\n c": (["a", " ", " b", "\n\n\n", " c"],) * 2,
    "f(x)!?\r\n\tend  ": (["f", "(x", ")!?\r\n", "\tend", "  "],) * 2,
    "na\u00efve\u2019s \u4f60\u597d": (["na\u00efve", "\u2019s", " \u4f60\u597d"],) * 2,
}


@pytest.mark.parametrize("text", SPLITS)
@pytest.mark.parametrize("pre", ["llama-bpe", "llama-v3", "llama3", "qwen2"])
def test_a_text_is_split_before_it_is_merged(
    tmp_path: pathlib.Path, pre: str, text: str
) -> None:
    """By hand, from the published patterns: words take a sign or space before them."""
    bpe = byte_level(tmp_path, pre).bpe
    spans = [span for _, span in bpe.pre_tokenizer.pre_tokenize_str(text)]
    words = [text[start:end] for start, end in spans]
    assert words == SPLITS[text][pre == "qwen2"]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_byte_level_bpe_equals_the_one_that_was_trained(
    tmp_path: pathlib.Path, pre: str
) -> None:
    """By example: it is trained with our splits, so only the rest is compared."""
    empty = byte_level(tmp_path, pre).bpe
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.NFC() if pre == "qwen2" else None
    trained.pre_tokenizer = empty.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(CORPUS.splitlines(), trainer)
    trained.save(str(tmp_path / "trained.json"))
    merges = json.loads((tmp_path / "trained.json").read_text())["model"]["merges"]
    ours = byte_level(tmp_path, pre, [" ".join(m) for m in merges], add_bos_token=False)
    for text in [*TEXTS, CORPUS[:2000]]:
        ids = ours.encode(text)
        pieces = [ours.bpe.id_to_token(id) for id in ids]
        assert pieces == trained.encode(text).tokens
        if pre == "llama-bpe":
            assert ours.decode(ids) == text
    composed = ours.encode("e\u0301") == ours.encode("\u00e9")
    assert composed == (pre == "qwen2")


def test_a_word_that_is_a_token_stays_one_in_llama_bpe(tmp_path: pathlib.Path) -> None:
    """Though "a b" is merged first and "ab c" is no merge."""
    merges = ["a b", "b c", "a bc"]
    llama, qwen = (
        byte_level(tmp_path, pre, merges, add_bos_token=False)
        for pre in ("llama-bpe", "qwen2")
    )
    word = llama.bpe.token_to_id("abc")
    assert llama.encode("abc") == [word]
    assert qwen.encode("abc") == [qwen.bpe.token_to_id(t) for t in ("ab", "c")]


@pytest.mark.parametrize(
    "pre, metadata, around",
    [
        ("llama-bpe", {}, ("<|begin|>", "")),  # llama.cpp's default for this kind
        ("llama-bpe", {"add_bos_token": False}, ("", "")),
        ("llama-bpe", {"bos_token_id": None}, ("", "")),
        ("llama-bpe", {"bos_token_id": 2**32 - 1}, ("", "")),
        ("llama-bpe", {"add_eos_token": True}, ("<|begin|>", "<|end|>")),
        ("qwen2", {}, ("", "")),
        ("qwen2", {"add_bos_token": True}, ("<|begin|>", "")),
        ("smollm", {"add_eos_token": True}, ("", "<|end|>")),
    ],
)
def test_what_is_put_around_a_text_of_bytes(
    tmp_path: pathlib.Path,
    pre: str,
    metadata: dict[str, Any],
    around: tuple[str, str],
) -> None:
    tokenizer = byte_level(tmp_path, pre, **metadata)
    assert tokenizer.decode(tokenizer.encode("a<|end|>b")) == "a<|end|>b".join(around)
    assert tokenizer.encode("<|end|>").count(1) == 1 + (around[1] == "<|end|>")


def test_user_defined_tokens_are_special_as_control_tokens_are(
    tmp_path: pathlib.Path,
) -> None:
    """Found in a text before it is split; normal tokens are only merged."""
    for kind, special in ((1, False), (3, True), (4, True)):
        types = [3, 3, *[1] * 256, kind]
        bpe = byte_level(tmp_path, "smollm", ["a b"], token_type=types).bpe
        ids = bpe.encode("xab").ids
        assert [bpe.id_to_token(id) for id in ids] == ["x", "ab"]
        assert bpe.decode(ids) == ("x" if special else "xab")


def test_tokens_and_merges_have_to_go_together(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"t\.gguf: tokenizer\.ggml\.merges: .*"):
        byte_level(tmp_path, "qwen2", tokens=["a"])
    with pytest.raises(ValueError, match=r"t\.gguf: .*token_type: expected 259, got 1"):
        byte_level(tmp_path, "qwen2", token_type=[1])


# -- end tokens and unknown kinds -----------------------------------------------------


@pytest.mark.parametrize(
    "ids, eos_tokens",
    [
        ({"eos": 2}, (2,)),
        ({"eos": 2, "eot": 7, "eom": 5}, (2, 7, 5)),
        ({"eos": 2, "eot": 2}, (2,)),
        ({"eot": 7}, (7,)),
        ({"eos": 0}, (0,)),
        ({}, ()),
    ],
)
@pytest.mark.parametrize("model", ["gpt2", "llama", "rwkv", None])
def test_the_ends_of_a_text_a_turn_and_a_message(
    tmp_path: pathlib.Path,
    model: str | None,
    ids: dict[str, int],
    eos_tokens: tuple[int, ...],
) -> None:
    keys = {f"{end}_token_id": id for end, id in ids.items()}
    keys |= {"model": model, "pre": "smollm", "tokens": list("abcdefgh"), "merges": []}
    if not model:
        del keys["tokens"]
    keys["merges"] = ["a b"] if model == "gpt2" else None
    if model == "gpt2":
        keys["tokens"][0:3] = ["ab", "a", "b"]
    file = write_gguf(
        tmp_path / "t.gguf", {f"tokenizer.ggml.{k}": keys[k] for k in keys}
    )
    tokenizer = load_tokenizer(file)
    assert tokenizer.eos_tokens == eos_tokens
    assert isinstance(tokenizer, NoText) == (model in ("rwkv", None))


@pytest.mark.parametrize(
    "model, pre", [("gpt2", "default"), ("gpt2", "tekken"), ("t5", None)]
)
def test_only_text_needs_a_kind_that_we_know(
    tmp_path: pathlib.Path, model: str, pre: str | None
) -> None:
    keys = {"model": model, "pre": pre, "eos_token_id": 3, "tokens": ["a"]}
    file = write_gguf(
        tmp_path / "t.gguf", {f"tokenizer.ggml.{k}": keys[k] for k in keys}
    )
    tokenizer = load_tokenizer(file)
    assert tokenizer.eos_tokens == (3,)
    named = rf"t\.gguf: .*llama-bpe.* got \('{model}', '{pre or 'default'}'\)"
    with pytest.raises(ValueError, match=named):
        tokenizer.encode("a")
    with pytest.raises(ValueError, match=named):
        tokenizer.decode([0])
