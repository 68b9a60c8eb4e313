"""Decoding attention with grouped rows: the same as transformers' SDPA, within rounding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from serving import make_model
from transformers import AutoModelForCausalLM

from ktk.integration.transformers import use_attention
from ktk.integration.transformers.attention import NAME, one_row


@pytest.mark.parametrize(("heads", "kv_heads", "keys"), [(8, 2, 33), (4, 4, 1), (6, 1, 200)])
def test_one_row_is_softmax_of_products(heads: int, kv_heads: int, keys: int) -> None:
    g = torch.Generator().manual_seed(heads)
    q = torch.randn(2, heads, 1, 16, generator=g)
    k, v = (torch.randn(2, kv_heads, keys, 16, generator=g) for _ in range(2))
    want = torch.empty_like(q)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        p = torch.softmax((q[:, h] @ k[:, kv].transpose(1, 2)).double() * 0.3, -1)
        want[:, h] = (p @ v[:, kv].double()).float()
    assert torch.allclose(one_row(q, k, v, 0.3), want, atol=1e-5)


def test_generation_is_that_of_sdpa_with_padding_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    make_model(tmp_path / "m")
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    tokens = {}
    for name in ("sdpa", NAME):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="sdpa")
        if name == NAME:
            assert use_attention(model)
            assert not use_attention(model)  # it runs it already
        assert model.config._attn_implementation == name
        for given in (None, mask):
            said = model.generate(ids, attention_mask=given, max_new_tokens=12, do_sample=False)
            tokens[name, given is None] = said.tolist()
    assert tokens["sdpa", True] == tokens[NAME, True]
    assert tokens["sdpa", False] == tokens[NAME, False]
