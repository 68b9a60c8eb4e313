"""Checkpoints and packed directories, loaded with ktk's experts: from_pretrained, load_model."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

import ktk
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.integration.transformers import KtkConfig, load_model, quantizer, use_ktk
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.loading import packed_modules
from ktk.integration.transformers.packing import ModulePacker
from ktk.integration.transformers.sources import layer_of
from make.transformers_cases import FAMILIES, experts_of, make_model, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("model.language_model.layers.11.mlp.experts", 11),
        ("h.0.moe", 0),
    ],
)
def test_layer_of(name: str, layer: int) -> None:
    assert layer_of(name) == layer


def test_layer_of_a_name_without_number_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no layer number"):
        layer_of("model.experts")


def test_config_packs_a_float_checkpoint_while_it_loads(tmp_path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KtkConfig("int8"))
    same = make_model("mixtral")
    use_ktk(same, "int8")
    assert all("int8" in row.kernel for row in packed_modules(loaded))
    assert torch.equal(run(loaded)[0], run(same)[0])


def test_a_method_of_another_weight_format_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="weight_format='int4': method='INT8' runs int8 weights"):
        ktk.KtkConfig(method="INT8", weight_format="int4")
    with pytest.raises(ValueError, match="give that format, or method="):
        ktk.KtkConfig(method="INT4")
    assert ktk.KtkConfig("int4", method="AMXINT4").weight_format == "int4"


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_packs_what_packing_a_loaded_model_packs(family: str, tmp_path: Path) -> None:
    make_model(family, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    config = ktk.KtkConfig(method="auto", weight_format="int4", group_size=32)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(".experts." in name for name in loaded.state_dict())
    same = AutoModelForCausalLM.from_pretrained(tmp_path)
    use_ktk(same, "int4", group_size=32)
    for got, want in zip(experts_of(loaded), experts_of(same), strict=True):
        assert np.array_equal(handle_of(got).moe.packed.data, handle_of(want).moe.packed.data)


def test_loading_holds_one_parameter_in_float_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path)
    given: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    add = ModulePacker.add

    def watched(self: ModulePacker, name: str, weight: torch.Tensor) -> None:
        alive.append(sum(ref() is not None for ref in given))
        given.append(weakref.ref(weight))
        add(self, name, weight)

    monkeypatch.setattr(ModulePacker, "add", watched)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KtkConfig("int8"))
    assert len(alive) == 8
    assert max(alive) <= 1


def test_a_checkpoint_whose_experts_are_spoiled_says_which(tmp_path: Path) -> None:
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts: expert 2: down: .* NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KtkConfig("int8"))


def test_config_refuses_what_it_does_not_know() -> None:
    for arguments, match in (
        ({"linear": "int3"}, "linear='int3': must be one of file, int8, int4, none"),
        ({"weight_format": "int3"}, "int3"),
        ({"method": "FAST"}, "is unknown"),
    ):
        with pytest.raises(ValueError, match=match):
            KtkConfig(**arguments)
    for groups in (
        {"group_size": 33},
        {"group_size": "32"},
        {"group_size": -1},
        {"activation_group": 7},
    ):
        with pytest.raises(ValueError, match=next(iter(groups))):
            KtkConfig("int4", **groups)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option weight_fromat: it takes weight_format"):
        KtkConfig(weight_fromat="int4")


def test_config_packs_linear_layers_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    asked: list[tuple[torch.nn.Module, str]] = []
    monkeypatch.setattr(quantizer, "run_linears", lambda *given: asked.append(given))
    config = KtkConfig("int8", linear="int4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert asked == [(loaded, "int4")]
    with pytest.raises(ValueError, match="linear layers are packed as int4"):
        loaded.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KtkConfig("int8"))
    plain.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", quantization_config=config)
    assert asked[1:] == [(again, "int4")]


def test_config_on_a_quantised_checkpoint_is_refused_by_transformers(tmp_path: Path) -> None:
    """from_pretrained raises before it asks ktk; README names load_model for it."""
    make_model("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="FineGrainedFP8Config .* KtkConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KtkConfig())


def test_load_model_of_a_float_checkpoint_is_exact(tmp_path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    want = run(make_model("qwen3_moe"), "eager")[0]
    assert (run(load_model(tmp_path))[0] - want).abs().max() <= 1e-4
    named = load_model(tmp_path, method="NUMPY")
    assert all(row.kernel == "numpy fp32" for row in packed_modules(named))
    with pytest.raises(ValueError, match="is unknown"):
        load_model(tmp_path, method="FAST")
    with pytest.raises(CheckpointError, match="must be a directory"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("weight_format", ["int8", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_directory_loads_and_equals_packing_in_memory(
    family: str, weight_format: str, tmp_path
) -> None:
    make_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "packed", quant_method=weight_format)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same = make_model(family)
    use_ktk(same, weight_format)
    assert [row.kernel for row in packed_modules(loaded)] == [
        row.kernel for row in packed_modules(same)
    ]
    got, want = run(loaded), run(same)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert packed_modules(load_model(tmp_path / "packed", method="NUMPY"))[0].kernel.startswith(
        "numpy"
    )


def test_packed_directory_of_another_shape_is_refused(tmp_path) -> None:
    make_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "packed", quant_method="int8")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["intermediate_size"] = 96
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the model's config says"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
