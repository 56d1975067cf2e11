"""The sizes of a decoder-only transformer that its step time depends on."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from disagg_jax.errors import require

_FLAGS = ("gated_mlp", "tie_embeddings")
_FRACTIONS = ("weight_dtype_bytes", "table_dtype_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model as a cost model sees it: matrices, heads, bytes.

    Biases, norms and learned positions are left out: under 0.1 % of the weights of
    each preset.

    Raises:
      ValueError: if a size is not positive or q_heads is no multiple of kv_heads.
    """

    name: str
    layers: int
    embed: int  # width of the residual stream
    q_heads: int  # query heads; a multiple of kv_heads
    kv_heads: int  # key and value heads
    head_dim: int
    mlp: int  # hidden width of the MLP
    gated_mlp: bool  # three matrices (SwiGLU) or two
    vocab: int  # tokens with an embedding and a logit
    tie_embeddings: bool  # whether the embedding also serves as the unembedding
    weight_dtype_bytes: float = 2  # of one weight: 2 is float16 or bfloat16, 1 is int8
    kv_dtype_bytes: int = 2  # of one cached key or value element
    activation_dtype_bytes: int = 2  # of what devices exchange within a step
    # Of a weight of the embedding and of the unembedding, which methods of quantisation
    # leave alone; None: weight_dtype_bytes.
    table_dtype_bytes: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _FRACTIONS:
                require(
                    value is None or value > 0, f"{field.name}: expected > 0", value
                )
            elif field.name != "name" and field.name not in _FLAGS:
                require(value >= 1, f"{field.name}: expected >= 1", value)
        expected = f"q_heads: expected a multiple of kv_heads={self.kv_heads}"
        require(self.q_heads % self.kv_heads == 0, expected, self.q_heads)

    @property
    def layer_params(self) -> int:
        """Weights in the linear layers of one block."""
        heads = 2 * self.q_heads + 2 * self.kv_heads  # query, output, key, value
        attention = self.embed * heads * self.head_dim
        return attention + (3 if self.gated_mlp else 2) * self.embed * self.mlp

    @property
    def table_params(self) -> int:
        """Weights of the embedding; the unembedding has as many."""
        return self.embed * self.vocab

    @property
    def params(self) -> int:
        """Weights of the whole model; a tied embedding counts once."""
        tables = 1 if self.tie_embeddings else 2
        return self.layers * self.layer_params + tables * self.table_params

    @property
    def layer_bytes(self) -> float:
        """Bytes of the weights in one block."""
        return self.layer_params * self.weight_dtype_bytes

    @property
    def table_bytes(self) -> float:
        """Bytes of the embedding; the unembedding has as many."""
        width = self.table_dtype_bytes
        return self.table_params * (self.weight_dtype_bytes if width is None else width)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights; a tied embedding counts once."""
        tables = 1 if self.tie_embeddings else 2
        return self.layers * self.layer_bytes + tables * self.table_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in the cache, all layers."""
        return self.layers * self.layer_kv_bytes_per_token

    @property
    def layer_kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in one layer's cache."""
        return 2 * self.kv_heads * self.head_dim * self.kv_dtype_bytes


def _opt(name: str, layers: int, embed: int, heads: int) -> ModelShape:
    """An OPT model: multi-head attention, an MLP of 4 x embed, a tied embedding.

    Shapes: Zhang et al., "OPT: Open Pre-trained Transformer Language Models"
    (arXiv 2205.01068), Table 1; vocabulary: Hugging Face facebook/opt-*, config.json.
    """
    return ModelShape(
        name=name,
        layers=layers,
        embed=embed,
        q_heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=4 * embed,
        gated_mlp=False,
        vocab=50_272,
        tie_embeddings=True,
    )


def _llama(
    name: str, layers: int, embed: int, heads: tuple[int, int], mlp: int, vocab: int
) -> ModelShape:
    """A Llama model with heads of 128; `heads` are (q_heads, kv_heads)."""
    return ModelShape(
        name=name,
        layers=layers,
        embed=embed,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        mlp=mlp,
        gated_mlp=True,
        vocab=vocab,
        tie_embeddings=False,
    )


_ALL = (
    _opt("opt-13b", 40, 5120, 40),
    _opt("opt-66b", 64, 9216, 72),
    _opt("opt-175b", 96, 12_288, 96),
    # Brown et al. (arXiv 2005.14165), Table 2.1; GPT-2's vocabulary.
    dataclasses.replace(_opt("gpt3-175b", 96, 12_288, 96), vocab=50_257),
    # Touvron et al. (arXiv 2302.13971), Table 2; Hugging Face huggyllama/llama-13b and
    # -30b, config.json (the paper's 33B), for the MLP.
    _llama("llama-13b", 40, 5120, (40, 40), 13_824, 32_000),
    _llama("llama-33b", 60, 6656, (52, 52), 17_920, 32_000),
    # Hugging Face meta-llama/Llama-2-13b-hf and -70b-hf, config.json.
    _llama("llama-2-13b", 40, 5120, (40, 40), 13_824, 32_000),
    _llama("llama-2-70b", 80, 8192, (64, 8), 28_672, 32_000),
    # Hugging Face meta-llama/Meta-Llama-3-8B and -70B, config.json.
    _llama("llama-3-8b", 32, 4096, (32, 8), 14_336, 128_256),
    _llama("llama-3-70b", 80, 8192, (64, 8), 28_672, 128_256),
    # Hugging Face mistralai/Mistral-7B-Instruct-v0.2 and 01-ai/Yi-34B, config.json.
    _llama("mistral-7b", 32, 4096, (32, 8), 14_336, 32_000),
    _llama("yi-34b", 60, 7168, (56, 8), 20_480, 64_000),
    # Hugging Face tiiuae/falcon-180B, config.json.
    ModelShape(
        name="falcon-180b",
        layers=80,
        embed=14_848,
        q_heads=232,
        kv_heads=8,
        head_dim=64,
        mlp=4 * 14_848,
        gated_mlp=False,
        vocab=65_024,
        tie_embeddings=True,
    ),
    # Hugging Face HuggingFaceTB/SmolLM2-135M-Instruct, config.json.
    ModelShape(
        name="smollm2-135m",
        layers=30,
        embed=576,
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        gated_mlp=True,
        vocab=49_152,
        tie_embeddings=True,
    ),
)
MODEL_SHAPES: Mapping[str, ModelShape] = types.MappingProxyType(
    {shape.name: shape for shape in _ALL}
)


def get_model_shape(name: str) -> ModelShape:
    """The preset called `name`.

    Raises:
      ValueError: naming the presets, if there is none of that name.
    """
    known = sorted(MODEL_SHAPES)
    require(name in MODEL_SHAPES, f"model: expected one of {known}", name)
    return MODEL_SHAPES[name]
