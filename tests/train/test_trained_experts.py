"""Chosen experts trained in full beside packed ones, and packed again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")
from transformers import AutoModelForCausalLM

import ktk.train
from ktk.integration.transformers import KtkConfig, use_ktk
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.trained_experts import trained_of
from ktk.reference.moe import ExactExperts
from make.transformers_cases import (
    experts_of,
    make_model,
    make_module,
    prompt,
    restore_dequantised,
    routing,
)

FIRST = "model.layers.0.mlp.experts"


def loss_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(prompt(), labels=prompt(), use_cache=False).loss
    return found


@pytest.mark.parametrize(
    "name", ["mixtral.MixtralExperts", "gpt_oss.GptOssExperts", "muse_spark.MuseSparkExperts"]
)
def test_gradients_are_those_of_the_same_experts_in_float(name: str) -> None:
    """Those of an eager module's parameters, at the chosen experts."""
    module = make_module(name)
    plain = copy.deepcopy(module)
    model = torch.nn.ModuleDict({"layer": module})
    use_ktk(model, "fp32")
    module.config._experts_implementation = "ktk"
    restore_dequantised(plain, ExactExperts(handle_of(module).moe.packed))
    parameters = ktk.train.train_experts(model, {"layer": [2, 0]})
    trained = trained_of(module)
    found = []
    for layer in (module, plain):
        x, ids, weights = routing(module, 13)
        x, weights = x.requires_grad_(), weights.requires_grad_()
        ids[0] = ids[0, 0]  # the same expert twice
        out = layer(x, ids, weights)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        out.backward(direction)
        found.append([out.detach(), x.grad, weights.grad])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert len(parameters) == len(list(trained.parameters()))
    turn = (lambda w: w.mT) if plain.is_transposed else (lambda w: w)
    want = turn(plain.down_proj.grad)[[0, 2]]
    assert (trained.down.grad - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("weight_format", "dtype"), [("fp32", "float32"), ("int8", "bfloat16")])
def test_trained_experts_are_packed_among_the_others(
    weight_format: str, dtype: str, tmp_path: Path
) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path / "plain")
    config = KtkConfig(weight_format)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.requires_grad_(False)
    before = handle_of(experts_of(model)[0]).moe.packed.data.copy()
    with torch.no_grad():
        begin = float(loss_of(model))
    chosen = {FIRST: range(4)}
    parameters = ktk.train.train_experts(model, chosen, dtype=getattr(torch, dtype))
    assert {p.dtype for p in parameters} == {getattr(torch, dtype)}
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(4):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = float(loss_of(model))
    assert trained < 0.97 * begin
    with pytest.raises(ValueError, match="write_back packs them first"):
        model.save_pretrained(tmp_path / "early")
    assert ktk.train.write_back(model) == [FIRST]
    with torch.no_grad():
        written = float(loss_of(model))
    assert abs(written - trained) <= (1e-5 if weight_format == "fp32" else 0.02) * trained
    after = handle_of(experts_of(model)[0]).moe.packed.data
    changed = (after != before).any(axis=1)
    assert changed[:4].any()
    assert not changed[4:].any()
    assert ktk.train.write_back(model) == []
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert float(loss_of(again)) == written


def test_they_train_beside_adapters_of_the_others() -> None:
    model = make_model("qwen3_moe").requires_grad_(False)
    use_ktk(model, "fp32")
    full = ktk.train.train_experts(model, {FIRST: [1, 6]})
    lora = ktk.train.add_expert_lora(model, 4, 8)
    assert ktk.train.expert_lora_parameters(model) == lora
    loss_of(model).backward()
    assert all(p.grad is not None and p.grad.any() for p in full)
    of_first = dict(experts_of(model)[0].ktk_lora.named_parameters())
    used = of_first["down_b"].grad.flatten(1).any(1)
    assert not used[[1, 6]].any()
    assert used.any()


def test_what_cannot_be_trained_is_refused() -> None:
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    for experts, text in (
        ({"model.layers.7.mlp.experts": [0]}, "no experts module is called"),
        ({FIRST: [8]}, "has no expert 8"),
    ):
        with pytest.raises(ValueError, match=text):
            ktk.train.train_experts(model, experts)
    with pytest.raises(TypeError, match=r"dtype=torch.float16"):
        ktk.train.train_experts(model, {FIRST: [0]}, dtype=torch.float16)
    assert ktk.train.train_experts(model, {FIRST: []}) == []
    (first, *_) = ktk.train.train_experts(model, {FIRST: [0]})
    with pytest.raises(ValueError, match="has trained experts already"):
        ktk.train.train_experts(model, {FIRST: [1]})
    with torch.no_grad():
        first[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="expert 0"):
        ktk.train.write_back(model)
