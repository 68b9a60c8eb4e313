"""Every experts class of the installed transformers,
and a tiny random model of every family that generates text.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

from ktk.integration.transformers import KtkConfig, recognise, use_ktk
from ktk.integration.transformers.experts import find_experts, handle_of, is_experts, left_eager
from make.families import CLASSES, MODELS, NOT_BUILT, causal_families, small_config
from make.transformers_cases import SEED, SIZES, routing

# class -> what its constructor wants besides SIZES
ACTIVATIONS = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
}
EAGER = {
    "DbrxExperts",
    "InklingSharedExperts",
    "JetMoeParallelExperts",
    "Llama4TextExperts",
    "LongcatFlashExperts",
    "NllbMoeExperts",
    "Step3p7Experts",
    "SwitchTransformersExperts",
}


def make_experts(module: str, name: str) -> torch.nn.Module:
    found = getattr(importlib.import_module(module), name)
    config = SimpleNamespace(**SIZES, **ACTIVATIONS, **EXTRA.get(name, {}))
    config._experts_implementation = "eager"
    experts: torch.nn.Module = found(config, *ARGUMENTS.get(name, ()))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return experts.eval()


EXTRA: dict[str, dict[str, Any]] = {
    "AriaExperts": {"moe_num_experts": 4},
    "Inkling2Experts": {"mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0},
    "Inkling2LoopExperts": {"mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0},
    "LongcatFlashExperts": {"expert_ffn_hidden_size": 48, "zero_expert_num": 1},
    "DbrxExperts": {"ffn_hidden_size": 48, "moe_num_experts": 4, "ffn_act_fn": {"name": "silu"}},
    "NllbMoeExperts": {
        "moe_token_dropout": 0.0,
        "d_model": 32,
        "activation_function": "relu",
        "activation_dropout": 0.0,
    },
    "SwitchTransformersExperts": {
        "d_model": 32,
        "d_ff": 48,
        "dropout_rate": 0.0,
        "dense_act_fn": "relu",
    },
    "InklingSharedExperts": {"n_shared_experts": 1},
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "NllbMoeExperts": (48,),
    "Ernie4_5_VLMoeMoeExperts": (48,),
}


@pytest.mark.parametrize(
    ("module", "name"),
    [c for c in CLASSES if c[1] not in EAGER],
    ids=lambda v: v.rpartition(".")[2],
)
def test_experts_class_runs_as_transformers_own(module: str, name: str) -> None:
    """fp32 to 1e-5 of the largest output; int8, weights and activations rounded,
    to 5 % of its norm.
    """
    experts = make_experts(module, name)
    assert is_experts(experts)
    x, ids, weights = routing(experts, 23)
    results = {}
    with torch.no_grad():
        results["eager"] = experts(x, ids, weights)
        for weight_format in ("fp32", "int8"):
            packed = make_experts(module, name)
            use_ktk(torch.nn.ModuleDict({"layer": packed}), weight_format)
            results[weight_format] = packed(x, ids, weights)
            assert (handle_of(packed).activation is None) == (recognise(experts) is None)
    want = results["eager"]
    assert (results["fp32"] - want).abs().max() <= 1e-5 * want.abs().max()
    assert (results["int8"] - want).norm() <= 0.05 * want.norm()
    assert not torch.equal(results["int8"], results["fp32"])


@pytest.mark.parametrize(
    ("module", "name"),
    [c for c in CLASSES if c[1] in EAGER and "Shared" not in c[1] and "JetMoe" not in c[1]],
    ids=lambda v: v.rpartition(".")[2],
)
def test_experts_class_stays_eager_with_one_line_that_says_why(
    module: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    experts = make_experts(module, name)
    model = torch.nn.ModuleDict({"experts": experts})
    with caplog.at_level(logging.WARNING, "ktk"):
        assert use_ktk(model) == []
    (line,) = caplog.messages
    assert f"{name} is not decorated with use_experts_implementation" in line
    reason = (
        "each expert is a module of its own"
        if "ModuleDict" in str(type(experts).__mro__)
        else "its own forward"
    )
    assert reason in line


def test_experts_that_stay_eager_are_those_without_the_decorator() -> None:
    undecorated = set()
    for module, name in CLASSES:
        text = (MODELS / module.split(".")[2] / f"{module.split('.')[3]}.py").read_text(
            encoding="utf-8"
        )
        before = text[: text.index(f"class {name}(")].rstrip().rpartition("\n\n")[2]
        if "use_experts_implementation" not in before:
            undecorated.add(name)
    assert undecorated == EAGER


# --- whole models ---------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: torch.nn.Module, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last step, and two greedy tokens, without a cache:
    every layer sees several tokens.
    """
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = implementation
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(SEED))
    for _ in range(2):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return logits, ids[:, -2:]


@pytest.mark.parametrize("kind", causal_families())
def test_tiny_model_says_the_same_greedy_tokens(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind in NOT_BUILT:
        pytest.skip(NOT_BUILT[kind])
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    modules = [module for _, module in find_experts(model)]
    if not modules:
        assert set(left_eager(model)) <= {*EAGER, "JetMoeMoA"}  # JetMoe's attention has experts too
        with caplog.at_level(logging.WARNING, "ktk"):
            assert use_ktk(model) == []
        assert len(caplog.messages) == 1
        return
    logits, tokens = greedy(model, "eager")
    got_logits, got_tokens = greedy(model, "ktk")
    assert all(handle_of(module) is not None for module in modules)
    assert (got_logits - logits).abs().max() <= 1e-3 * logits.abs().max()
    assert torch.equal(got_tokens, tokens)


def test_a_float_checkpoint_of_every_way_of_naming_packs_while_it_loads(tmp_path: Path) -> None:
    """Per expert, fused, transposed, renamed: each family's tensors pass through its own
    conversion first.
    """
    for kind in ("qwen2_moe", "granitemoe", "deepseek_v4", "nemotron_h", "minimax_m2", "jamba"):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32).eval()
        model.save_pretrained(tmp_path / kind)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / kind, quantization_config=KtkConfig("int8"), output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        use_ktk(model, "int8")
        pairs = zip(find_experts(model), find_experts(loaded), strict=True)
        for (name, want), (_, got) in pairs:
            a, b = handle_of(want).moe.packed.data, handle_of(got).moe.packed.data
            assert (a == b).all(), f"{kind} {name}"
