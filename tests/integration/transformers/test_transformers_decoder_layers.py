"""Decoding by the fused call: the same tokens as the layers' own forward passes,
and only where it is one.
"""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ktk.integration.transformers import decoder_layers, fuse_decoder_layers
from ktk.integration.transformers import linear as linear_layers
from ktk.integration.transformers.cache import GrowingLayer, growing_layer
from ktk.integration.transformers.decoder_layers import FusedForward, fusion_report, native_calls
from ktk.integration.transformers.linear import share_linears
from ktk.integration.transformers.names import CACHE
from ktk.ops import linear
from make.families import small_config
from make.fused_layers import FUSED, NEW, PROMPT, decode, fused, make, small_matrices_too

__all__ = ["small_matrices_too"]  # a fixture for every test

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)


UNLIKE = {
    "flint": "attention of another kind: found by trying",
    "deepseek_v32": "latent attention to chosen keys",
    "cohere2_moe": "one norm for both",
    "phimoe": "LayerNorm",
}


@torch.no_grad()
def teacher_forced(model: Any) -> torch.Tensor:
    """float32 (36, vocabulary): logits of given tokens, one after the other."""
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], **{CACHE: cache}, use_cache=True)
    rows = [
        model(ids[:, i : i + 1], **{CACHE: cache}, use_cache=True).logits[:, -1].float()
        for i in range(4, 40)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("kind", FUSED)
def test_same_tokens_and_logits(kind: str) -> None:
    model = make(kind)
    tokens, logits = decode(model)
    names = fuse_decoder_layers(model)
    assert len(names) == model.config.get_text_config().num_hidden_layers
    got_tokens, got = decode(model)
    assert native_calls(model) == (NEW - 1) * len(names), "of each token but the prompt's"
    assert set(fusion_report(model).items()) == {(name, None) for name in names}
    assert got_tokens == tokens
    assert (got - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_otherwise_keeps_its_own_forward(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(kind)
    tokens, logits = decode(model)
    with caplog.at_level(logging.INFO, "ktk"):
        fuse_decoder_layers(model)
        got_tokens, got = decode(model)
    assert got_tokens == tokens
    assert torch.equal(got, logits)
    assert all(f.is_unlike for f in fused(model))
    assert any("decoded by torch" in message for message in caplog.messages)
    report = fusion_report(model)
    assert len(report) == model.config.get_text_config().num_hidden_layers
    assert all(report.values())


def test_a_router_of_zeros_takes_all_experts_alike() -> None:
    model = make("mixtral", num_experts_per_tok=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    tokens, _ = decode(model)
    fuse_decoder_layers(model)
    assert decode(model)[0] == tokens
    assert all(f.calls and f.reason is None for f in fused(model))


def test_a_residual_multiplier_is_computed() -> None:
    model = make("granitemoe", residual_multiplier=0.5)
    tokens, _ = decode(model)
    fuse_decoder_layers(model)
    assert decode(model)[0] == tokens
    assert all(f.calls and f.reason is None for f in fused(model))


def test_bf16_is_as_near_to_fp32_as_the_layers_own_forward() -> None:
    model = make("qwen3_moe", torch.bfloat16)
    want = teacher_forced(make("qwen3_moe"))
    own = teacher_forced(model)
    fuse_decoder_layers(model)
    got = teacher_forced(model)
    assert set(fusion_report(model).values()) == {None}
    error, own_error = ((x - want).norm() / want.norm() for x in (got, own))
    assert error <= 1.05 * own_error


@torch.no_grad()
def test_batches_masks_gradients_and_other_caches_go_the_own_way() -> None:
    model = make("qwen3_moe")
    fuse_decoder_layers(model)
    decode(model, 3)
    assert native_calls(model) == 4

    def step(batch: int = 1, **named: Any) -> None:
        cache = DynamicCache(config=model.config)
        ids = torch.full((batch, 5), 9)
        model(ids, **{CACHE: cache}, use_cache=True)
        model(ids[:, :1], **{CACHE: cache}, use_cache=True, **named)

    step()
    assert native_calls(model) == 6, "the case for the fast way"
    step(batch=2)
    model(torch.full((1, 1), 9), use_cache=False)
    step(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    with torch.enable_grad():
        step_ids = torch.full((1, 1), 9)
        embedded = model.get_input_embeddings()(step_ids).detach().requires_grad_()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.full((1, 5), 9), **{CACHE: cache}, use_cache=True)
        with pytest.raises(RuntimeError, match="no gradient"):
            model(inputs_embeds=embedded, **{CACHE: cache}, use_cache=True)
    assert native_calls(model) == 6


@torch.no_grad()
def test_a_token_that_falls_back_is_one_warning_and_a_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make("qwen3_moe")
    names = fuse_decoder_layers(model)
    decode(model, 3)
    assert not caplog.records
    mask = torch.tensor([[0] + [1] * PROMPT])
    for _ in range(3):
        cache = DynamicCache(config=model.config)
        model(torch.full((1, PROMPT), 9), **{CACHE: cache}, use_cache=True)
        token = torch.full((1, 1), 9)
        model(token, **{CACHE: cache}, use_cache=True, attention_mask=mask)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "decoded by torch, which is slower: a mask hides some of the keys" in caplog.text
    assert fusion_report(model) == dict.fromkeys(names, "a mask hides some of the keys")
    decode(model, 3)
    assert fusion_report(model) == dict.fromkeys(names), "the native call decodes again"
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(torch.full((1, PROMPT), 9), **{CACHE: cache}, use_cache=True)
    model(torch.full((1, 1), 9), **{CACHE: cache}, use_cache=True)
    assert "StaticCache that does not grow in place" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


@pytest.mark.parametrize("kind", ["deepseek_v32", "hunyuan_v1_moe", "jamba"])
def test_linear_layers_whose_weights_other_code_reads_stay(kind: str) -> None:
    model = make(kind)  # packs what it can
    assert any(isinstance(m, linear_layers.KtkLinear) for m in model.modules())
    with torch.no_grad():
        assert model(torch.full((1, 5), 9), use_cache=False).logits.isfinite().all()


@torch.no_grad()
def test_layers_whose_projections_are_not_packed_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(small_config("qwen3_moe")).eval()
    with caplog.at_level(logging.INFO, "ktk"):
        assert fuse_decoder_layers(model) == []
    assert "q_proj is a Linear that torch runs" in caplog.messages[0]
    assert fusion_report(model) == dict.fromkeys(
        ["model.layers.0", "model.layers.1"], "q_proj is a Linear that torch runs"
    )


def test_shared_weights_fuse_until_they_are_replaced() -> None:
    model = make("qwen2_moe", torch.bfloat16, packs_linears=False)
    exact = teacher_forced(make("qwen2_moe"))
    own = teacher_forced(model)
    assert share_linears(model)
    assert len(fuse_decoder_layers(model)) == 2
    got = teacher_forced(model)
    assert set(fusion_report(model).values()) == {None}
    assert (got - exact).norm() <= 1.05 * (own - exact).norm()
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(torch.zeros_like(projection.weight))
    zeroed = teacher_forced(model)
    for layer in model.model.layers:
        layer.forward = layer.forward.own_forward
    own = teacher_forced(model)
    assert (zeroed - own).norm() < 0.2 * (zeroed - got).norm()


def test_generate_with_beams_and_a_copied_cache() -> None:
    model = make("mixtral")
    ids = torch.randint(3, 64, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    want = [model.generate(ids, **options, num_beams=n) for n in (1, 3)]
    fuse_decoder_layers(model)
    got = [model.generate(ids, **options, num_beams=n) for n in (1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, **{CACHE: cache}, use_cache=True)
        token = torch.full((1, 1), 9)
        model(token, **{CACHE: cache}, use_cache=True)
        other = copy.deepcopy(cache)
        first = model(token, **{CACHE: cache}, use_cache=True).logits
        model(token + 1, **{CACHE: cache}, use_cache=True)
        assert torch.equal(model(token, **{CACHE: other}, use_cache=True).logits, first)
    twin = copy.deepcopy(model)
    layers = [m.get_decoder().layers[0] for m in (model, twin)]
    assert layers[1].forward.own_forward.__self__ is layers[1] is not layers[0]
    assert torch.equal(twin.generate(ids, **options), want[0])


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5, 300])
def test_growing_layers_hold_what_transformers_own_do(window: int | None) -> None:
    def make_layer() -> Any:
        return DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)

    g = torch.Generator().manual_seed(3)
    own = make_layer()
    cache = DynamicCache()
    cache.layers.append(make_layer())
    grown = growing_layer(cache, 0)
    assert growing_layer(cache, 0) is grown is cache.layers[0]
    total = 0
    for step in range(400):
        many = (1, 1, 1, 3, 17)[step % 5]
        keys, values = (torch.randn(1, 2, many, n, generator=g) for n in (8, 4))
        for a, b in zip(own.update(keys, values), grown.update(keys, values), strict=True):
            assert torch.equal(a, b)
        total += many
        assert torch.equal(own.keys, grown.keys)
        assert torch.equal(own.values, grown.values)
        assert own.get_mask_sizes(1) == grown.get_mask_sizes(1)
        assert own.get_seq_length() == grown.get_seq_length() == total
        if step % 50 == 49 and (window is None or total < window):
            own.crop(-2)
            grown.crop(-2)
            total -= 2
        if step == 200:
            for layer in (own, grown):
                layer.batch_repeat_interleave(1)
    own.reset()
    grown.reset()
    for layer in (own, grown):
        layer.update(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 4))
    assert torch.equal(own.keys, grown.keys)


def test_growing_layers_pass_from_inference_mode_and_back_and_have_gradients() -> None:
    cache = DynamicCache()
    cache.layers.append(DynamicLayer())
    layer = growing_layer(cache, 0)
    ones = torch.ones(1, 1, 1, 4)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for _ in range(3):
                layer.update(ones, ones)
    weight = torch.ones(4, requires_grad=True)
    for _ in range(2):
        keys, values = layer.update(ones * weight, ones * weight)
        (keys * values).sum().backward()
        layer.keys, layer.values = keys.detach(), values.detach()
    assert keys.shape[-2] == 14
    assert torch.equal(weight.grad, torch.full((4,), 4.0))


def test_fusing_again_takes_new_weights() -> None:
    model = make("qwen3_moe", torch.bfloat16, packs_linears=False)
    for _ in range(2):
        share_linears(model)
        assert len(fuse_decoder_layers(model)) == 2
        decode(model, 4)
        assert all(f.calls and f.reason is None for f in fused(model))
        assert not isinstance(fused(model)[0].own_forward, FusedForward)
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight
            layer.self_attn.q_proj.weight = torch.nn.Parameter(weight * 2)


def test_a_growing_layer_copies_seldom() -> None:
    layer = GrowingLayer.__new__(GrowingLayer)
    layer.take_over(DynamicLayer())
    places = set()
    for _ in range(5000):
        layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        places.add(layer.keys.data_ptr())
    assert len(places) < 12


def test_caches_of_other_kinds_are_left_alone() -> None:
    class Other(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers.append(Other())
    assert growing_layer(cache, 0) is None
    assert growing_layer(cache, 5) is None
    assert growing_layer(object(), 0) is None
    assert decoder_layers._sees_all(torch.zeros(1, 1, 1, 4), 4)
    assert not decoder_layers._sees_all(torch.zeros(1, 1, 1, 4), 5)
    assert not decoder_layers._sees_all(torch.tensor([[[[0.0, -1e9]]]]), 2)
    assert not decoder_layers._sees_all(torch.tensor([[[[True, False]]]]), 2)


def test_what_a_mask_came_to_keeps_no_mask_alive() -> None:
    mask = torch.zeros(1, 1, 1, 4)
    assert decoder_layers._sees_all(mask, 4)
    assert decoder_layers._sees_all(mask, 4)
    gone = weakref.ref(mask)
    del mask
    assert gone() is None
    positions = (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    assert decoder_layers._turns_of(positions, 8) is not None
    gone = weakref.ref(positions[0])
    del positions
    assert gone() is None
