"""A bf16 model that computes in float32 over its own weights: the bits and gradients of one loaded
as float32, without the memory.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
from ktk.train import float32
from ktk.train.float32 import compute_in_float32
from make.transformers_cases import make_model, prompt


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_it_computes_what_a_float32_model_computes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32, "BLOCK", 48)  # several to a weight, the last one not whole
    model = make_model(family, torch.bfloat16).requires_grad_(False)
    wide = copy.deepcopy(model).float()
    before = {id(p): p.data_ptr() for p in model.parameters()}
    compute_in_float32(model)
    inputs = []
    for one in (wide, model):
        embedded = one.get_input_embeddings()(prompt()).detach().requires_grad_()
        logits = one(inputs_embeds=embedded, use_cache=False).logits
        assert logits.dtype == torch.float32
        inputs.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), embedded)))
    for expected, got in zip(*inputs, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    assert {m.weight.dtype for m in linears} == {torch.bfloat16}
    assert all(m.weight.data_ptr() == before[id(m.weight)] for m in linears)


def test_a_float32_model_stays_as_it_is() -> None:
    model = make_model("qwen3_moe")
    kinds = [type(m) for m in model.modules()]
    compute_in_float32(model)
    assert [type(m) for m in model.modules()] == kinds
