"""Gradients through packed experts, adapters trained by peft and Trainer, pipelines,
placement by accelerate.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from ktk.integration.transformers import KtkConfig, use_ktk
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.gradients import ExpertsFunction
from ktk.reference.moe import ExactExperts
from make.transformers_cases import (
    FAMILIES,
    SEED,
    experts_of,
    make_model,
    make_module,
    odd_module,
    prompt,
    restore_dequantised,
    routing,
    run,
)

CHECKPOINTING = next(  # the second up to transformers 5.22, where it warns since
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
)
GRADIENT_MODULES = (
    "qwen3_moe.Qwen3MoeExperts",  # an activation ktk does not have
    "mixtral.MixtralExperts",
    "gpt_oss.GptOssExperts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
    "nemotron_h.NemotronHExperts",
    "muse_spark.MuseSparkExperts",
    "odd",
)


def gradients(
    module: torch.nn.Module, implementation: str, tokens: int
) -> tuple[torch.Tensor, ...]:
    """Of hidden states, routing weights and the norm behind the experts, if there is one;
    output first.
    """
    module.config._experts_implementation = implementation
    x, ids, weights = routing(module, tokens)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    ids[0] = ids[0, 0]  # the same expert twice
    out = module(x, ids, weights)
    norm = list(module.post_expert_norm.parameters()) if hasattr(module, "post_expert_norm") else []
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED))
    return out.detach(), *torch.autograd.grad(out, [x, weights, *norm], direction)


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", GRADIENT_MODULES)
def test_gradients_are_those_of_float_experts_with_the_dequantised_weights(
    name: str, weight_format: str
) -> None:
    """To 1e-5 of the largest; where the forward pass rounds activations, as near as its output:
    that rounding counts as the identity, and gradients are taken where it led.
    """
    module = odd_module() if name == "odd" else make_module(name)
    plain = copy.deepcopy(module)
    use_ktk(torch.nn.ModuleDict({"layer": module}), weight_format)
    restore_dequantised(plain, ExactExperts(handle_of(module).moe.packed))
    got, want = gradients(module, "ktk", 29), gradients(plain, "eager", 29)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        if weight_format == "fp32":
            assert (g - w).abs().max() <= 1e-5 * w.abs().max()
        else:  # of all: one value that rounding moves over a clamp's bound turns a whole gradient
            assert (g - w).norm() <= 0.03 * w.norm()


def test_gradients_agree_with_finite_differences() -> None:
    """Of the float64 sum of the output along a direction; steps of 1e-2,
    so the bound is that of fp32 rounding: 2e-3.
    """
    module = make_module("mixtral.MixtralExperts")
    use_ktk(torch.nn.ModuleDict({"layer": module}), "fp32")
    module.config._experts_implementation = "ktk"
    x, ids, weights = routing(module, 5)
    generator = torch.Generator().manual_seed(SEED)
    out_direction = torch.randn(x.shape, generator=generator)
    x_step, w_step = (torch.randn(t.shape, generator=generator) * 1e-2 for t in (x, weights))
    x.requires_grad_()
    weights.requires_grad_()
    d_x, d_w = torch.autograd.grad((module(x, ids, weights) * out_direction).sum(), [x, weights])

    def value(sign: int) -> float:
        with torch.no_grad():
            out = module(x + sign * x_step, ids, weights + sign * w_step)
        return float((out.double() * out_direction).sum())

    predicted = float((d_x.double() * x_step).sum() + (d_w.double() * w_step).sum())
    assert abs((value(1) - value(-1)) / 2 - predicted) <= 2e-3 * abs(predicted)


def test_more_rows_than_one_step_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = odd_module()
    use_ktk(torch.nn.ModuleDict({"layer": module}), "fp32")
    whole = gradients(module, "ktk", 40)
    monkeypatch.setattr("ktk.integration.transformers.own_gradients._ROWS", 7)
    for g, w in zip(gradients(module, "ktk", 40), whole, strict=True):
        assert (g - w).abs().max() <= 1e-6 * w.abs().max()


def test_sentinel_ids_get_no_gradient() -> None:
    module = make_module("mixtral.MixtralExperts")
    use_ktk(torch.nn.ModuleDict({"layer": module}), "int8")
    module.config._experts_implementation = "ktk"
    x, ids, weights = routing(module, 6)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    alone = torch.autograd.grad(module(x, ids[:, :1], weights[:, :1]).sum(), [x, weights])
    ids[:, 1] = 4
    both = torch.autograd.grad(module(x, ids, weights).sum(), [x, weights])
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    assert not both[1][:, 1].any()


def test_no_graph_is_kept_where_nothing_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module("mixtral.MixtralExperts")
    use_ktk(torch.nn.ModuleDict({"layer": module}), "int8")
    module.config._experts_implementation = "ktk"
    monkeypatch.setattr(ExpertsFunction, "apply", lambda *_: pytest.fail("built a graph"))
    module(*routing(module, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_what_they_are_of(dtype: torch.dtype) -> None:
    module = make_module("mixtral.MixtralExperts")
    use_ktk(torch.nn.ModuleDict({"layer": module}), "int8")
    module.config._experts_implementation = "ktk"
    x, ids, weights = routing(module, 4)
    x, weights = x.to(dtype).requires_grad_(), weights.requires_grad_()
    d_x, d_w = torch.autograd.grad(module(x, ids, weights).float().sum(), [x, weights])
    assert (d_x.dtype, d_w.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = make_model(family)
    use_ktk(model, "int8")
    found = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            getattr(model, CHECKPOINTING)()
        model.train()
        model.zero_grad()
        model(prompt(), labels=prompt(), use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert any("q_" in name or "q_proj" in name for name in found[0])
    assert any("gate" in name or "router" in name for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-7), name


# peft asks for the old name of an attribute that transformers renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_trainer_trains_adapters_on_attention_over_packed_experts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    make_model("qwen3_moe").save_pretrained(tmp_path / "plain")
    config = KtkConfig("int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert model.hf_quantizer.is_trainable
    before = handle_of(experts_of(model)[0]).moe.packed.data.copy()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    rows = [{"input_ids": row, "labels": row} for row in prompt().repeat(8, 1)]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert (handle_of(experts_of(model)[0]).moe.packed.data == before).all()
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("ktk-*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(prompt()).logits, adapted.eval()(prompt()).logits)


# --- pipelines and placement ----------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w255 as they stand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {**{f"w{i}": i for i in range(256) if i not in (0, 2)}, "<pad>": 0, "<eos>": 2}
    words = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def test_pipelines_run_packed_models_and_saved_ones(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    text = " ".join(f"w{i}" for i in prompt()[0].tolist())
    said = []
    for source, arguments in ((model, {"tokenizer": tokenizer()}), (str(tmp_path), {})):
        generate = pipeline("text-generation", model=source, device="cpu", **arguments)
        (answer,) = generate(text, max_new_tokens=6, do_sample=False, return_full_text=False)
        said.append(answer["generated_text"])
    assert said[0] == said[1]
    tokens = run(model)[1][0, -12:-6].tolist()
    assert said[0].split() == [f"w{i}" for i in tokens]


def test_experts_are_no_parameters_that_hooks_could_move() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model("deepseek_v3")
    use_ktk(model, "int8")
    want = run(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not any(".experts." in name for name in tensors)
    hooked = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(hooked.model.layers[1].self_attn.o_proj, "_hf_hook")
    assert not hasattr(hooked.model.layers[1].mlp.experts, "_hf_hook")
    for got, expected in zip(run(hooked), want, strict=True):
        assert torch.equal(got, expected)


def test_offloaded_layers_keep_their_experts() -> None:
    """accelerate empties an offloaded layer's parameters between calls and brings them back for
    each.
    """
    accelerate = pytest.importorskip("accelerate")
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    want = run(model)
    hooked = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert hooked.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    for got, expected in zip(run(hooked), want, strict=True):
        assert torch.equal(got, expected)
    assert hooked.model.layers[0].self_attn.q_proj.weight.device.type == "meta"


def test_device_map_counts_no_memory_for_experts(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    config = KtkConfig("int8")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}
    )
    packed = make_model("mixtral")
    use_ktk(packed, "int8")
    assert torch.equal(run(loaded)[0], run(packed)[0])
    float_model = make_model("mixtral")
    quantizer = loaded.hf_quantizer
    quantizer.packers = {
        name: None for name, _ in float_model.named_modules() if name.endswith("experts")
    }
    weight = float_model.model.layers[0].mlp.experts.down_proj
    size = quantizer.param_element_size(float_model, "model.layers.0.mlp.experts.down_proj", weight)
    assert size == 0
    other = float_model.lm_head.weight
    assert quantizer.param_element_size(float_model, "lm_head.weight", other) == 4
