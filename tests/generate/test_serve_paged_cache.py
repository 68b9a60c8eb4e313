"""What the KV cache of continuous batches is given, whoever gives it,
and that its geometry is the layers' own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

import torch
from transformers import AttentionInterface

from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Limits
from ktk.generate.open import OpenModel
from ktk.integration.transformers import batches
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.batches import CannotBatch
from ktk.integration.transformers.paged_attention import NAME, paged_attention
from ktk.integration.transformers.paged_cache import AnyWidth, cache_geometry, cached_shapes
from make import transformers_cases as cases

LIMITS = Limits(context=128, running=2, batch_tokens=64, cache_bytes=16 << 20)


class Recorder:
    """A batch's cache that returns what it is given."""

    num_blocks = 7

    def update(self, **given: Any) -> Any:
        self.given = given
        return given["key_states"], given["value_states"]


def opened(model: Any) -> OpenModel:
    tokenizer = SimpleNamespace(eos_token_id=None)
    return OpenModel(model, tokenizer, SimpleNamespace(path="tiny", context=128))  # type: ignore[arg-type]


def shapes_of(family: str) -> set[tuple[int, int]]:
    model = cases.make_model(family)
    AttentionInterface.register(NAME, paged_attention)
    hf.set_attention_implementation(model.config, NAME)
    return cached_shapes(model)


def test_what_layers_cache_is_seen() -> None:
    assert shapes_of("qwen3_moe") == {(2, 16)}
    attention = cases.make_model("deepseek_v3").model.layers[0].self_attn
    # The latent of 16 and the rotary part of 8, one head; in 5.20 to 5.23 every head's keys, 24
    # wide, and values.
    latent = hf.takes(type(attention).forward, "cache")
    assert shapes_of("deepseek_v3") == ({(1, 16)} if latent else {(4, 24)})


def test_widths_are_made_equal() -> None:
    inner = Recorder()
    cache = AnyWidth(inner)
    key, value = torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 4)
    got = cache.update(key, value, 1, {})
    assert inner.given["key_states"].shape == inner.given["value_states"].shape == (1, 2, 5, 6)
    assert torch.equal(got[0], key)
    assert torch.equal(got[1], value)
    assert cache.num_blocks == 7
    assert isinstance(cache, hf.PagedAttentionCache)


def test_a_config_has_its_own_geometry_afterwards() -> None:
    config = cases.make_model("qwen3_moe").config
    with cache_geometry(config, 5, 40):
        assert (config.num_key_value_heads, config.head_dim) == (5, 40)
    assert (config.num_key_value_heads, config.head_dim) == (2, 16)


def test_layers_with_different_numbers_of_heads_are_not_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = cases.make_model("qwen3_moe")
    before = hf.attention_implementation(model.config)
    monkeypatch.setattr(batches, "cached_shapes", lambda _: {(2, 16), (4, 16)})
    with pytest.raises(CannotBatch, match="different numbers of heads: 2, 4"):
        BatchingEngine(opened(model), LIMITS)
    assert hf.attention_implementation(model.config) == before
