"""What the metadata of GGUF files say about sizes, and what they may not say."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from models.gguf import load_gguf

pytest.importorskip("gguf")

from tests.models.gguf_files import SIZES, llama_tensors, write_gguf  # noqa: E402

VOCAB = 40


def load(
    path: pathlib.Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray] | None = None,
):
    file = write_gguf(
        path / "m.gguf", SIZES | metadata, tensors or llama_tensors(vocab=VOCAB)
    )
    return load_gguf(file)


def test_heads_may_be_wider_than_the_embedding_over_their_number(
    tmp_path: pathlib.Path,
) -> None:
    wide = {
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
    }
    tensors = llama_tensors(vocab=VOCAB, head_dim=32)
    config, params = load(tmp_path, wide, tensors)
    assert config.head_dim == 32
    attention = params["layers"][1]["attention"]
    assert attention["wq"].shape == (32, 2, 32)
    assert attention["wo"].shape == (2, 32, 32)
    # The second head's values are the second half of what the output takes.
    np.testing.assert_array_equal(
        attention["wo"][1], tensors["blk.1.attn_output.weight"][:, 32:].T
    )


def test_what_is_left_out_follows_from_the_rest(tmp_path: pathlib.Path) -> None:
    """16 = embedding / heads; as many kv heads as heads; tokens as embeddings."""
    sizes = {"llama.attention.head_count_kv": None}
    tensors = llama_tensors(vocab=VOCAB, kv_heads=2)
    config, _ = load(tmp_path, sizes, tensors)
    assert (config.head_dim, config.kv_heads, config.vocab_size) == (16, 2, VOCAB)
    assert config.rope_theta == 10_000.0
    assert config.tie_embeddings


def test_a_size_of_each_layer_may_be_the_same(tmp_path: pathlib.Path) -> None:
    config, _ = load(tmp_path, {"llama.attention.head_count_kv": [1, 1]})
    assert config.kv_heads == 1
    with pytest.raises(ValueError, match=r"head_count_kv: .* all layers, got \[1, 2\]"):
        load(tmp_path, {"llama.attention.head_count_kv": [1, 2]})


def test_there_may_be_fewer_tokens_than_embeddings_and_not_more(
    tmp_path: pathlib.Path,
) -> None:
    tokens = [f"t{i}" for i in range(VOCAB + 1)]
    config, _ = load(tmp_path, {"tokenizer.ggml.tokens": tokens[:30]})
    assert config.vocab_size == VOCAB
    with pytest.raises(ValueError, match=r"m\.gguf: .*tokens: .* at most 40.* got 41"):
        load(tmp_path, {"tokenizer.ggml.tokens": tokens})


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"llama.attention.value_length": 8}, "value_length: expected 16, got 8"),
        ({"llama.rope.dimension_count": 8}, "dimension_count: expected 16, got 8"),
        ({"llama.vocab_size": 41}, r"token_embd.weight: expected shape \(41, 32\)"),
        ({"llama.attention.key_length": 32}, r"attn_q.weight: expected shape \(64"),
        ({"llama.expert_count": 8}, "expert_count: expected none, got 8"),
        ({"llama.attention.sliding_window": 32}, "sliding_window: expected none"),
        ({"llama.block_count": None}, "expected metadata 'llama.block_count', got no"),
        (
            {"llama.block_count": 3},
            "expected a tensor 'blk.2.attn_norm.weight', got none",
        ),
        ({"llama.block_count": 1}, r"got also \['blk.1.attn_k.weight'"),
        ({"split.count": 3}, "one of 3 parts; .*llama-gguf-split --merge"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: pathlib.Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        load(tmp_path, metadata)


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.scale", 0.125),
        ("attention.sliding_window", 16),
        ("attn_logit_softcapping", 50.0),
        ("embedding_scale", 12.0),
        ("expert_count", 2),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 8.0),
        ("residual_scale", 0.25),
        ("use_parallel_residual", True),
    ],
)
def test_what_our_model_has_not_is_refused_and_nothing_of_it_is_not(
    tmp_path: pathlib.Path, key: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"m\.gguf: {key}: expected none, got"):
        load(tmp_path, {f"llama.{key}": value})
    load(tmp_path, {f"llama.{key}": type(value)(0)})


def test_two_parts_are_refused_and_one_is_whole(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="expected all in one file, got one of 2 part"):
        load(tmp_path, {"split.count": 2})
    load(tmp_path, {"split.count": 1})


@pytest.mark.parametrize(
    "key, neutral, other",
    [
        ("alpha", [0.0], 1.0),
        ("attn_factor", [1.0], 0.0),
        ("yarn_attn_factor", [1.0], 0.5),
        ("yarn_ext_factor", [-1.0, 1.0], 0.0),
        ("yarn_log_multiplier", [0.0], 1.0),
    ],
)
def test_factors_of_scaling_are_taken_where_they_change_nothing(
    tmp_path: pathlib.Path, key: str, neutral: list[float], other: float
) -> None:
    """As llama.cpp writes them into files that it has not scaled, too."""
    plain, _ = load(tmp_path, {})
    for value in neutral:
        assert load(tmp_path, {f"llama.rope.scaling.{key}": value})[0] == plain
    with pytest.raises(
        ValueError, match=rf"scaling\.{key}: expected none, got {other}"
    ):
        load(tmp_path, {f"llama.rope.scaling.{key}": other})


def test_a_number_is_the_decimal_that_was_written(tmp_path: pathlib.Path) -> None:
    """Files keep float32: 1e-5 in them is 9.999999747378752e-06."""
    numbers = {
        "llama.attention.layer_norm_rms_epsilon": 3e-6,
        "llama.rope.freq_base": 500_000.1,
        "general.name": "a name",
    }
    config, _ = load(tmp_path, numbers)
    assert (config.norm_eps, config.rope_theta) == (3e-6, 500_000.1)
    assert config.name == "a name"
    assert load(tmp_path, {})[0].name == "gguf"


@pytest.mark.parametrize(
    "key",
    [
        "attention.layer_norm_rms_epsilon",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    ],
)
def test_sizes_that_nothing_says_are_named(tmp_path: pathlib.Path, key: str) -> None:
    with pytest.raises(
        ValueError, match=rf"expected metadata 'llama\.{key}', got none"
    ):
        load(tmp_path, {f"llama.{key}": None})


def test_of_two_factors_the_newer_key_counts(tmp_path: pathlib.Path) -> None:
    both = {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}
    assert load(tmp_path, both)[0].rope_divisors == (4.0,) * 8


def test_a_context_is_never_shorter_than_the_file_says(tmp_path: pathlib.Path) -> None:
    """Stretched from 8 by 4, and from 32; the file says 64."""
    for original, length in ((8, 64), (32, 128)):
        scaling = {"type": "yarn", "factor": 4.0, "original_context_length": original}
        keys = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
        assert load(tmp_path, keys)[0].max_length == length


def test_divisors_multiply_those_of_the_metadata(tmp_path: pathlib.Path) -> None:
    tensors = llama_tensors(vocab=VOCAB)
    tensors["rope_freqs.weight"] = np.arange(1, 9, dtype=np.float32)
    plain, _ = load(tmp_path, {}, tensors)
    assert plain.rope_divisors == tuple(map(float, range(1, 9)))
    twice, _ = load(tmp_path, {"llama.rope.scaling.factor": 2.0}, tensors)
    assert twice.rope_divisors == tuple(2.0 * i for i in range(1, 9))


def test_a_size_of_each_layer_is_that_of_all(tmp_path: pathlib.Path) -> None:
    for sizes in ([48, 48, 47], [47, 48, 48]):
        with pytest.raises(ValueError, match="feed_forward_length: expected the same"):
            load(tmp_path, {"llama.feed_forward_length": sizes})


def test_a_tensor_of_integers_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = llama_tensors(vocab=VOCAB)
    name = "blk.0.ffn_up.weight"
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(ValueError, match=rf"m\.gguf: {name}: expected floats.*got I8"):
        load(tmp_path, {}, tensors)


def test_a_file_is_known_by_its_beginning(tmp_path: pathlib.Path) -> None:
    """Whatever its name; and what is none says so."""
    file = write_gguf(tmp_path / "sha256-1", SIZES, llama_tensors(vocab=VOCAB))
    assert load_gguf(file)[0].layers == 2
    data = file.read_bytes()
    for other in (b"PK\x03\x04", b"{}", b"GGU"):
        (tmp_path / "m.gguf").write_bytes(other)
        with pytest.raises(ValueError, match=r"m\.gguf: expected a GGUF file, got ano"):
            load_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"m\.gguf: .*empty"):
        load_gguf(tmp_path / "m.gguf")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / "m.gguf").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"m\.gguf: .*Git LFS pointer.*git lfs pull"):
        load_gguf(tmp_path / "m.gguf")
    # A part of it, cut anywhere: in the counts, keys, tensor names or weights.
    for size in (*range(4, 1600, 37), len(data) // 2, len(data) - 1):
        (tmp_path / "m.gguf").write_bytes(data[:size])
        with pytest.raises(
            ValueError, match=r"m\.gguf: .*a whole GGUF file, got a dam"
        ):
            load_gguf(tmp_path / "m.gguf")
