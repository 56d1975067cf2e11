"""Hugging Face folders as people have them: loaded where they are clear, or refused."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from models.hf import load_hf
from tests.models.test_gguf import assert_same

safetensors_numpy = pytest.importorskip("safetensors.numpy")

GOLDEN = pathlib.Path(__file__).parent / "golden"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 269060552\n"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    return lambda family: shutil.copytree(GOLDEN / family, tmp_path / "model")


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = folder.glob("*.safetensors")
    return {
        k: v for file in files for k, v in safetensors_numpy.load_file(file).items()
    }


def store(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """As one file."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    safetensors_numpy.save_file(tensors, folder / WHOLE)


def change_json(path: pathlib.Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_a_model_saved_without_its_head_has_other_names(
    family: str, copy: Callable[[str], pathlib.Path]
) -> None:
    folder = copy(family)
    config, params = load_hf(folder)
    tensors = tensors_of(folder)
    store(folder, {k.removeprefix("model."): v for k, v in tensors.items()})
    bare_config, bare = load_hf(folder)
    assert bare_config == config
    jax.tree.map(np.testing.assert_array_equal, bare, params)


def test_a_head_that_is_not_tied_has_to_be_there(
    copy: Callable[[str], pathlib.Path],
) -> None:
    folder = copy("llama")
    tensors = tensors_of(folder)
    del tensors["lm_head.weight"]
    store(folder, tensors)
    with pytest.raises(
        ValueError, match=rf"{WHOLE}: expected a tensor 'lm_head.weight"
    ):
        load_hf(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert "unembed" not in load_hf(folder)[1]


def test_what_is_no_weight_is_left_out(copy: Callable[[str], pathlib.Path]) -> None:
    folder = copy("opt")
    _, params = load_hf(folder)
    extra = {
        "model.decoder.version": np.zeros(1, np.int64),
        "model.decoder.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    store(folder, tensors_of(folder) | extra)
    assert_same(load_hf(folder)[1], params)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_damage(
    encoding: str, copy: Callable[[str], pathlib.Path]
) -> None:
    folder = copy("opt")
    want = load_hf(folder)
    for name in ("config.json", INDEX):
        text = (folder / name).read_text()
        (folder / name).write_text(text, encoding=encoding)
    config, params = load_hf(folder)
    assert config == want[0]
    assert_same(params, want[1])


@pytest.mark.parametrize("name", ["config.json", WHOLE, INDEX])
@pytest.mark.parametrize(
    "content, message",
    [(POINTER, "Git LFS pointer.*git lfs pull"), ("", "empty"), ("{", "damaged")],
)
def test_what_is_not_the_file_is_named(
    name: str, content: str, message: str, copy: Callable[[str], pathlib.Path]
) -> None:
    folder = copy("opt" if name == INDEX else "llama")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"model/{name}: expected .*{message}"):
        load_hf(folder)


def test_what_only_begins_like_a_pointer_is_none(
    copy: Callable[[str], pathlib.Path],
) -> None:
    folder = copy("llama")
    (folder / "config.json").write_text(POINTER[:20])
    with pytest.raises(ValueError, match="config.json: expected JSON, got a damaged"):
        load_hf(folder)


def test_a_part_of_a_file_is_refused_wherever_it_is_cut(
    copy: Callable[[str], pathlib.Path],
) -> None:
    folder = copy("qwen3")
    data = (folder / WHOLE).read_bytes()
    for size in (*range(1, 400, 57), len(data) // 2, len(data) - 1):
        (folder / WHOLE).write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"model/{WHOLE}: .*a damaged one"):
            load_hf(folder)


@pytest.mark.parametrize(
    "dtype, spelled", [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8")]
)
def test_quantized_tensors_are_refused(
    dtype: Any, spelled: str, copy: Callable[[str], pathlib.Path]
) -> None:
    folder = copy("llama")
    tensors = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    store(folder, tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(
        ValueError, match=rf"model/{WHOLE}: {name}: .*got {spelled}: qu"
    ):
        load_hf(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_floats_become_the_dtype_of_the_config(
    dtype: Any, copy: Callable[[str], pathlib.Path]
) -> None:
    folder = copy("llama")
    _, params = load_hf(folder)
    store(folder, {name: t.astype(dtype) for name, t in tensors_of(folder).items()})
    _, loaded = load_hf(folder)
    assert loaded["embed"].dtype == np.float32
    np.testing.assert_array_equal(
        loaded["embed"], params["embed"].astype(dtype).astype(np.float32)
    )


def test_a_transposed_matrix_is_refused_before_any_is_read(
    copy: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("llama")
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    store(folder, tensors | {name: np.ascontiguousarray(tensors[name].T)})
    monkeypatch.setattr("models.hf._Stored.read", lambda stored: 1 / 0)
    message = rf"{name}: expected shape \(32, 48\), got \(48, 32\)"
    with pytest.raises(ValueError, match=message):
        load_hf(folder)
    store(folder, tensors | {name: np.copy(tensors[name][:, 1:])})
    with pytest.raises(ValueError, match=r"\(32, 48\), got \(32, 47\)"):
        load_hf(folder)
    del tensors[name]
    store(folder, tensors)
    with pytest.raises(ValueError, match=rf"{WHOLE}: .*tensor '{name}', got none"):
        load_hf(folder)


def test_of_two_files_with_a_tensor_the_index_chooses(
    copy: Callable[[str], pathlib.Path],
) -> None:
    folder = copy("opt")
    _, params = load_hf(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    one, two = sorted(set(index.values()))
    for part, other in ((one, two), (two, one)):
        tensors = safetensors_numpy.load_file(folder / part)
        stale = {name: np.zeros(3) for name, file in index.items() if file == other}
        safetensors_numpy.save_file(tensors | stale, folder / part)
    assert_same(load_hf(folder)[1], params)


def test_a_wrong_index_does_not_matter_where_the_tensors_are_there(
    copy: Callable[[str], pathlib.Path],
) -> None:
    folder = copy("opt")
    _, params = load_hf(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    one, two = sorted(set(index.values()))
    swapped = {name: one if file == two else two for name, file in index.items()}
    change_json(folder / INDEX, weight_map=swapped)
    assert_same(load_hf(folder)[1], params)
    change_json(folder / INDEX, weight_map={name: one for name in index})
    with pytest.raises(ValueError, match=rf"{INDEX}: .*a tensor '.*', got none"):
        load_hf(folder)
    change_json(folder / INDEX, weight_map=index | {"model.x": "model-3.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"model-3\.safetensors"):
        load_hf(folder)
    for no_map in (None, {}, ["a"]):
        change_json(folder / INDEX, weight_map=no_map)
        with pytest.raises(ValueError, match=rf"{INDEX}: expected a weight_map, got "):
            load_hf(folder)


def test_pickles_are_not_opened(copy: Callable[[str], pathlib.Path]) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("it was unpickled",))

    folder = copy("llama")
    (folder / WHOLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = r"pytorch_model\.bin.*from_pretrained.*save_pretrained"
    with pytest.raises(FileNotFoundError, match=message):
        load_hf(folder)


def test_a_folder_with_a_gguf_file_names_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json: name .*/m\.gguf$"):
        load_hf(tmp_path)


def test_a_missing_size_is_named(copy: Callable[[str], pathlib.Path]) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    for key in ("vocab_size", "num_hidden_layers", "intermediate_size"):
        rest = {name: value for name, value in config.items() if name != key}
        (folder / "config.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=rf"model/config.json: {key}: expected a"):
            load_hf(folder)
    change_json(folder / "config.json", **config | {"hidden_size": None})
    with pytest.raises(ValueError, match=r"model/config.json: hidden_size: expected a"):
        load_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: .*JSON object, got list"):
        load_hf(folder)


OPTIONAL = {
    "llama": ["tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias"],
    "opt": ["tie_word_embeddings", "activation_function", "enable_bias"],
    "qwen3": ["use_sliding_window", "attention_bias"],
}


@pytest.mark.parametrize("family", OPTIONAL)
def test_what_a_config_leaves_out_is_its_familys_default(
    family: str, copy: Callable[[str], pathlib.Path]
) -> None:
    """Llama's embeddings are not tied then, and OPT's are."""
    folder = copy(family)
    want, _ = load_hf(folder)
    settings = json.loads((folder / "config.json").read_text())
    for key in OPTIONAL[family]:
        del settings[key]
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_hf(folder)[0] == want


@pytest.mark.parametrize(
    "said, dtype",
    [
        ({}, "float32"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_dtype_has_an_older_name(
    said: dict[str, str], dtype: str, copy: Callable[[str], pathlib.Path]
) -> None:
    folder = copy("llama")
    settings = json.loads((folder / "config.json").read_text())
    del settings["dtype"]
    (folder / "config.json").write_text(json.dumps(settings | said))
    config, params = load_hf(folder)
    assert config.dtype == params["embed"].dtype.name == dtype


def test_one_whole_file_needs_no_index(copy: Callable[[str], pathlib.Path]) -> None:
    """As for transformers, whatever an index left from its parts says."""
    folder = copy("llama")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    assert len(load_hf(folder)[1]["layers"]) == 2
