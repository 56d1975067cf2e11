from __future__ import annotations

import json
import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import get_config
from models.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
    save_tokenizer,
)

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
    assert BYTES.decode([97, 255]) == "a\ufffd"


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
    assert tokenizer.eos_tokens == (1,)
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
    assert from_json.eos_tokens == from_gguf.eos_tokens

    settings.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="one of the vocabulary, got '</s>'"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_what_is_no_tokenizer_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "t.gguf")
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"\.gguf or \.json.*tokenizer\.model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_tokenizer(tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'disagg-jax\[weights\]'"):
        load_tokenizer(tmp_path / "t.gguf")


# -- Hugging Face folders -------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """With `<|start|>`, `<|end|>` (0 and 1), bytes and a few merges; no settings."""
    from_gguf = load_tokenizer(write_gguf(tmp_path / "t.gguf"))
    assert isinstance(from_gguf, BPETokenizer)
    from_gguf.bpe.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_json(path: pathlib.Path, content: object) -> None:
    path.write_text(json.dumps(content))


def test_what_its_training_left_in_a_tokenizer_does_not_change_a_prompt(
    folder: pathlib.Path,
) -> None:
    """Truncation, padding and dropout: the first cuts, the others add or draw."""
    text = "the other thing " * 20
    plain = load_tokenizer(folder)
    assert isinstance(plain, BPETokenizer)
    ids = plain.encode(text)
    baked = plain.bpe
    baked.enable_truncation(max_length=8, stride=2)
    baked.enable_padding(length=4096, pad_id=5, pad_token="!")
    baked.model.dropout = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    baked.save(str(folder / "tokenizer.json"))
    assert '"dropout":0.5' in (folder / "tokenizer.json").read_text().replace(" ", "")
    loaded = load_tokenizer(folder)
    assert [loaded.encode(text) for _ in range(3)] == [ids] * 3


def test_what_a_tokenizer_puts_around_a_text_stays(folder: pathlib.Path) -> None:
    """The beginning is part of a prompt: the model was trained with it."""
    plain = load_tokenizer(folder)
    assert isinstance(plain, BPETokenizer)
    from tokenizers import processors

    plain.bpe.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    plain.bpe.enable_truncation(max_length=2)
    plain.bpe.save(str(folder / "tokenizer.json"))
    loaded, ids = load_tokenizer(folder), load_tokenizer(folder).encode("the the")
    assert ids[0] == 0 and loaded.decode(ids) == "<|start|>the the"


@pytest.mark.parametrize(
    "named, generation, model, eos_tokens",
    [
        ("<|end|>", None, None, (1,)),
        ({"content": "<|end|>"}, None, None, (1,)),
        (None, None, 7, (7,)),
        (None, None, [7, 9], (7, 9)),
        (None, [9, 8], [7, 9], (9, 8)),  # generation_config.json is asked first
        (None, 0, 7, (0,)),
        ("<|end|>", [9, 1, 8], None, (1, 9, 8)),
        ("<|end|>", None, [9, 1], (1, 9)),
        (None, None, None, ()),
    ],
)
@pytest.mark.parametrize("silent", ["null", "no key", "no file"])
def test_end_tokens_are_those_of_the_model_and_its_tokenizer(
    folder: pathlib.Path,
    named: object,
    generation: object,
    model: object,
    eos_tokens: tuple[int, ...],
    silent: str,
) -> None:
    """The tokenizer's is the usual one; what is not said is said in three ways."""
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", named),
        ("generation_config.json", "eos_token_id", generation),
        ("config.json", "eos_token_id", model),
    ):
        if value is not None or silent == "null":
            write_json(folder / name, {key: value})
        elif silent == "no key":
            write_json(folder / name, {})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_tokens == eos_tokens
    if named is None:
        (folder / "tokenizer.json").unlink()
        assert load_tokenizer(folder).eos_tokens == eos_tokens


def test_older_folders_name_the_end_elsewhere(folder: pathlib.Path) -> None:
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|end|>"})
    assert load_tokenizer(folder).eos_tokens == (1,)


@pytest.mark.parametrize("eos", ["2", True, [1, None], {"a": 1}, 1.5])
def test_an_end_token_that_is_no_id_is_refused(
    folder: pathlib.Path, eos: object
) -> None:
    write_json(folder / "config.json", {"eos_token_id": eos})
    with pytest.raises(
        ValueError, match=r"/config\.json: eos_token_id: expected a tok"
    ):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_has_no_text(folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_json(folder / "config.json", {"eos_token_id": [4, 5]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_tokens == (4, 5)
    with pytest.raises(FileNotFoundError, match=r"a tokenizer at .*/tokenizer\.json"):
        tokenizer.encode("the")
    with pytest.raises(FileNotFoundError, match="only random prompts"):
        tokenizer.decode([1])


def test_a_byte_order_mark_is_no_damage(folder: pathlib.Path) -> None:
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    ids = load_tokenizer(folder).encode("the")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text, encoding="utf-8-sig")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.encode("the"), tokenizer.eos_tokens) == (ids, (1,))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "empty"),
        (b'{"version": "1.0", "trunc', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[]", "expected a"),
    ],
)
def test_a_damaged_file_is_named(
    folder: pathlib.Path, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name}: .*{message}"):
        load_tokenizer(folder)


def test_a_saved_tokenizer_comes_back_with_its_ends(folder: pathlib.Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [9, 1]})
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, BPETokenizer)
    save_tokenizer(tokenizer, folder / "saved")
    saved = load_tokenizer(folder / "saved")
    assert saved.eos_tokens == (9, 1)
    assert saved.encode("the 11 <|end|>") == tokenizer.encode("the 11 <|end|>")
