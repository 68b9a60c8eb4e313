"""What vLLM asks of a layer, in ktk's words, and the plug-in itself over stand-ins of vLLM's
classes: vLLM is not installed where these tests run. test_vllm.py is where it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ktk.checkpoint.packed import write_layer
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.rotation import Rotation
from ktk.integration.vllm.layer import activation_of, read_expert, refusal
from ktk.integration.vllm.options import Options
from ktk.machine import threads as engine
from ktk.ops.moe import MoE

E, H, INTER = 3, 64, 32
PARALLEL = {"use_ep": False, "enable_eplb": False, "tp_size": 1, "dp_size": 1, "pcp_size": 1}


def make_layer(activation: str = "silu", has_bias: bool = False, **changes: Any) -> Any:
    """Like vLLM's RoutedExperts with random weights; changes to it, its config or its parallel
    config by name.
    """
    parallel = {name: changes.pop(name, value) for name, value in PARALLEL.items()}
    moe = {
        "moe_parallel_config": SimpleNamespace(**parallel),
        "is_lora_enabled": False,
        "num_experts": E,
        "num_logical_experts": E,
        "num_local_experts": E,
        "hidden_dim": H,
        "intermediate_size_per_partition": INTER,
        "activation": SimpleNamespace(value=activation),
        "is_act_and_mul": not activation.endswith("_no_mul"),
        "has_bias": has_bias,
        "swiglu_limit": None,
        "swiglu_alpha": None,
        "swiglu_beta": None,
    }
    moe |= {name: changes.pop(name) for name in list(changes) if name in moe}
    rows = (1 + moe["is_act_and_mul"]) * INTER
    random = torch.Generator().manual_seed(3)
    weights = {
        "w13_weight": torch.randn(E, rows, H, generator=random),
        "w2_weight": torch.randn(E, H, INTER, generator=random),
    }
    if has_bias:
        weights["w13_bias"] = torch.randn(E, rows, generator=random)
        weights["w2_bias"] = torch.randn(E, H, generator=random)
    fields = {"layer_name": "model.layers.1.mlp.experts", "apply_router_weight_on_input": False}
    return SimpleNamespace(**{**fields, **changes}, moe_config=SimpleNamespace(**moe), **weights)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_ep": True}, "enable_expert_parallel"),
        ({"enable_eplb": True}, "enable_eplb"),
        ({"tp_size": 2}, "tensor_parallel_size.*leave it out"),
        ({"dp_size": 2}, "data_parallel_size"),
        ({"pcp_size": 2}, "prefill_context_parallel_size"),
        ({"is_lora_enabled": True}, "enable_lora"),
        ({"apply_router_weight_on_input": True}, "multiply the experts' input"),
        ({"num_experts": 4}, "redundant"),
        ({"activation": "gelu"}, "'gelu': ktk has no kernel"),
        ({"activation": "swigluoai_uninterleave"}, "swigluoai_uninterleave"),
    ],
)
def test_what_ktk_does_not_run_is_named(changes: dict[str, Any], said: str) -> None:
    reason = refusal(make_layer(**changes))
    assert reason is not None
    with pytest.raises(ValueError, match=said):
        raise ValueError(reason)
    assert refusal(make_layer()) is None


def test_activations_are_those_of_vllm() -> None:
    def found(name: str, **numbers: float) -> Activation | None:
        return activation_of(make_layer(name, **numbers).moe_config)

    assert found("silu") == found("silu_no_mul") == Activation.silu()
    assert found("silu", swiglu_limit=7.0) == Activation.silu(7.0)
    assert found("gelu_tanh") == found("gelu_tanh_no_mul") == Activation.gelu_tanh()
    assert found("relu2_no_mul") == Activation.relu2()
    assert found("swigluoai") == Activation.swigluoai()
    of_layer = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
    assert found("swigluoai_uninterleave", **of_layer) == Activation.swigluoai()
    for name in ("gelu", "gelu_no_mul", "situ", "relu2", "swiglustep"):
        assert found(name) is None, name


@pytest.mark.parametrize("has_bias", [False, True])
def test_gate_and_up_come_one_after_the_other_or_in_turns(has_bias: bool) -> None:
    for name in ("silu", "swigluoai"):
        layer = make_layer(name, has_bias)
        halves = slice(0, INTER), slice(INTER, None)
        gate, up = (slice(0, None, 2), slice(1, None, 2)) if name == "swigluoai" else halves
        read = read_expert(layer, 2)
        assert read.gate is not None
        np.testing.assert_array_equal(layer.w13_weight[2, gate].numpy(), read.gate)
        np.testing.assert_array_equal(layer.w13_weight[2, up].numpy(), read.up)
        np.testing.assert_array_equal(layer.w2_weight[2].numpy(), read.down)
        if has_bias:
            np.testing.assert_array_equal(layer.w13_bias[2, gate].numpy(), read.gate_bias)
            np.testing.assert_array_equal(layer.w13_bias[2, up].numpy(), read.up_bias)
            np.testing.assert_array_equal(layer.w2_bias[2].numpy(), read.down_bias)
    plain = read_expert(make_layer("relu2_no_mul"), 0)
    assert plain.gate is None and plain.up.shape == (INTER, H)


def test_a_bias_that_is_not_a_number_is_refused() -> None:
    layer = make_layer(has_bias=True)
    layer.w2_bias[1, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        read_expert(layer, 1)


def test_options_of_the_command_line_win_over_those_of_the_model() -> None:
    said = {"quant_method": "ktk", "weight_format": "int4", "rotation": [64, 3]}
    found = Options.of(said, {"group_size": 64, "num_threads": 2})
    assert found == Options("int4", 64, None, Rotation(64, 3), "auto", 2)
    assert Options.of({}).spec(1, 128, 128).weight_format == "int8"
    assert Options.of({}, {"method": "INT4"}).spec(1, 128, 128).weight_format == "int4"
    packed = {"quant_method": "ktk", "layout_version": 1, "layers": [0], "family": "x"}
    assert Options.of(packed, {"num_threads": 1}) == Options(num_threads=1, is_packed=True)


@pytest.mark.parametrize(
    ("said", "over", "error"),
    [
        ({"wieght_format": "int4"}, None, "no option wieght_format: it takes activation_group"),
        ({}, "INT4", "must be an object"),
        ({}, {"num_threads": 0}, "num_threads=0"),
        ({}, {"num_threads": True}, "num_threads=True"),
        ({}, {"method": "INT3"}, "INT3"),
        ({}, {"method": "INT4", "weight_format": "int8"}, "runs int4 weights"),
        ({}, {"weight_format": "int8", "group_size": 48}, "group_size"),
        ({}, {"rotation": 32}, "rotation"),
    ],
)
def test_options_that_cannot_be_are_refused(said: Any, over: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Options.of(said, over)


@pytest.fixture(scope="module")
def stand_ins() -> Iterator[SimpleNamespace]:
    """The plug-in's modules over stand-ins of vLLM's; ``layers``, what a forward pass may find;
    ``config``, vLLM's own.
    """

    class Base:
        def __init__(self, moe: Any) -> None:
            self.moe = moe

        def create_weights(self, layer: Any, num_experts: int, *rest: Any, **more: Any) -> None:
            layer.created = num_experts

    class Config:
        pass

    layers: dict[str, Any] = {}
    config, registered = SimpleNamespace(additional_config={}), {}
    layer_type = type(make_layer())
    linear = type("LinearBase", (), {})
    deep = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.forward_context": {
            "get_forward_context": lambda: SimpleNamespace(no_compile_layers=layers)
        },
        f"{deep}.fused_moe": {"RoutedExperts": layer_type},
        f"{deep}.linear": {"LinearBase": linear, "UnquantizedLinearMethod": type("Plain", (), {})},
        f"{deep}.quantization": {
            "register_quantization_config": lambda name: lambda cls: registered.update({name: cls})
        },
        f"{deep}.quantization.base_config": {"QuantizationConfig": Config},
        f"{deep}.quantization.online.moe_base": {"OnlineMoEMethodBase": Base},
        "vllm.model_executor.models.utils": {
            "extract_layer_index": lambda name: int(name.split(".")[2])
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, held in contents.items():
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                whole = ".".join(parts[:i])
                if whole not in sys.modules:
                    patch.setitem(sys.modules, whole, ModuleType(whole))
            vars(sys.modules[name]).update(held)
        plugin = importlib.import_module("ktk.integration.vllm.plugin")
        plugin.register()
        plugin.register()
        yield SimpleNamespace(
            quantization=registered["ktk"], layers=layers, config=config, linear=linear
        )
        for name in ("plugin", "experts"):
            sys.modules.pop(f"ktk.integration.vllm.{name}")


needs_stand_ins = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM itself is here"
)


def run(made: SimpleNamespace, method: Any, layer: Any) -> torch.Tensor:
    """A forward pass of two tokens."""
    made.layers[layer.layer_name] = SimpleNamespace(
        routed_experts=SimpleNamespace(quant_method=method)
    )
    return method.apply(layer, *routed(), None, None)


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, H, generator=random)
    return hidden, torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 2], [1, 2]])


@needs_stand_ins
def test_a_layer_is_packed_let_go_and_run(stand_ins: SimpleNamespace) -> None:
    threads = engine.acquire(engine.Holder(), None).num_threads  # those of layers before, if any
    asked = {"weight_format": "int4", "num_threads": threads}
    stand_ins.config.additional_config = {"ktk": asked}
    layer = make_layer()
    w13, w2 = layer.w13_weight.clone(), layer.w2_weight.clone()
    method = stand_ins.quantization().get_quant_method(layer, layer.layer_name)
    assert method.uses_meta_device and method.get_fused_moe_quant_config(layer) is None
    method.create_weights(layer, E, H, INTER, torch.float32)
    assert layer.created == E
    method.process_weights_after_loading(layer)
    assert layer.w13_weight.numel() == layer.w2_weight.numel() == 0
    method.process_weights_after_loading(layer)  # as vLLM does for all layers at the end

    hidden, weights, ids = routed()
    own = MoE.from_weights(w13[:, :INTER], w13[:, INTER:], w2, weight_format="int4")
    torch.testing.assert_close(
        run(stand_ins, method, layer), own(hidden, ids, weights), rtol=0, atol=0
    )


@needs_stand_ins
def test_packed_layers_are_read_and_must_fit(stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    layer = make_layer(activation="gelu_tanh")
    own = MoE.from_weights(
        layer.w13_weight[:, :INTER],
        layer.w13_weight[:, INTER:],
        layer.w2_weight,
        activation=Activation.gelu_tanh(),
        weight_format="int8",
    )
    write_layer(tmp_path, own.spec, 1, own.packed.data)
    stand_ins.config.additional_config = {"ktk": {"num_threads": own.num_threads}}
    quantization = stand_ins.quantization.from_config({"layout_version": 1})
    quantization.maybe_update_config(str(tmp_path), hf_config=None)
    method = quantization.get_quant_method(layer, layer.layer_name)
    method.create_weights(layer, E, H, INTER, torch.float32)
    assert not method.uses_meta_device and not hasattr(layer, "created")
    method.process_weights_after_loading(layer)
    hidden, weights, ids = routed()
    want = own(hidden, ids, weights)
    torch.testing.assert_close(run(stand_ins, method, layer), want, rtol=0, atol=0)

    other = make_layer(intermediate_size_per_partition=16)
    method = quantization.get_quant_method(other, other.layer_name)
    with pytest.raises(CheckpointError, match=r"holds \(3, 64, 32\).*asks for \(3, 64, 16\)"):
        method.process_weights_after_loading(other)


@needs_stand_ins
def test_the_rest_of_a_model_stays_vllms_own(stand_ins: SimpleNamespace) -> None:
    made = stand_ins.quantization()
    assert type(made.get_quant_method(stand_ins.linear(), "q_proj")).__name__ == "Plain"
    assert made.get_quant_method(object(), "embed_tokens") is None
    assert made.get_name() == "ktk" and made.get_config_filenames() == []
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts: enable_lora"):
        made.get_quant_method(make_layer(is_lora_enabled=True), "")
