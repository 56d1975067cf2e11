"""Weights of every kind are found, checked against the preset and converted."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from experiments import goodput_sweep
from experiments.configs.named import smoke, tiny
from experiments.configs.override import override
from experiments.convert_checkpoint import convert
from experiments.sweep.serving import load_model
from models import checkpoint
from models.checkpoint import Checkpoint
from models.config import get_config
from models.hf import load_hf
from models.load import find_weights, read_weights
from models.tokenizer import ByteTokenizer
from tests.engine.harness import random_params

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

GOLDEN = pathlib.Path(__file__).parents[2] / "models" / "golden"


def load(weights, model="auto"):
    config = dataclasses.replace(tiny(), weights=str(weights), model=model)
    return load_model(config)


def on_device(i):
    return SingleDeviceSharding(jax.devices()[i])


def same(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_a_folder_and_its_checkpoint_are_the_same_model(family, tmp_path):
    folder = load(GOLDEN / family)
    converted = convert(GOLDEN / family, tmp_path / "checkpoint")
    model = load(tmp_path / "checkpoint")
    assert isinstance(model.params, Checkpoint)
    assert model.config == folder.config == converted.config
    jax.tree.map(same, folder.params, model.params.restore(on_device(3)))
    for tokenizer in (folder.tokenizer, model.tokenizer):
        assert tokenizer.encode("a b") == [64, 220, 65]
        assert tokenizer.eos_tokens[0] == 256


def test_a_checkpoint_keeps_scaled_frequencies(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "scaled")
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_parameters"] |= {"rope_type": "linear", "factor": 2.5}
    (folder / "config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint").config
    assert loaded == load(folder).config
    assert loaded.rope_divisors == (2.5,) * 4
    hash(loaded)  # as what is compiled for it needs


def test_a_folder_is_cast_to_the_preset_and_checked(monkeypatch):
    stored, _ = load_hf(GOLDEN / "qwen3")
    preset = dataclasses.replace(stored, name="preset", dtype="float32")
    monkeypatch.setattr("models.load.get_engine_config", lambda name: preset)
    model = load(GOLDEN / "qwen3", "preset")
    assert stored.dtype == "bfloat16" and model.config == preset
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(model.params)}
    assert dtypes == {"float32"}
    with pytest.raises(ValueError, match="expected those of preset.*'llama'.*auto"):
        load(GOLDEN / "llama", "preset")


def test_a_checkpoint_is_restored_to_the_dtype_of_the_preset(tmp_path):
    preset = get_config("tiny")
    half = dataclasses.replace(preset, dtype="bfloat16")
    params = random_params(half)
    checkpoint.save(tmp_path / "half", half, params)
    model = load(tmp_path / "half", "tiny")
    assert isinstance(model.tokenizer, ByteTokenizer)
    assert isinstance(model.params, Checkpoint)
    restored = model.params.restore(on_device(0))
    jax.tree.map(same, restored, jax.tree.map(lambda x: x.astype("float32"), params))


def test_the_checkpoint_of_tiny_has_its_name(tmp_path, monkeypatch):
    """Elsewhere a folder of a preset's name is a folder like any other."""
    assert find_weights("auto", "tiny") == find_weights("tiny", "trained")
    assert read_weights(find_weights("auto", "tiny"))[0] == get_config("tiny")
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "m32"):
        (tmp_path / name).mkdir()
    assert find_weights("auto", "m32").resolve() == tmp_path / "m32"
    assert find_weights("auto", "./tiny").resolve() == tmp_path / "tiny"
    with pytest.raises(FileNotFoundError, match="trained/m32'"):
        find_weights("m32", "trained")


def test_whatever_a_model_with_random_weights_generates_has_a_text():
    model = load("random", "kv")
    assert model.config.vocab_size == 512
    assert model.tokenizer.decode([104, 105, 511]) == "hi"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected random, trained.*/nowhere'"):
        load("/nowhere")
    with pytest.raises(FileNotFoundError, match="config.json: .*hf download"):
        load(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="experiments.convert_checkpoint"):
        load(tmp_path)
    with pytest.raises(ValueError, match="expected a preset for weights=random"):
        load("random")


def test_a_checkpoint_is_not_overwritten(tmp_path):
    convert(GOLDEN / "llama", tmp_path / "a")
    before = (tmp_path / "a" / "model.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="a new folder, got"):
        convert(GOLDEN / "opt", tmp_path / "a")
    with pytest.raises(ValueError, match="already exists"):
        checkpoint.save(tmp_path / "a", *load_hf(GOLDEN / "opt"))
    assert (tmp_path / "a" / "model.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another kind"):
        convert(tmp_path / "a", tmp_path / "b")


def test_a_folder_without_a_tokenizer_is_refused_before_any_work(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a tokenizer at"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_config_is_readable(tmp_path):
    made = convert(GOLDEN / "opt", tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "model.json").read_text())
    assert fields == dataclasses.asdict(made.config)
    assert fields["positions"] == "learned"


def without_tokenizer(folder, **config):
    """A copy of the smallest Llama; some keys of its config.json are changed."""
    shutil.copytree(GOLDEN / "llama", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def test_random_prompts_need_no_tokenizer(tmp_path):
    """The end token is in config.json; a text cannot be encoded, nor is one written."""
    folder = without_tokenizer(tmp_path / "model", eos_token_id=[7, 9])
    assert load(folder).tokenizer.eos_tokens == (7, 9)
    changes = [
        "model=auto",
        f"weights={folder}",
        "rates=50",
        "num_seeds=1",
        "durations=modelled",
        "workload.num_requests=2",
        "workload.prompt_tokens=fixed:5",
        "workload.output_tokens=fixed:3",
        "memory.max_context=32",
        "memory.tokens_per_device=256",
        "systems.vllm_v0.policies.colocated.max_seqs=2",
        "systems.vllm_v0.policies.colocated.max_batched_tokens=32",
    ]
    one = dataclasses.replace(smoke(), systems={"vllm_v0": smoke().systems["vllm_v0"]})
    config = override(one, changes)
    goodput_sweep.run(config, tmp_path / "run", None)
    lines = (tmp_path / "run" / "requests.jsonl").read_text().splitlines()
    assert len(lines) == 2 and not any("text" in json.loads(line) for line in lines)
    with pytest.raises(FileNotFoundError, match="a tokenizer at .*/model/tokenizer.j"):
        load(folder).tokenizer.encode("text")


def test_a_gguf_file_becomes_a_checkpoint_with_its_tokenizer(tmp_path):
    pytest.importorskip("gguf")
    from tests.models.gguf_files import SIZES, llama_tensors, write_gguf

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581a"]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * len(tokens),
        "token_type": [2, 3, 3, *[6] * 256, 1],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 5,
    }
    file = write_gguf(
        tmp_path / "m.gguf",
        SIZES | {f"tokenizer.ggml.{key}": value for key, value in keys.items()},
        llama_tensors(vocab=len(tokens)),
    )
    convert(file, tmp_path / "checkpoint")
    from_file, restored = load(file), load(tmp_path / "checkpoint")
    assert restored.config == from_file.config
    assert restored.tokenizer == from_file.tokenizer
    assert restored.tokenizer.encode("a") == [1, 259]
    assert restored.tokenizer.eos_tokens == (2, 5)


def test_a_damaged_config_of_a_checkpoint_is_named(tmp_path):
    convert(GOLDEN / "llama", tmp_path / "a")
    path = tmp_path / "a" / "model.json"
    fields = json.loads(path.read_text())
    for damaged, message in (
        ("{", "damaged file"),
        (json.dumps({k: v for k, v in fields.items() if k != "mlp"}), "'mlp'"),
        (json.dumps(fields | {"experts": 8}), "'experts'"),
        (json.dumps(fields | {"layers": 0}), "layers: expected > 0, got 0"),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"model.json: .*{message}"):
            load(tmp_path / "a")


@pytest.mark.parametrize(
    "change", [{"mlp": 50}, {"layers": 3}, {"qk_norm": True}, {"tie_embeddings": True}]
)
def test_a_checkpoint_of_other_weights_is_refused_before_any_work(change, tmp_path):
    """Orbax would say so at the first instance, in pages."""
    convert(GOLDEN / "llama", tmp_path / "a")
    path = tmp_path / "a" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="a/params: expected the weights of llama"):
        load(tmp_path / "a")
