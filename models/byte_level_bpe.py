"""GPT-2's byte-level BPE, as GGUF files of kind `gpt2` describe it.

A file names its rule for splitting a text before merging, and does not contain it. The
rules here come from the tokenizer.json files of the published models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.gguf import added_token, metadata

if TYPE_CHECKING:
    import gguf
    import tokenizers
    from tokenizers import pre_tokenizers

# Values of `tokenizer.ggml.token_type`: tokens that text must spell out exactly.
_CONTROL, _USER_DEFINED = 3, 4

# Words with the sign or space before each, numbers, signs with the line ends behind
# each, white space. meta-llama/Meta-Llama-3-8B and Qwen/Qwen2-7B, tokenizer.json.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _WORDS % "{1,3}",
    "llama-v3": _WORDS % "{1,3}",
    "llama3": _WORDS % "{1,3}",
    "qwen2": _WORDS % "",
}
KINDS = ("smollm", *_SPLITS)


def read_byte_level_bpe(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """Read the tokenizer of a GGUF file whose `tokenizer.ggml.pre` is in `KINDS`.

    `smollm` was compared with llama.cpp on 26 texts, equal on all.

    Raises:
      ValueError: if the tokens, their types and merges do not fit each other.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pre = metadata(reader, "tokenizer.ggml.pre")
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    merges = metadata(reader, "tokenizer.ggml.merges")
    is_llama = pre.startswith("llama")
    try:
        bpe = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in merges],
                ignore_merges=is_llama,  # a word that is a token stays one
            )
        )
    except Exception as error:  # of no narrower class
        raise ValueError(f"tokenizer.ggml.merges: {error}") from error
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = _splitter(pre)
    bpe.decoder = decoders.ByteLevel()
    _add_specials(bpe, tokens, metadata(reader, "tokenizer.ggml.token_type", []))
    _add_ends(bpe, reader, add_bos=is_llama)
    return bpe


def _splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if pre == "smollm":  # every digit alone, then GPT-2's pattern
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=pre == "smollm"
    )
    return pre_tokenizers.Sequence([first, to_bytes])


def _add_specials(
    bpe: tokenizers.Tokenizer, tokens: list[str], types: list[int]
) -> None:
    from tokenizers import AddedToken

    if types and len(types) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type: expected {len(tokens)}, got {len(types)}"
        )
    bpe.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )


def _add_ends(
    bpe: tokenizers.Tokenizer, reader: gguf.GGUFReader, *, add_bos: bool
) -> None:
    """Add the tokens that every text begins and ends with."""
    from tokenizers import processors

    def added(end: str, default: bool) -> list[tuple[str, int]]:
        ids = added_token(reader, end, bpe.get_vocab_size(), default=default)
        return [(token, id) for id in ids if (token := bpe.id_to_token(id))]

    before, after = added("bos", add_bos), added("eos", False)
    if before or after:
        bpe.post_processor = processors.TemplateProcessing(
            single=[*(t for t, _ in before), "$A", *(t for t, _ in after)],
            special_tokens=[*{*before, *after}],
        )
