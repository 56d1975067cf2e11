"""Makes the folders beside it: tiny models of each family, and what they should say.

An independent implementation (transformers and torch, float32) computes the logits and
the greedy tokens, so that tests/models/test_hf.py compares ours with theirs. Neither
package is a dependency; to make the folders anew, in an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 safetensors tokenizers
    python tests/models/golden/make_hf_golden.py
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = pathlib.Path(__file__).parent
VOCAB = 257  # every byte, and the end of a text
PROMPT = "def add(a, b):\n    return a"
NEW_TOKENS = 24
# With these the outputs vary, and the best two logits are never close.
SEEDS = {"llama": 0, "opt": 1, "qwen3": 5}

MODELS = {
    # Grouped queries, an untied unembedding, an unusual base of the frequencies.
    "llama": LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
        )
    ),
    "opt": OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
        )
    ),
    # Heads wider than hidden_size / heads.
    "qwen3": Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        )
    ),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every weight is drawn large enough that leaving it out or swapping it shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.5 * noise
        elif weight.ndim == 1:
            value = 0.1 * noise
        else:
            # [out, in]; queries pick out a few keys only with a larger gain.
            gain = 3.0 if "q_proj" in name or "q_norm" in name else 1.0
            value = gain * noise * weight.shape[-1] ** -0.5
        # bfloat16's numbers: one model is stored so.
        weight.data = value.to(torch.bfloat16).float()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "<|end|>"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@torch.no_grad()
def golden(model: torch.nn.Module, prompt: list[int]) -> dict[str, np.ndarray | float]:
    """Logits of the prompt, and the greedy tokens, each by a pass without a cache."""
    model.eval()
    ids, margin = list(prompt), float("inf")
    for _ in range(NEW_TOKENS):
        last = model(torch.tensor([ids])).logits[0, -1]
        first, second = last.topk(2).values.tolist()
        margin = min(margin, first - second)
        ids.append(int(last.argmax()))
    logits = model(torch.tensor([prompt])).logits[0]
    return {
        "prompt": np.array(prompt, np.int32),
        "logits": logits.numpy(),
        "greedy": np.array(ids[len(prompt) :], np.int32),
        "min_top2_margin": margin,
    }


def main() -> None:
    tokenizer = byte_tokenizer()
    for name, model in MODELS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        randomize(model, SEEDS[name])
        results = golden(model, tokenizer.encode(PROMPT))
        print(name, results["min_top2_margin"], results["greedy"].tolist())
        # One in bfloat16, one in several files with an index, one plain.
        if name == "qwen3":
            model.to(torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="60KB" if name == "opt" else "1GB")
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", **results)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
