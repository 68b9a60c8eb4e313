"""What memory keys and values take: of a token, of a context, of a server's cache.

No other module reckons with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTEXT = 8192  # tokens that memory is reckoned for unless told otherwise
SERVER_CACHE = 2 << 30  # bytes for all of a server's requests unless told otherwise


@dataclass(frozen=True)
class TokenShape:
    """What a model keeps of one token: key_width + value_width numbers for each of num_heads in
    num_layers.

    Latent attention (DeepSeek) has one head for all: its key is the latent, its value what rotates
    of the keys.
    Layers of linear attention keep a state of fixed size, which is not counted.
    """

    num_layers: int
    num_heads: int
    key_width: int
    value_width: int

    def num_bytes(self, element_bytes: int, tokens: int = 1, more: int = 0) -> int:
        """Of so many tokens. more : elements that a key takes beside its numbers, and a value."""
        widths = sum(width + more for width in (self.key_width, self.value_width) if width)
        return tokens * self.num_layers * self.num_heads * widths * element_bytes

    @classmethod
    def of_config(cls, text: Mapping[str, Any]) -> TokenShape:
        """From the part of a config.json that tells of the language model."""

        def number(name: str) -> int:
            return int(text.get(name) or 0)

        layers, heads = number("num_hidden_layers"), number("num_attention_heads")
        kinds = text.get("layer_types")
        if isinstance(kinds, list):
            kept = kinds[:layers]  # some list the layers of multi-token prediction too
            layers = sum("linear" not in str(kind) and "mamba" not in str(kind) for kind in kept)
        if rank := number("kv_lora_rank"):
            return cls(layers, 1, rank, number("qk_rope_head_dim"))
        width = number("head_dim") or number("hidden_size") // max(heads, 1)
        return cls(layers, number("num_key_value_heads") or heads, width, width)

    @classmethod
    def of_gguf(cls, metadata: Mapping[str, Any], num_layers: int) -> TokenShape:
        """From a GGUF file's key-values. num_layers : without those of multi-token prediction."""
        heads = gguf_number(metadata, "attention.head_count")
        if rank := gguf_number(metadata, "attention.kv_lora_rank"):
            return cls(num_layers, 1, rank, gguf_number(metadata, "rope.dimension_count"))
        width = gguf_number(metadata, "embedding_length") // max(heads, 1)
        return cls(
            num_layers,
            gguf_number(metadata, "attention.head_count_kv", heads),
            gguf_number(metadata, "attention.key_length", width),
            gguf_number(metadata, "attention.value_length", width),
        )


def gguf_number(metadata: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A number of the file's own architecture; of one for each layer the largest decides."""
    value = metadata.get(f"{metadata['general.architecture']}.{key}", default)
    if isinstance(value, list):
        value = max(value, default=default)
    return int(value)


def context_tokens(longest: int, asked: int | None) -> int:
    """Tokens of one sequence that memory is reckoned for. longest : the model's, 0 if it does not
    say.

    Raises ValueError if more are asked for than the model takes, or none.
    """
    if asked is None:
        return min(longest or CONTEXT, CONTEXT)
    if asked < 1 or (longest and asked > longest):
        raise ValueError(f"context={asked}: must be 1 to {longest}, the model's longest")
    return asked


def server_cache(one_context: int, free: int) -> int:
    """Bytes for the cache of a server that nobody gave a size: at most a quarter of the free ones,
    but one whole context.

    one_context : bytes of the keys and values of one sequence. free : bytes, 0 if the system does
        not tell.
    """
    # A quarter more: latent attention's values are stored as wide as its keys.
    return max(min(SERVER_CACHE, free // 4 or SERVER_CACHE), min(one_context * 5 // 4, free))
