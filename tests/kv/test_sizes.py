"""What keys and values take, from what a config.json or a GGUF file says,
and how much of it a server gets.
"""

from __future__ import annotations

from typing import Any

import pytest

from ktk.kv.pages import PAGE, Pages, pages_beyond
from ktk.kv.sizes import CONTEXT, SERVER_CACHE, TokenShape, context_tokens, server_cache

GROUPED: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 256}


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (6, 8, 32, 32)),
        ({"num_key_value_heads": 2}, (6, 2, 32, 32)),
        ({"num_key_value_heads": 2, "head_dim": 48}, (6, 2, 48, 48)),
        ({"head_dim": None, "num_key_value_heads": None}, (6, 8, 32, 32)),
        ({"kv_lora_rank": 64, "qk_rope_head_dim": 16, "head_dim": 48}, (6, 1, 64, 16)),
        # Linear attention keeps no keys; layers of multi-token prediction at the end are not
        # loaded.
        ({"layer_types": ["linear_attention", "full_attention"] * 4}, (3, 8, 32, 32)),
        ({"layer_types": ["mamba", "sliding_attention", "attention"] * 2}, (4, 8, 32, 32)),
    ],
)
def test_a_configs_shape(fields: dict[str, Any], shape: tuple[int, ...]) -> None:
    found = TokenShape.of_config({**GROUPED, **fields})
    assert found == TokenShape(*shape)
    layers, heads, key, value = shape
    assert found.num_bytes(2, tokens=10) == 10 * layers * heads * (key + value) * 2


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({}, (6, 8, 32, 32)),
        ({"attention.head_count_kv": 2}, (6, 2, 32, 32)),
        ({"attention.head_count_kv": [0, 2, 2]}, (6, 2, 32, 32)),
        ({"attention.key_length": 48, "attention.value_length": 24}, (6, 8, 48, 24)),
        ({"attention.kv_lora_rank": 64, "rope.dimension_count": 16}, (6, 1, 64, 16)),
    ],
)
def test_a_gguf_files_shape(keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    keys = {"attention.head_count": 8, "embedding_length": 256, **keys}
    metadata = {f"tiny.{key}": value for key, value in keys.items()}
    assert TokenShape.of_gguf({"general.architecture": "tiny", **metadata}, 6) == TokenShape(*shape)


def test_a_context_is_the_models_or_what_it_takes() -> None:
    assert context_tokens(0, None) == context_tokens(1 << 20, None) == CONTEXT
    assert context_tokens(512, None) == context_tokens(4096, 512) == 512
    assert context_tokens(0, 1 << 20) == 1 << 20
    for wrong in (0, 513):
        with pytest.raises(ValueError, match="must be 1 to 512"):
            context_tokens(512, wrong)


def test_a_server_has_one_context_if_it_is_free() -> None:
    free = 40 << 30
    assert server_cache(10 << 20, free) == SERVER_CACHE
    assert server_cache(16 << 30, free) == 20 << 30
    assert server_cache(60 << 30, free) == free
    assert server_cache(10 << 20, 4 << 30) == 1 << 30
    assert server_cache(10 << 20, 0) == SERVER_CACHE


def test_pages_are_as_many_as_fit_and_can_be_filled() -> None:
    pages = Pages.within(100 * PAGE * 10 + 639, token_bytes=10, context=1000, sequences=16)
    assert (pages.count, pages.num_tokens, pages.num_bytes) == (100, 100 * PAGE, 100 * PAGE * 10)
    assert Pages.within(1 << 40, 10, 1000, 16).count == 16 * (1000 // PAGE + 2)
    assert Pages.within(639, 10, 1000, 16).count == 0


def test_full_pages_beyond_a_sequences_first_tokens() -> None:
    assert pages_beyond(PAGE - 1, 0) == 0
    assert pages_beyond(3 * PAGE, 0) == 3
    assert pages_beyond(3 * PAGE + 1, PAGE + 1) == 2
    assert pages_beyond(PAGE, 3 * PAGE) == 0
