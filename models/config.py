"""Models by name. No JAX."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from models.mixtures import MIXTURES
from models.model_config import ModelConfig, Widths
from models.named import find_named
from models.rope import read_scaling

__all__ = ["PRESETS", "ModelConfig", "Widths", "get_config", "get_engine_config"]


def _opt(name: str, layers: int, embed: int, heads: int) -> ModelConfig:
    """Describe an OPT of Zhang et al. (arXiv 2205.01068), Table 1.

    The rest is from facebook/opt-*, config.json. The weights were published in float16;
    bfloat16 is our half precision.
    """
    return ModelConfig(
        name=name,
        vocab_size=50_272,
        layers=layers,
        embed=embed,
        q_heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=4 * embed,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_length=2048,
        dtype="bfloat16",
        norm="layer",
        positions="learned",
        mlp_kind="relu",
        biases=True,
    )


def _llama(
    name: str,
    layers: int,
    embed: int,
    heads: tuple[int, int],
    mlp: int,
    vocab_size: int,
    max_length: int,
    *,
    norm_eps: float = 1e-5,
    rope_theta: float = 10_000.0,
) -> ModelConfig:
    """Describe a Llama with heads of 128; `heads` are (q_heads, kv_heads)."""
    return ModelConfig(
        name=name,
        vocab_size=vocab_size,
        layers=layers,
        embed=embed,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        mlp=mlp,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
        tie_embeddings=False,
        max_length=max_length,
        dtype="bfloat16",
    )


def _llama_3_1(name: str, layers: int, embed: int, heads: int, mlp: int) -> ModelConfig:
    """Describe Hugging Face meta-llama/Llama-3.1-*, config.json."""
    theta, length = 5e5, 131_072
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama = _llama(
        name, layers, embed, (heads, 8), mlp, 128_256, length, rope_theta=theta
    )
    divisors = read_scaling(scaling, llama.head_dim, theta).divisors
    return dataclasses.replace(llama, rope_divisors=divisors)


def _qwen3(
    name: str, layers: int, embed: int, q_heads: int, mlp: int, tie_embeddings: bool
) -> ModelConfig:
    """Describe Hugging Face Qwen/Qwen3-*, config.json."""
    heads, vocab_size, length = (q_heads, 8), 151_936, 40_960
    llama = _llama(name, layers, embed, heads, mlp, vocab_size, length, rope_theta=1e6)
    return dataclasses.replace(
        llama, norm_eps=1e-6, tie_embeddings=tie_embeddings, qk_norm=True
    )


# Random weights. 264 = 256 bytes + 8 specials, see `ByteTokenizer`. Every width
# divides by 4, so that it can be sharded 2 and 4 ways in tests.
_TINY = ModelConfig(
    name="tiny",
    vocab_size=264,
    layers=2,
    embed=128,
    q_heads=8,
    kv_heads=4,
    head_dim=16,
    mlp=256,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_length=1024,
    dtype="float32",
)

_ALL = (
    _TINY,
    # The other families at the same sizes, for tests.
    dataclasses.replace(
        _TINY,
        name="tiny-opt",
        kv_heads=8,
        tie_embeddings=True,
        norm="layer",
        positions="learned",
        mlp_kind="relu",
        biases=True,
    ),
    # Qwen3's heads are wider than embed / q_heads.
    dataclasses.replace(_TINY, name="tiny-qwen3", head_dim=32, qk_norm=True),
    # Random weights. Large enough that a step's time on a CPU is work, not overhead.
    dataclasses.replace(
        _TINY,
        name="m32",
        layers=4,
        embed=256,
        kv_heads=8,
        head_dim=32,
        mlp=1024,
        tie_embeddings=True,
        max_length=512,
    ),
    # Much KV for its weights: 32 KiB a token, as 8 layers of Llama-3-8B in bfloat16.
    dataclasses.replace(
        _TINY,
        name="kv",
        vocab_size=512,
        layers=8,
        embed=256,
        kv_heads=8,
        head_dim=64,
        mlp=512,
        tie_embeddings=True,
        max_length=4096,
    ),
    # Hugging Face HuggingFaceTB/SmolLM2-135M-Instruct, config.json. float32, because
    # bfloat16 is about 6 times slower on a CPU.
    dataclasses.replace(
        _llama("smollm2-135m", 30, 576, (9, 3), 1536, 49_152, 8192, rope_theta=1e5),
        head_dim=64,
        tie_embeddings=True,
        dtype="float32",
    ),
    _opt("opt-125m", 12, 768, 12),
    # These three are DistServe's; the weights of the last are not public.
    _opt("opt-13b", 40, 5120, 40),
    _opt("opt-66b", 64, 9216, 72),
    _opt("opt-175b", 96, 12_288, 96),
    # Brown et al. (arXiv 2005.14165), Table 2.1; GPT-2's vocabulary. For simulation:
    # its GELU stands as a ReLU here, which costs as much.
    dataclasses.replace(_opt("gpt3-175b", 96, 12_288, 96), vocab_size=50_257),
    # Touvron et al. (arXiv 2302.13971), Table 2; Hugging Face huggyllama/llama-13b and
    # -30b (the paper's 33B), config.json.
    _llama("llama-13b", 40, 5120, (40, 40), 13_824, 32_000, 2048, norm_eps=1e-6),
    _llama("llama-33b", 60, 6656, (52, 52), 17_920, 32_000, 2048, norm_eps=1e-6),
    # Hugging Face meta-llama/Llama-2-13b-hf and -70b-hf, Meta-Llama-3-8B and -70B,
    # mistralai/Mistral-7B-Instruct-v0.2 and 01-ai/Yi-34B, config.json.
    _llama("llama-2-13b", 40, 5120, (40, 40), 13_824, 32_000, 4096),
    _llama("llama-2-70b", 80, 8192, (64, 8), 28_672, 32_000, 4096),
    _llama("llama-3-8b", 32, 4096, (32, 8), 14_336, 128_256, 8192, rope_theta=5e5),
    _llama("llama-3-70b", 80, 8192, (64, 8), 28_672, 128_256, 8192, rope_theta=5e5),
    # Hugging Face meta-llama/Llama-3.1-8B and -70B, and Llama-3.3-70B-Instruct, which
    # is as large as the latter.
    _llama_3_1("llama-3.1-8b", 32, 4096, 32, 14_336),
    _llama_3_1("llama-3.1-70b", 80, 8192, 64, 28_672),
    _llama_3_1("llama-3.3-70b", 80, 8192, 64, 28_672),
    _llama("mistral-7b", 32, 4096, (32, 8), 14_336, 32_000, 32_768, rope_theta=1e6),
    _llama("yi-34b", 60, 7168, (56, 8), 20_480, 64_000, 4096, rope_theta=5e6),
    # Hugging Face tiiuae/falcon-180B, config.json. For simulation: its blocks run
    # attention and MLP side by side, with a GELU, which costs as much.
    dataclasses.replace(
        _llama("falcon-180b", 80, 14_848, (232, 8), 4 * 14_848, 65_024, 2048),
        head_dim=64,
        tie_embeddings=True,
        norm="layer",
        mlp_kind="relu",
    ),
    _qwen3("qwen3-0.6b", 28, 1024, 16, 3072, tie_embeddings=True),
    _qwen3("qwen3-8b", 36, 4096, 32, 12_288, tie_embeddings=False),
    _qwen3("qwen3-32b", 64, 5120, 64, 25_600, tie_embeddings=False),
    *MIXTURES,
)
PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType(
    {config.name: config for config in _ALL}
)


def get_config(name: str, presets: Mapping[str, ModelConfig] = PRESETS) -> ModelConfig:
    """Return the model of that name.

    Args:
      name: a key of `presets`, or what `find_named` finds.

    Raises:
      ValueError: naming the presets, if there is no such model.
    """
    return find_named(
        name,
        presets,
        kind="model",
        what="a ModelConfig",
        is_one=lambda found: isinstance(found, ModelConfig),
    )


def get_engine_config(name: str) -> ModelConfig:
    """Return the model of that name, for the engine.

    Raises:
      ValueError: as `get_config`, or if the model is not dense.
    """
    config = get_config(name)
    config.require_dense()
    return config
