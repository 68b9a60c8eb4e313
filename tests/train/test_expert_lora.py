"""Adapters beside packed experts: their gradients and what they learn are those of float experts
with the same adapters by torch; they are never left out silently.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")
from torch.utils.checkpoint import checkpoint

import ktk.train
from ktk._cy import native_module
from ktk.errors import BackendError, CheckpointError
from ktk.integration.transformers import fuse_decoder_layers, use_ktk
from ktk.integration.transformers.adapters import adapter_of
from ktk.integration.transformers.decoder_layers import fusion_report, native_calls
from ktk.ops import linear
from make.float_lora import give_float_lora
from make.fused_layers import decode, make, small_matrices_too
from make.transformers_cases import (
    FAMILIES,
    SEED,
    experts_of,
    make_model,
    make_module,
    odd_module,
    prompt,
    routing,
)

__all__ = ["small_matrices_too"]  # a fixture for every test: decoder layers this small fuse

MODULES = (
    "mixtral.MixtralExperts",
    "gpt_oss.GptOssExperts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
    "nemotron_h.NemotronHExperts",
    "deepseek_v4.DeepseekV4Experts",
    "gemma4.Gemma4TextExperts",
)
# fp32 differs by the order of sums, int8 by rounded activations.
BOUNDS = {"fp32": 2e-5, "int8": 0.03}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(prompt(), use_cache=False).logits
    return found


def stir(model: torch.nn.Module, seed: int = SEED) -> None:
    """Adapters with no zeros: B's too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ktk.train.expert_lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def matrices_of(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    return [dict(adapter_of(m).named_parameters()) for m in experts_of(model)]


def layer_of(name: str, weight_format: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A packed experts module with adapters within a model of one layer, and its float original."""
    model = torch.nn.ModuleDict({"layer": make_module(name)})
    plain = copy.deepcopy(model)
    use_ktk(model, weight_format)
    for module in (*experts_of(model), *experts_of(plain)):
        module.config._experts_implementation = "ktk" if module in experts_of(model) else "eager"
    return model, plain


def packed_model(family: str, weight_format: str, **changes: object) -> Any:
    model = make_model(family, **changes)
    model.requires_grad_(False)
    use_ktk(model, weight_format)
    return model


@pytest.mark.parametrize(
    ("name", "weight_format"), [*((name, "fp32") for name in MODULES), (MODULES[0], "int8")]
)
def test_gradients_are_those_of_float_experts_with_adapters(name: str, weight_format: str) -> None:
    model, plain = layer_of(name, weight_format)
    has_gate = model["layer"].has_gate
    targets = ("gate", "up", "down") if has_gate else ("up", "down")
    parameters = ktk.train.add_expert_lora(model, 3, 6, targets)
    stir(model)
    copies = give_float_lora(plain, model, matrices_of(model), 2.0)
    found = []
    for module, trained in ((model["layer"], parameters), (plain["layer"], copies)):
        x, ids, weights = routing(module, 21)
        x, weights = x.requires_grad_(), weights.requires_grad_()
        ids[0] = ids[0, 0]  # the same expert twice
        out = module(x, ids, weights)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED))
        found.append([out, *torch.autograd.grad(out, [x, weights, *trained], direction)])
    assert len(parameters) == len(copies) == 2 * len(targets)
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= BOUNDS[weight_format] * want.norm()


def losses(model: Any, parameters: list[Any], steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    found = []
    for _ in range(steps):
        loss = model(prompt(), labels=prompt(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_training_goes_as_that_of_float_experts_with_adapters() -> None:
    plain = make_model("qwen3_moe").requires_grad_(False)
    model = packed_model("qwen3_moe", "fp32")
    parameters = ktk.train.add_expert_lora(model, 4, 8)
    copies = give_float_lora(plain, model, matrices_of(model), 2.0)
    got, want = losses(model, parameters), losses(plain, copies)
    assert got[-1] < 0.8 * got[0]
    assert np.allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_trained_ones_do(family: str) -> None:
    """Not one bit, by compiled kernels: B is zero, activations are rounded as without adapters."""
    model = packed_model(family, "int8")
    want = logits(model)
    parameters = ktk.train.add_expert_lora(model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    bound = 0.0 if native_module() is not None else 0.02
    assert (logits(model) - want).abs().max() <= bound * want.abs().max()
    stir(model)
    changed = logits(model)
    assert (changed - want).abs().max() > 1e-2 * want.abs().max()
    with ktk.train.without_expert_lora(model):
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), changed)
    ktk.train.enable_expert_lora(model, False)
    assert torch.equal(logits(model), want)
    ktk.train.remove_expert_lora(model)
    assert torch.equal(logits(model), want)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    """With dropout, too: its seed is drawn from the generator that checkpointing sets back."""
    model, _ = layer_of("mixtral.MixtralExperts", "int8")
    parameters = ktk.train.add_expert_lora(model, 4, 8, dropout=0.5)
    stir(model)
    model.train()
    x, ids, weights = routing(model["layer"], 9)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(3)
        if is_checkpointed:
            out = checkpoint(model["layer"], x, ids, weights, use_reentrant=use_reentrant)
        else:
            out = model["layer"](x, ids, weights)
        for tensor in (x, weights, *parameters):
            tensor.grad = None
        out.square().sum().backward()
        found.append([out.detach(), *(t.grad.clone() for t in (x, weights, *parameters))])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


def test_checkpointing_keeps_no_state_of_a_layer() -> None:
    """Between forward and backward only what torch's checkpoint itself keeps: the inputs."""
    model, _ = layer_of("mixtral.MixtralExperts", "int8")
    ktk.train.add_expert_lora(model, 4, 8)
    given = routing(model["layer"], 9)
    given[0].requires_grad_()
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        model["layer"](*given)
        plain = sum(t.nbytes for t in packed)
        packed.clear()
        checkpoint(model["layer"], *given, use_reentrant=True)
    assert sum(t.nbytes for t in packed) < plain / 2


@pytest.mark.parametrize("has_adapters", [True, False])
def test_recomputed_projections_give_the_same_bits_and_are_not_kept(has_adapters: bool) -> None:
    model, _ = layer_of("mixtral.MixtralExperts", "int8")
    if has_adapters:
        ktk.train.add_expert_lora(model, 2, 8)
        stir(model)
    found, kept = [], []
    for is_recomputed in (False, True):
        ktk.train.recompute_experts(model, is_recomputed)
        x, ids, weights = routing(model["layer"], 9)
        sizes: list[int] = []
        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t
        ):
            out = model["layer"](x, ids, weights)
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
        kept.append(sum(sizes))
    assert torch.equal(*found)
    if native_module() is not None:
        assert kept[0] - kept[1] == 9 * 2 * 2 * 64 * 4  # padded from 48


def test_gradients_of_micro_batches_add_up() -> None:
    model, _ = layer_of("mixtral.MixtralExperts", "fp32")
    parameters = ktk.train.add_expert_lora(model, 4, 8)
    stir(model)
    x, ids, weights = routing(model["layer"], 12)
    model["layer"](x, ids, weights).square().sum().backward()
    whole = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    for part in (slice(0, 5), slice(5, 12)):
        model["layer"](x[part], ids[part], weights[part]).square().sum().backward()
    for want, p in zip(whole, parameters, strict=True):
        assert (p.grad - want).norm() <= 1e-5 * want.norm()


def test_dropout_is_real_in_training_and_absent_in_evaluation() -> None:
    model, _ = layer_of("mixtral.MixtralExperts", "fp32")
    ktk.train.add_expert_lora(model, 4, 8, dropout=0.5)
    stir(model)
    given = routing(model["layer"], 9)
    with torch.no_grad():
        still = model["layer"](*given)
        assert torch.equal(still, model["layer"](*given))
        model.train()
        several = torch.stack([model["layer"](*given) for _ in range(100)])
    assert not torch.equal(several[0], several[1])
    # The mean comes near: not exactly, the activation bends.
    assert (several.mean(0) - still).norm() < 0.2 * (several[0] - still).norm()


def test_bf16_models_and_bf16_adapters_train() -> None:
    model = packed_model("qwen3_moe", "int8", dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        parameters = ktk.train.add_expert_lora(model, 4, 8, dtype=dtype)
        assert {p.dtype for p in parameters} == {dtype}
        found = losses(model, parameters, 5)
        assert found[-1] < found[0]
        ktk.train.remove_expert_lora(model)


def test_routers_train_beside_adapters() -> None:
    model = packed_model("qwen3_moe", "int8")
    parameters = ktk.train.add_expert_lora(model, 4, 8)
    routers = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert routers
    for router in routers:
        router.requires_grad_()
    model(prompt(), labels=prompt(), use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in routers)
    assert any(p.grad.any() for p in parameters)


def test_fused_layers_see_adapters_that_come_and_go() -> None:
    """Added after the fusion, before it, and taken away."""
    if linear.why_not() is not None:
        pytest.skip(str(linear.why_not()))
    model = make("qwen3_moe")
    names = fuse_decoder_layers(model)
    plain, _ = decode(model, 8)
    calls = native_calls(model)
    assert calls
    ktk.train.add_expert_lora(model, 4, 64)
    stir(model)
    tokens, want = decode(model, 8)
    assert native_calls(model) == calls
    assert tokens != plain
    assert "adapter" in str(fusion_report(model)[names[0]])
    assert fuse_decoder_layers(model) == []
    assert fusion_report(model)[names[0]] == "its experts have adapters that are trained"
    assert torch.equal(decode(model, 8)[1], want)
    ktk.train.remove_expert_lora(model)
    assert fuse_decoder_layers(model) == names
    assert decode(model, 8)[0] == plain
    assert native_calls(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_adapters_are_decoded_natively(dtype: torch.dtype) -> None:
    if linear.why_not() is not None:
        pytest.skip(str(linear.why_not()))
    model = make("qwen3_moe")
    names = fuse_decoder_layers(model)
    plain, _ = decode(model, 8)
    ktk.train.add_expert_lora(model, 20, 64, dtype=dtype)
    stir(model)
    tokens, want = decode(model, 8)  # by transformers
    assert tokens != plain
    model.requires_grad_(False)
    assert fuse_decoder_layers(model) == names
    calls = native_calls(model)
    found, logits_found = decode(model, 8)
    assert native_calls(model) == calls + 7 * len(names)
    assert set(fusion_report(model).values()) == {None}
    assert found == tokens
    torch.testing.assert_close(logits_found, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    ktk.train.enable_expert_lora(model, False)
    assert "switched" in str(fusion_report(model)[names[0]])
    assert decode(model, 8)[0] == plain
    assert fuse_decoder_layers(model) == names
    assert decode(model, 8)[0] == plain
    assert set(fusion_report(model).values()) == {None}


def test_saved_adapters_come_back_as_they_were(tmp_path: Path) -> None:
    for targets, dtype in ((("gate", "up", "down"), torch.float32), (("down",), torch.bfloat16)):
        model = packed_model("qwen3_moe", "fp32")
        ktk.train.add_expert_lora(model, 4, 6, targets, 0.25, dtype=dtype)
        stir(model)
        ktk.train.save_expert_lora(model, tmp_path)
        other = packed_model("qwen3_moe", "fp32")
        ktk.train.load_expert_lora(other, tmp_path)
        both = [ktk.train.expert_lora_parameters(m) for m in (model, other)]
        for mine, theirs in zip(*both, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
        assert torch.equal(logits(model), logits(other))
        assert experts_of(other)[0].ktk_lora.dropout == 0.25


def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = packed_model("qwen3_moe", "fp32")
    ktk.train.add_expert_lora(model, 4, 6)
    ktk.train.save_expert_lora(model, tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        ktk.train.load_expert_lora(model, tmp_path)
    mixtral = packed_model("mixtral", "fp32")
    with pytest.raises(CheckpointError, match="must be"):
        ktk.train.load_expert_lora(mixtral, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"r": 5}, r"must be \(8, 5, 64\)"),
        ({"r": "4"}, "r='4' is no number"),
        ({"r": 2000}, "r=2000"),
        ({"alpha_pattern": {"x": 1}}, "alpha_pattern is for peft"),
    ]
    other = packed_model("qwen3_moe", "fp32")
    for changes, text in wrong:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=text):
            ktk.train.load_expert_lora(other, tmp_path)
    with pytest.raises(ValueError, match="no experts have adapters"):
        ktk.train.expert_lora_parameters(other)


def test_what_cannot_be_adapted_is_refused_before_anything_is_added() -> None:
    model = packed_model("qwen3_moe", "fp32")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"r": 0}, ValueError, "r=0: must be in 1..128"),
        ({"r": 129}, ValueError, "r=129"),
        ({"targets": ("gate", "q")}, ValueError, "must be some of"),
        ({"targets": ()}, ValueError, "must be some of"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"dtype": torch.float16}, TypeError, "dtype=torch.float16"),
    ]
    for arguments, kind, text in wrong:
        with pytest.raises(kind, match=text):
            ktk.train.add_expert_lora(model, **arguments)
    with pytest.raises(ValueError, match="no experts have adapters"):
        ktk.train.remove_expert_lora(model)
    with pytest.raises(ValueError, match="is not packed"):
        ktk.train.add_expert_lora(make_model("qwen3_moe"))
    with pytest.raises(ValueError, match="has no experts that ktk runs"):
        ktk.train.add_expert_lora(torch.nn.Linear(2, 2))
    odd = torch.nn.ModuleDict({"layer": odd_module()})
    use_ktk(odd, "fp32")
    with pytest.raises(ValueError, match="activation is their module's own"):
        ktk.train.add_expert_lora(odd)
    no_gate = torch.nn.ModuleDict({"layer": make_module("nemotron_h.NemotronHExperts")})
    use_ktk(no_gate, "fp32")
    with pytest.raises(ValueError, match="have no gate"):
        ktk.train.add_expert_lora(no_gate)


def test_deferred_experts_do_not_run_without_their_adapters() -> None:
    model, _ = layer_of("mixtral.MixtralExperts", "int8")
    ktk.train.add_expert_lora(model, 4, 8)

    class Deferring:
        def is_on(self) -> bool:
            return True

    from ktk.integration.transformers.experts import handle_of

    handle = handle_of(model["layer"])
    handle.deferral = (Deferring(), 0)
    with pytest.raises(BackendError, match="deferred to the next layer"):
        model["layer"](*routing(model["layer"], 3))
