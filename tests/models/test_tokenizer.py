from __future__ import annotations

import json
import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import get_config
from models.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    assert all(0 <= i < 256 for i in ids)


def test_bytes_specials_have_no_text_and_fit_tiny() -> None:
    assert BYTES.decode([72, BYTES.eos_token, 105, 263]) == "Hi"
    assert BYTES.eos_token not in BYTES.encode("".join(map(chr, range(600))))
    assert BYTES.vocab_size == get_config("tiny").vocab_size


def test_half_a_character_is_replaced() -> None:
    assert BYTES.decode(BYTES.encode("aé")[:-1]) == "a\ufffd"


@pytest.mark.parametrize("bad", [-1, 264])
def test_bytes_refuse_foreign_ids(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 0 to 263, got \[{bad}\]"):
        BYTES.decode([65, bad])


def write_gguf(
    path: pathlib.Path, *, pre: str = "smollm", add_bos: bool = False
) -> pathlib.Path:
    """All bytes, the merges for " the" and "11", and two control tokens in front."""
    gguf = pytest.importorskip("gguf")
    pre_tokenizers = pytest.importorskip("tokenizers.pre_tokenizers")
    merges = ["t h", "th e", "Ġ the", "1 1"]
    tokens = ["<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_gguf_tokenizer_merges_splits_digits_and_knows_specials(
    tmp_path: pathlib.Path,
) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf"))
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.eos_token == 1
    text = "<|start|>in the 11th é\n<|end|>"
    ids = tokenizer.encode(text)
    pieces = [tokenizer.bpe.id_to_token(i) for i in ids]
    # Ġ is a space, Ċ a newline and Ã© the two bytes of é.
    assert pieces == (
        ["<|start|>", "i", "n", "Ġthe", "Ġ", "1", "1", "th", "Ġ", "Ã", "©", "Ċ"]
        + ["<|end|>"]
    )
    assert tokenizer.decode(ids) == text


def test_gguf_tokenizer_adds_a_start_token_where_the_file_says_so(
    tmp_path: pathlib.Path,
) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", add_bos=True))
    plain = load_tokenizer(write_gguf(tmp_path / "p.gguf"))
    assert tokenizer.encode("the") == [0, *plain.encode("the")]


@pytest.mark.parametrize("eos", ["<|end|>", {"content": "<|end|>"}])
def test_tokenizer_json_equals_gguf(tmp_path: pathlib.Path, eos: object) -> None:
    from_gguf = load_tokenizer(write_gguf(tmp_path / "t.gguf"))
    assert isinstance(from_gguf, BPETokenizer)
    from_gguf.bpe.save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": eos}))
    from_json = load_tokenizer(tmp_path / "tokenizer.json")
    text = "<|start|> the 2011 other"
    assert from_json.encode(text) == from_gguf.encode(text)
    assert from_json.eos_token == from_gguf.eos_token

    settings.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="one of the vocabulary, got '</s>'"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_tokenizers_we_cannot_rebuild_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"\('gpt2', 'smollm'\), got .*'qwen2'"):
        load_tokenizer(write_gguf(tmp_path / "t.gguf", pre="qwen2"))
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"\.gguf or \.json.*tokenizer\.model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_tokenizer(tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'disagg-jax\[weights\]'"):
        load_tokenizer(tmp_path / "t.gguf")
