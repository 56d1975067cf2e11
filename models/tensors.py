"""The weights of a model from the tensors of a file, by Hugging Face's names. No JAX.

The structure of the weights is described in `models.transformer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models.config import ModelConfig

Take = Callable[..., np.ndarray]  # take(name, *shape): a tensor of that shape


def check_tensors(
    where: object,
    build: Callable[[Take], object],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that a file has the tensors that `build` takes, and no others.

    Args:
      where: the file or folder, for the error.
      build: makes the weights of a model from tensors that it takes.
      shapes: of the file's tensors, by name.

    Raises:
      ValueError: naming the tensor that is missing, misshapen or not expected.
    """
    left = dict(shapes)

    def take(name: str, *shape: int) -> np.ndarray:
        got = left.pop(name, None)
        if got is None:
            raise ValueError(
                f"{where}: expected a tensor '{name}', got none: it is another model's "
                "or incomplete; get it again"
            )
        if got != shape:
            raise ValueError(f"{where}: {name}: expected shape {shape}, got {got}")
        return np.broadcast_to(np.float32(0), shape)  # of any size, 4 bytes

    build(take)
    if left:
        raise ValueError(
            f"{where}: expected the tensors of its config only, got also "
            f"{sorted(left)[:5]}"
        )


def llama_params(config: ModelConfig, take: Take) -> dict[str, Any]:
    """Build the weights of a Llama or Qwen3 from its tensors."""
    E, F = config.embed, config.mlp

    def layer(i: int) -> dict[str, Any]:
        at = f"model.layers.{i}"
        return {
            "attention_norm": {"scale": take(f"{at}.input_layernorm.weight", E)},
            "attention": _attention(config, take, f"{at}.self_attn", out="o_proj"),
            "mlp_norm": {"scale": take(f"{at}.post_attention_layernorm.weight", E)},
            "mlp": {
                "w_gate": take(f"{at}.mlp.gate_proj.weight", F, E).T,
                "w_up": take(f"{at}.mlp.up_proj.weight", F, E).T,
                "w_down": take(f"{at}.mlp.down_proj.weight", E, F).T,
            },
        }

    return {
        "embed": take("model.embed_tokens.weight", config.vocab_size, E),
        "layers": [layer(i) for i in range(config.layers)],
        "final_norm": {"scale": take("model.norm.weight", E)},
        **_unembed(config, take),
    }


def opt_params(config: ModelConfig, take: Take) -> dict[str, Any]:
    """Build the weights of an OPT from its tensors."""
    E, F = config.embed, config.mlp

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": take(f"{name}.weight", E), "bias": take(f"{name}.bias", E)}

    def layer(i: int) -> dict[str, Any]:
        at = f"model.decoder.layers.{i}"
        return {
            "attention_norm": norm(f"{at}.self_attn_layer_norm"),
            "attention": _attention(config, take, f"{at}.self_attn", out="out_proj"),
            "mlp_norm": norm(f"{at}.final_layer_norm"),
            "mlp": {
                "w_up": take(f"{at}.fc1.weight", F, E).T,
                "b_up": take(f"{at}.fc1.bias", F),
                "w_down": take(f"{at}.fc2.weight", E, F).T,
                "b_down": take(f"{at}.fc2.bias", E),
            },
        }

    at = "model.decoder"
    # Position p is row p + 2: the first two rows are for padding, which we never embed.
    positions = take(f"{at}.embed_positions.weight", config.max_length + 2, E)[2:]
    return {
        "embed": take(f"{at}.embed_tokens.weight", config.vocab_size, E),
        "positions": positions,
        "layers": [layer(i) for i in range(config.layers)],
        "final_norm": norm(f"{at}.final_layer_norm"),
        **_unembed(config, take),
    }


def _unembed(config: ModelConfig, take: Take) -> dict[str, np.ndarray]:
    if config.tie_embeddings:
        return {}
    return {"unembed": take("lm_head.weight", config.vocab_size, config.embed).T}


def _attention(
    config: ModelConfig, take: Take, at: str, *, out: str
) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
    """Transpose from files' [out, in] with flat heads to our [in, out]."""
    E, N, K, H = config.embed, config.q_heads, config.kv_heads, config.head_dim
    heads = {"q": N, "k": K, "v": K}
    weights: dict[str, Any] = {
        f"w{x}": take(f"{at}.{x}_proj.weight", n * H, E).T.reshape(E, n, H)
        for x, n in heads.items()
    }
    weights["wo"] = take(f"{at}.{out}.weight", E, N * H).T.reshape(N, H, E)
    if config.biases:
        for x, n in heads.items():
            weights[f"b{x}"] = take(f"{at}.{x}_proj.bias", n * H).reshape(n, H)
        weights["bo"] = take(f"{at}.{out}.bias", E)
    if config.qk_norm:
        for x in "qk":
            weights[f"{x}_norm"] = {"scale": take(f"{at}.{x}_norm.weight", H)}
    return weights
