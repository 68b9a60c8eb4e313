"""transformers with its experts on ktk: whole models, and one experts module of each kind."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from ktk.experts.activation import Activation
from ktk.integration.transformers import recognise, use_ktk
from ktk.integration.transformers.experts import handle_of
from ktk.reference.moe import ExactExperts
from make.transformers_cases import (
    FAMILIES,
    MODULES,
    assert_near_eager,
    experts_of,
    make_model,
    make_module,
    odd_module,
    restore_dequantised,
    routing,
    run,
)

pytestmark = pytest.mark.slow

# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_model_gives_eager_logits_and_tokens(family: str) -> None:
    model = make_model(family)
    logits, tokens = run(model, "eager")
    got_logits, got_tokens = run(model, "ktk")
    assert all(handle_of(m).moe.spec.weight_format == "fp32" for m in experts_of(model))
    assert (got_logits - logits).abs().max() <= 1e-4
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_in_fp32_arithmetic_give_eager_logits(family: str) -> None:
    """bf16 experts under an fp32 rest: the same numbers, so the same bound as fp32."""
    logits, tokens = run(make_model(family), "eager")
    model = make_model(family)
    use_ktk(model, "bf16")
    got_logits, got_tokens = run(model)
    assert (got_logits - logits).abs().max() <= 1e-4
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_model_gives_eager_logits_and_tokens_up_to_bf16_rounding(family: str) -> None:
    """Bound: 2 % of the largest logit, five bf16 steps; and no farther from the fp32 model than
    eager is.

    Logits of a bf16 model tie; a greedy token is right if eager's logit for it is within the bound
    of its best.
    """
    model = make_model(family, torch.bfloat16)
    want, got = run(model, "eager")[0], run(model, "ktk")[0]
    exact = run(make_model(family), "eager")[0]
    bound = 0.02 * want.abs().max()
    assert (got - want).abs().max() <= bound
    assert (got - exact).norm() <= 1.05 * (want - exact).norm()
    chosen = want.gather(-1, got.argmax(-1, keepdim=True))[..., 0]
    assert (want.amax(-1) - chosen <= bound).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_experts_round_once(family: str) -> None:
    """Experts alone on the same bf16 input: within half a bf16 step (2**-8 relative)
    of the fp32 result.
    """
    model = make_model(family, torch.bfloat16)
    for module, exact in zip(experts_of(model), experts_of(make_model(family)), strict=True):
        x, ids, weights = routing(module, tokens=13)
        module.config._experts_implementation = "ktk"
        exact.config._experts_implementation = "eager"
        with torch.no_grad():
            got = module(x.bfloat16(), ids, weights)
            want = exact(x.bfloat16().float(), ids, weights)
        assert handle_of(module).moe.spec.weight_format == "bf16"
        assert got.dtype == torch.bfloat16
        assert ((got.float() - want).abs() <= 2.0**-8 * want.abs() + 1e-5).all()


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_are_near_eager_with_dequantised_weights(
    family: str, weight_format: str
) -> None:
    """What is left is the int8 rounding of activations: 2 % of the output's norm.

    Routers stay out of it.
    """
    model = make_model(family)
    for module in experts_of(model):
        x, ids, weights = routing(module, tokens=17)
        plain = copy.deepcopy(module)
        plain.config = copy.copy(module.config)
        use_ktk(torch.nn.ModuleDict({"layer": module}), weight_format)
        restore_dequantised(plain, ExactExperts(handle_of(module).moe.packed))
        plain.config._experts_implementation = "eager"
        with torch.no_grad():
            want, got = plain(x, ids, weights), module(x, ids, weights)
        assert (got - want).norm() <= 0.02 * want.norm()


def test_int8_logits_are_near_eager_logits_with_dequantised_weights() -> None:
    """All experts active, so no router flips: the largest logit error is below 3 % of the
    largest logit.
    """
    model = make_model("qwen3_moe", num_experts_per_tok=8)
    packed = copy.deepcopy(model)
    use_ktk(packed, "int8")
    for plain, module in zip(experts_of(model), experts_of(packed), strict=True):
        restore_dequantised(plain, ExactExperts(handle_of(module).moe.packed))
    want, got = run(model, "eager")[0], run(packed)[0]
    assert (got - want).abs().max() <= 0.03 * want.abs().max()


# --- one experts module of each kind --------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_module_gives_its_own_result(name: str) -> None:
    module = make_module(name)
    assert recognise(module) == MODULES[name][1]
    assert_near_eager(module)


def test_unknown_activation_with_biases_and_interleaved_rows_falls_back_to_the_module() -> None:
    module = odd_module()
    assert recognise(module) is None
    assert_near_eager(module, tokens=300)  # more than one step of the fallback


@pytest.mark.parametrize("name", ["gpt_oss.GptOssExperts", "odd", "muse_spark.MuseSparkExperts"])
def test_sentinel_ids_add_exactly_zero(name: str) -> None:
    module = odd_module() if name == "odd" else make_module(name)
    x, ids, weights = routing(module, tokens=5)
    module.config._experts_implementation = "ktk"
    with torch.no_grad():
        assert not module(x, torch.full_like(ids, 4), weights).any()
        ids[:, 1] = 4
        weights[:, 1] = float("nan")  # never looked at
        assert torch.equal(module(x, ids, weights), module(x, ids[:, :1], weights[:, :1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral.MixtralExperts", "qwen3_moe.Qwen3MoeExperts"])
def test_hidden_dtype_is_kept_and_zero_tokens_are_fine(name: str, dtype: torch.dtype) -> None:
    module = make_module(name)
    x, ids, weights = routing(module, tokens=4)
    module.config._experts_implementation = "ktk"
    with torch.no_grad():
        assert module(x.to(dtype), ids, weights.to(dtype)).dtype == dtype
        empty = module(x[:0].to(dtype), ids[:0], weights[:0])
    assert empty.dtype == dtype
    assert empty.shape == (0, 32)


def test_limits_decide_the_activation_not_the_name() -> None:
    module = make_module("gpt_oss.GptOssExperts")
    module.limit = 5.0  # the config still says 7
    assert recognise(module) == Activation.swigluoai(1.702, 5.0)
    module._apply_gate = lambda gate_up: gate_up[..., ::2] * gate_up[..., 1::2]
    assert recognise(module) is None
