"""transformers with its experts on ktk: every family's experts, whole models, packing, loading."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

import ktk
from ktk import backends
from ktk.checkpoint import Checkpoint
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.integration.transformers import KtkConfig, load_model, quantizer, recognise, use_ktk
from ktk.integration.transformers.experts import find_experts, handle_of
from ktk.integration.transformers.loading import packed_modules
from ktk.integration.transformers.packing import ModulePacker
from ktk.integration.transformers.sources import layer_of
from ktk.reference.moe import ExactExperts
from make.transformers_cases import (
    FAMILIES,
    MODULES,
    experts_of,
    make_model,
    make_module,
    odd_module,
    prompt,
    put_weights,
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


def compare(module: torch.nn.Module, tokens: int = 19) -> None:
    x, ids, weights = routing(module, tokens)
    with torch.no_grad():
        module.config._experts_implementation = "eager"
        want = module(x * 3, ids, weights)
        module.config._experts_implementation = "ktk"
        got = module(x * 3, ids, weights)
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("name", MODULES)
def test_module_gives_its_own_result(name: str) -> None:
    module = make_module(name)
    assert recognise(module) == MODULES[name][1]
    compare(module)


def test_unknown_activation_with_biases_and_interleaved_rows_falls_back_to_the_module() -> None:
    module = odd_module()
    assert recognise(module) is None
    compare(module, tokens=300)  # more than one step of the fallback


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


# --- packing in place -----------------------------------------------------------------------------


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
    compare(module)
    first = handle_of(module)
    compare(module)
    assert handle_of(module) is first
    with torch.no_grad():
        module.down_proj.mul_(2)
    compare(module)
    assert handle_of(module) is not first
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.detach() * 3)
    compare(module)


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


def test_saving_what_no_packed_directory_holds_is_refused(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    loaded = load_model(plain, gguf=file)
    if not handle_of(experts_of(loaded)[0]).moe.packed.is_packed:
        with pytest.raises(ValueError, match="Q8_0 blocks of its file"):
            loaded.save_pretrained(tmp_path / "saved")
    loaded = load_model(plain, "NUMPY", gguf=file)
    loaded.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", "NUMPY")
    assert torch.equal(run(again)[0], run(loaded)[0])


# --- loading --------------------------------------------------------------------------------------


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


# --- experts of a GGUF file -----------------------------------------------------------------------

# Rows must be whole blocks of 32.
WHOLE_BLOCKS = {"qwen3_moe": {"moe_intermediate_size": 64}, "mixtral": {"intermediate_size": 96}}


def plain_and_gguf(family: str, tmp_path: Path, method: str = "q8_0") -> tuple[Path, Path]:
    """A tiny float directory, and the GGUF file of its experts."""
    model = make_model(family, torch.bfloat16, **WHOLE_BLOCKS.get(family, {}))
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "experts.gguf", quant_method=method)
    return tmp_path / "plain", tmp_path / "experts.gguf"


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_gguf_file_run_in_place_of_the_directorys(family: str, tmp_path: Path) -> None:
    plain, file = plain_and_gguf(family, tmp_path)
    loaded, info = load_model(plain, dtype=torch.float32, gguf=file, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = packed_modules(loaded)
    runs = backends.backends()["LLAMAFILE"].why_not() is None
    assert all(("Q8_0" if runs else "int8") in row.kernel for row in rows)
    blocks = ktk.load_gguf(file).experts(layer_of(rows[0].name))
    if runs:
        assert rows[0].bytes == sum(m.num_bytes for m in blocks.matrices.values())
        assert rows[0].bits_per_weight == 8.5
    want = make_model(family, **WHOLE_BLOCKS.get(family, {}))
    with torch.no_grad():
        for name, module in find_experts(want):
            found = ktk.load_gguf(file).experts(layer_of(name))
            for e in range(found.spec.num_experts):
                put_weights(module, e, expert_weights(found, e))
    logits, exact = run(loaded)[0], run(want, "eager")[0]
    assert (logits - exact).abs().mean() <= 0.02 * exact.abs().mean()


def test_a_method_for_packed_weights_quantises_the_gguf_anew(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    loaded = load_model(plain, method="NUMPY", gguf=file)
    assert all(row.kernel == "numpy int8" for row in packed_modules(loaded))


def test_config_takes_a_gguf_file(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    config = KtkConfig(gguf=file, method="NUMPY")
    loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    assert torch.equal(run(loaded)[0], run(load_model(plain, "NUMPY", gguf=file))[0])
    assert json.loads(json.dumps(config.to_dict()))["gguf"] == str(file)


def test_biases_of_blocks_reach_an_activation_that_ktk_does_not_know(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("gpt_oss", tmp_path)
    loaded = load_model(plain, dtype=torch.float32, gguf=file)
    want = run(loaded)[0]
    for module in experts_of(loaded):
        handle_of(module).activation = None
    assert torch.allclose(run(loaded)[0], want, rtol=1e-2, atol=1e-2)


def test_a_gguf_of_another_model_is_refused(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    config = json.loads((plain / "config.json").read_text())
    for change, match in (
        ({"intermediate_size": 64}, "the model's config says"),
        ({"num_hidden_layers": 3}, r"experts.gguf: no packed experts for model.layers.2.mlp"),
        ({"num_hidden_layers": 1}, r"experts.gguf: packed experts of layers \[1\]"),
    ):
        (plain / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=match):
            load_model(plain, gguf=file)
    (plain / "config.json").write_text(json.dumps(config))
    convert(plain, tmp_path / "packed", quant_method="int8")
    with pytest.raises(CheckpointError, match="packed or quantised already"):
        load_model(tmp_path / "packed", gguf=file)
    with pytest.raises(CheckpointError, match="nothing.gguf"):
        load_model(plain, gguf=tmp_path / "nothing.gguf")


def test_packing_reads_bf16_without_rounding() -> None:
    module = make_module("mixtral.MixtralExperts", torch.bfloat16)
    module.config._experts_implementation = "ktk"
    x, ids, weights = routing(module, tokens=3)
    with torch.no_grad():
        module(x.bfloat16(), ids, weights)
    gate = ExactExperts(handle_of(module).moe.packed).dequantised(2).gate
    assert np.array_equal(gate, module.gate_up_proj[2, :48].detach().float().numpy())
