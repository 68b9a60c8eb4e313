"""What ``names`` says of transformers' insides holds in the release installed; `make test-versions` runs this with the oldest and the newest.

Release lines: 5.20 to 5.23 (``past_key_values``; attention functions update a batch's cache), from 5.24 on (``cache``; attention modules do).
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
import transformers_cases as cases
from transformers import DynamicCache, PreTrainedModel

from ktk.integration.transformers import names as hf

IDS = torch.tensor([[5, 6, 7]])


@torch.no_grad()
def layer_arguments(model: PreTrainedModel, **named: Any) -> dict[str, Any]:
    """The keyword arguments that a model's forward hands to its first decoder layer."""
    seen: list[dict[str, Any]] = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)  # fmt: skip
    model(IDS, use_cache=True, **named)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_layers_get_the_cache_and_positions_by_the_names_given(family: str) -> None:
    model, cache = cases.make_model(family), DynamicCache()
    named = layer_arguments(model, **{hf.CACHE: cache})
    assert hf.cache_in(named) is cache
    cosines, sines = named[hf.POSITIONS]
    assert cosines.shape == sines.shape
    assert cosines.shape[:2] == IDS.shape


@pytest.mark.filterwarnings("error")
def test_generate_takes_the_cache_by_its_name_without_a_warning() -> None:
    model, cache = cases.make_model("qwen3_moe"), DynamicCache()
    model.generate(IDS, **{hf.CACHE: cache}, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert cache.get_seq_length() == IDS.shape[1] + 2


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_either_name(name: str) -> None:
    cache = DynamicCache()  # empty, and so false
    assert hf.cache_in({name: cache}) is cache
    assert hf.cache_in({"cache": None, "past_key_values": None, name: cache}) is cache
    assert hf.cache_in({"cache": None}) is hf.cache_in({}) is None
