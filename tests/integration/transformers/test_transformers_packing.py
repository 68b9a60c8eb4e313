"""Experts of a model in memory, packed in place and saved as the directory that convert writes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

import ktk
from ktk.checkpoint import Checkpoint
from ktk.convert.run import convert
from ktk.integration.transformers import use_ktk
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.loading import packed_modules
from ktk.reference.moe import ExactExperts
from make.transformers_cases import (
    FAMILIES,
    assert_near_eager,
    experts_of,
    make_model,
    make_module,
    prompt,
    routing,
    run,
)

pytestmark = pytest.mark.slow


def test_use_ktk_frees_the_float_weights_and_reports_what_runs() -> None:
    model = make_model("mixtral", torch.bfloat16)
    report = use_ktk(model, "int4", group_size=64)
    assert [row.name for row in report] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    for row, module in zip(report, experts_of(model), strict=True):
        packed = handle_of(module).moe.packed
        assert row.bytes == packed.data.nbytes
        assert row.bits_per_weight == packed.bits_per_weight
        assert "int4 g64" in row.kernel
        assert row.fused_activation
        assert module.gate_up_proj.numel() == module.down_proj.numel() == 0
    assert packed_modules(model) == report
    assert not any("experts" in name for name in model.state_dict())
    before = run(model)[0]
    model.to(torch.float32)
    assert (run(model)[0] - before).abs().max() < 0.1 * before.abs().max()


def test_use_ktk_refuses_before_it_changes_anything() -> None:
    model = make_model("mixtral")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: group_size=48"):
        use_ktk(model, "int4", group_size=48)
    assert experts_of(model)[0].down_proj.numel()
    use_ktk(model, "int8")
    with pytest.raises(ValueError, match="runs .* already"):
        use_ktk(model, "int4")
    with pytest.raises(ValueError, match="no experts that ktk can run"):
        use_ktk(torch.nn.Linear(4, 4))


def test_changed_weights_are_packed_again() -> None:
    module = make_module("mixtral.MixtralExperts")
    assert_near_eager(module)
    first = handle_of(module)
    assert_near_eager(module)
    assert handle_of(module) is first
    with torch.no_grad():
        module.down_proj.mul_(2)
    assert_near_eager(module)
    assert handle_of(module) is not first
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.detach() * 3)
    assert_near_eager(module)


def test_training_the_experts_weights_through_ktk_is_an_error() -> None:
    model = make_model("qwen3_moe")
    model.set_experts_implementation("ktk")
    loss = model(prompt(), labels=prompt()).loss
    with pytest.raises(RuntimeError, match="weights of ktk experts are frozen"):
        loss.backward()


def test_copies_share_packed_experts_and_pickle_says_what_to_do() -> None:
    model = make_model("mixtral")
    use_ktk(model)
    twin = copy.deepcopy(model)
    assert handle_of(experts_of(twin)[0]) is handle_of(experts_of(model)[0])
    assert torch.equal(run(twin)[0], run(model)[0])
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)


def test_packing_reads_bf16_without_rounding() -> None:
    module = make_module("mixtral.MixtralExperts", torch.bfloat16)
    module.config._experts_implementation = "ktk"
    x, ids, weights = routing(module, tokens=3)
    with torch.no_grad():
        module(x.bfloat16(), ids, weights)
    gate = ExactExperts(handle_of(module).moe.packed).dequantised(2).gate
    assert np.array_equal(gate, module.gate_up_proj[2, :48].detach().float().numpy())


@pytest.mark.parametrize("weight_format", ["int4", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_saves_and_loads_bit_equal(
    family: str, weight_format: str, tmp_path: Path
) -> None:
    model = make_model(family)
    use_ktk(model, weight_format)
    want = run(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert list((tmp_path / "saved").glob("model-00002-of-*.safetensors"))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for got, expected in zip(run(loaded), want, strict=True):
        assert torch.equal(got, expected)
    loaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "saved").glob("ktk-experts-*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert torch.equal(run(again)[0], want[0])


def test_saving_writes_the_directory_that_convert_writes(tmp_path: Path) -> None:
    make_model("qwen3_moe", torch.bfloat16).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "packed", quant_method="int4", group_size=64)
    config = ktk.KtkConfig(weight_format="int4", group_size=64)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    loaded.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "packed").glob("ktk-experts-*"):
        assert file.read_bytes() == (tmp_path / "saved" / file.name).read_bytes()
    assert ktk.MoE.load(tmp_path / "saved", 1).spec.group_size == 64
    with Checkpoint.open(tmp_path / "saved") as saved, Checkpoint.open(tmp_path / "packed") as made:
        assert set(saved.tensors) == set(made.tensors)


def test_saving_a_copy_saves_the_copy(tmp_path: Path) -> None:
    model = make_model("mixtral")
    use_ktk(model, "int8")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(tmp_path)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any()


def test_saving_again_with_fewer_layers_leaves_none_of_the_first(tmp_path: Path) -> None:
    for layers in (2, 1):
        model = make_model("mixtral", num_hidden_layers=layers)
        use_ktk(model)
        model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("ktk-*")] == ["ktk-experts-00000.safetensors"]
    assert len(experts_of(AutoModelForCausalLM.from_pretrained(tmp_path))) == 1
