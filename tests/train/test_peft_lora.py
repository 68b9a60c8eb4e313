"""peft's own ways with adapters on packed experts: get_peft_model, save_pretrained, Trainer,
several adapters, and what it must refuse.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")
import peft
from transformers import Trainer, TrainingArguments

import ktk.train
from ktk.integration.transformers import fuse_decoder_layers, use_ktk
from ktk.integration.transformers.decoder_layers import fusion_report, native_calls
from ktk.ops import linear
from ktk.train.peft_lora import ExpertsLoraLayer
from make.float_lora import give_float_lora
from make.fused_layers import decode, make, small_matrices_too
from make.transformers_cases import make_model, prompt

__all__ = ["small_matrices_too"]  # a fixture for every test: decoder layers this small fuse

CHECKPOINTING = next(  # the second up to transformers 5.22
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
BOTH = ["experts", "q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")  # of the base model
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def packed(family: str = "qwen3_moe") -> Any:
    model = make_model(family)
    use_ktk(model, "fp32")
    return model


def adapted(model: Any = None, **arguments: Any) -> Any:
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": BOTH, **arguments}
    config = ktk.train.lora_config(task_type="CAUSAL_LM", **arguments)
    return peft.get_peft_model(packed() if model is None else model, config)


def stir(model: torch.nn.Module, adapter: str = "default", seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name and "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(prompt(), use_cache=False).logits
    return found


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_get_peft_model_adapts_experts_beside_attention(family: str) -> None:
    base = packed(family)
    want = logits(base)
    model = adapted(base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trained if "experts" in n} == {
        f"lora_{t}_{letter}" for t in ("gate", "up", "down") for letter in "AB"
    }
    assert any("q_proj" in name for name in trained)
    assert all("lora_" in name for name in trained)
    assert near(logits(model), want)
    stir(model)
    assert not near(logits(model), want)
    with model.disable_adapter():
        assert near(logits(model), want)
    assert near(logits(model.unload()), want)


def test_saved_adapters_are_those_of_peft_and_of_ktk(tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.1, use_rslora=True).eval()
    stir(model)
    model.save_pretrained(tmp_path / "both")
    again = ktk.train.load_peft(packed(), tmp_path / "both")
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    assert any(
        p.requires_grad
        for p in ktk.train.load_peft(packed(), tmp_path / "both", is_trainable=True).parameters()
    )
    alone = adapted(target_modules=["experts"], expert_targets=["up", "down"], use_rslora=True)
    stir(alone)
    alone.save_pretrained(tmp_path / "experts")
    own = packed()
    ktk.train.load_expert_lora(own, tmp_path / "experts")
    assert torch.equal(logits(own), logits(alone))
    ktk.train.save_expert_lora(own, tmp_path / "own")
    assert torch.equal(logits(ktk.train.load_peft(packed(), tmp_path / "own")), logits(alone))
    files = [tmp_path / d / "adapter_model.safetensors" for d in ("experts", "own")]
    assert files[0].stat().st_size == files[1].stat().st_size


def test_several_adapters_run_alone_and_together(tmp_path: Path) -> None:
    """Together they are one whose rank is the sum: hidden layers see both."""
    model = adapted(target_modules=["experts"])
    config = ktk.train.lora_config(r=2, lora_alpha=6, expert_targets=["down"])
    model.add_adapter("second", config)
    stir(model, "default", 1)
    stir(model, "second", 2)
    seen = {}
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        seen[tuple(names)] = logits(model)
    assert len({float(x.sum()) for x in seen.values()}) == 3
    joined = packed()
    ktk.train.add_expert_lora(joined, 6, 6)
    layers = [m for m in model.modules() if hasattr(m, "lora_gate_A")]
    for adapter, layer in zip(
        [m for m in joined.modules() if type(m).__name__ == "ExpertAdapter"], layers, strict=True
    ):
        for name, parameter in adapter.named_parameters():
            projection, letter = name.split("_")
            of = getattr(layer, f"lora_{projection}_{letter.upper()}")
            first = of["default"] * (2.0 if letter == "b" else 1.0)
            if "second" in of:
                second = of["second"] * (3.0 if letter == "b" else 1.0)
            else:
                shape = list(first.shape)
                shape[1 if letter == "a" else 2] = 2
                second = torch.zeros(shape)
            parameter.data = torch.cat([first, second], 1 if letter == "a" else 2).detach()
    assert near(logits(joined), seen["default", "second"])
    model.save_pretrained(tmp_path)  # each in a directory of its own, except the default
    other = ktk.train.load_peft(packed(), tmp_path)
    other.load_adapter(str(tmp_path / "second"), "second")
    other.base_model.set_adapter(["default", "second"])
    assert near(logits(other), seen["default", "second"])
    model.delete_adapter("second")
    assert near(logits(model), seen[("default",)])


def test_fused_layers_do_not_leave_out_adapters_of_peft() -> None:
    if linear.why_not() is not None:
        pytest.skip(str(linear.why_not()))
    model = make("qwen3_moe")
    names = fuse_decoder_layers(model)
    before, _ = decode(model, 8)
    calls = native_calls(model)
    assert calls
    wrapped = adapted(model, target_modules=["experts"], lora_alpha=256)
    stir(wrapped)
    after, want = decode(model, 8)
    assert native_calls(model) == calls
    assert after != before
    assert fuse_decoder_layers(model) == []
    assert "as of an adapter" in str(fusion_report(model))
    assert torch.equal(decode(model, 8)[1], want)
    wrapped.unload()
    assert fuse_decoder_layers(model) == names
    assert decode(model, 8)[0] == before


def test_what_experts_cannot_have_is_refused() -> None:
    for arguments, text in (
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ({"r": 129}, "r=129: must be in 1..128"),
        ({"expert_targets": ["q"]}, "must be some of"),
    ):
        with pytest.raises(ValueError, match=text):
            adapted(**{"target_modules": ["experts"], **arguments})
    with pytest.raises(ValueError, match="are not packed"):
        adapted(make_model("qwen3_moe"))
    model = adapted(target_modules=["experts"])
    with pytest.raises(ValueError, match="ktk train export"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="does not sum adapters of experts"):
        model.add_weighted_adapter(["default"], [0.5], "weighted")
    second = ktk.train.lora_config(r=2, lora_dropout=0.5)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    model.train()
    with pytest.raises(ValueError, match="active at once"):
        model(prompt())


def trained(model: Any, directory: Path, **arguments: Any) -> list[float]:
    """Losses of five steps of Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in prompt().repeat(8, 1)]
    given = TrainingArguments(
        str(directory),
        max_steps=5,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = Trainer(model, given, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_experts_and_attention(tmp_path: Path) -> None:
    """With checkpointing and accumulation; the reloaded adapter computes the same."""
    model = adapted()
    model.enable_input_require_grads()
    losses = trained(model, tmp_path / "out", **{CHECKPOINTING: True})
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = ktk.train.load_peft(packed(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))


def test_trainer_over_packed_experts_goes_as_over_float_ones(tmp_path: Path) -> None:
    """The losses differ by what int8 activations round: within 0.2 %."""
    base = make_model("qwen3_moe")
    use_ktk(base, "int8")
    model = adapted(base, target_modules=["experts"])
    layers = [m for m in model.modules() if isinstance(m, ExpertsLoraLayer)]
    plain = make_model("qwen3_moe").requires_grad_(False)
    give_float_lora(plain, base, [m.tensors()[0].matrices for m in layers], 2.0)
    got, want = trained(model, tmp_path), trained(plain, tmp_path)
    assert got[-1] < 0.8 * got[0]
    assert np.allclose(got, want, rtol=2e-3)
