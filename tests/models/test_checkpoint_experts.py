"""Every naming style is read exactly; contradictions are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk.checkpoint import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.formats.floats import bf16_to_f32
from ktk.models import FAMILIES
from make.checkpoints import (
    EXPERTS,
    FAMILY_OF,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    PER_EXPERT_STYLES,
    STYLES,
    assert_holds,
    base_config,
    bf16_like,
    make,
    open_experts,
    store,
    write_directory,
)

PREFIXES = (
    "model.layers",
    "language_model.model.layers",
    "model.language_model.layers",
    "layers",
    "backbone.layers",
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_naming_style_is_read(tmp_path: Path, style: str, dtype: str) -> None:
    expected = make(tmp_path, style, dtype, shards=2)
    experts = open_experts(tmp_path)
    assert experts.family == FAMILY_OF.get(style, style)
    assert experts.source_dtype == ("mxfp4" if style == "gpt_oss_mxfp4" else dtype)
    assert experts.num_experts_per_tok == 2
    fields = experts.spec_fields(0)
    assert (fields["num_experts"], fields["hidden_size"], fields["intermediate_size"]) == (
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
    )
    assert fields["has_gate"] is (style != "nemotron_h")
    assert fields["has_bias"] is style.startswith("gpt_oss")
    assert_holds(experts, expected)
    checkpoint = Checkpoint.open(tmp_path)
    taken = set().union(*(experts.tensor_names(layer) for layer in experts.layers))
    assert set(checkpoint.tensors) - taken == set(expected.plain)


def test_styles_of_the_tests_cover_every_family() -> None:
    assert {FAMILY_OF.get(style, style) for style in STYLES} == set(FAMILIES)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("style", ["deepseek", "fused"])
def test_every_layer_prefix_is_read(tmp_path: Path, prefix: str, style: str) -> None:
    expected = make(tmp_path, style, prefix=prefix)
    assert_holds(open_experts(tmp_path), expected)


@pytest.mark.parametrize("style", ["fused", "fused_transposed"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (32, 32), (32, 64), (64, 128)])
def test_fused_orientation_is_told_apart_at_every_ratio(
    tmp_path: Path, style: str, hidden: int, intermediate: int
) -> None:
    expected = make(tmp_path, style, sizes=(1, 2, hidden, intermediate))
    assert_holds(open_experts(tmp_path), expected)


def test_nested_text_config_is_looked_at_first(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": base_config("fused"), "num_experts": 99}
    expected = make(tmp_path, "fused", config=dict(config))
    import json

    config["hidden_size"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_holds(open_experts(tmp_path), expected)


# which layers and experts


def per_expert(path: Path, **config: Any) -> dict[str, Any]:
    """The tensors of a small deepseek-style checkpoint, to be spoiled."""
    rng = np.random.default_rng(9)
    tensors: dict[str, Any] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for role, shape in (
                ("gate", (INTERMEDIATE, HIDDEN)),
                ("up", (INTERMEDIATE, HIDDEN)),
                ("down", (HIDDEN, INTERMEDIATE)),
            ):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"
                tensors[name] = store(bf16_like(rng, *shape), "bf16")
    return tensors


def refuses(path: Path, tensors: dict[str, Any], match: str, **config: Any) -> None:
    merged = {**base_config("deepseek"), **config}
    write_directory(path, tensors, {k: v for k, v in merged.items() if v is not None})
    with pytest.raises(CheckpointError, match=match):
        _ = open_experts(path).num_experts_per_tok


def test_dense_layers_and_prediction_layers_are_left_alone(tmp_path: Path) -> None:
    tensors = per_expert(tmp_path)
    tensors = {name.replace("layers.1.", "layers.2."): t for name, t in tensors.items()}
    tensors["model.layers.1.mlp.gate_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.mlp.shared_experts.gate_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.mlp.shared_expert.gate_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = np.zeros((2, 2), np.float32)
    write_directory(tmp_path, tensors, {**base_config("deepseek"), "num_hidden_layers": 3})
    experts = open_experts(tmp_path)
    assert experts.layers == (0, 2)
    assert not any("shared" in name or "mtp" in name for name in experts.tensor_names(0))
    with pytest.raises(CheckpointError, match="layer 1 has no experts; MoE layers: 0, 2"):
        experts.read(1, 0)
    write_directory(tmp_path, tensors, {**base_config("deepseek"), "num_hidden_layers": 2})
    assert open_experts(tmp_path).layers == (0,)


def test_one_expert_is_enough(tmp_path: Path) -> None:
    expected = make(
        tmp_path,
        "deepseek",
        sizes=(1, 1, 64, 32),
        config={**base_config("deepseek"), "num_experts_per_tok": 1},
    )
    experts = open_experts(tmp_path)
    assert experts.spec_fields(0)["num_experts"] == 1
    assert_holds(experts, expected)
    for bad in (-1, 1):
        with pytest.raises(ValueError, match="must be 0 to 0"):
            experts.read(0, bad)


@pytest.mark.parametrize("missing", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_missing_experts_are_named(tmp_path: Path, missing: list[int]) -> None:
    tensors = {
        name: t
        for name, t in per_expert(tmp_path).items()
        if not any(f"layers.1.mlp.experts.{e}." in name for e in missing)
    }
    if len(missing) == EXPERTS:  # then layer 1 is dense, as far as anyone can tell
        write_directory(tmp_path, tensors, base_config("deepseek"))
        assert open_experts(tmp_path).layers == (0,)
        return
    shown = ", ".join(map(str, missing))
    refuses(tmp_path, tensors, f"layer 1: of 3 experts .*num_experts.* missing: {shown}$")


def test_contradictions_between_tensors_and_config_are_refused(tmp_path: Path) -> None:
    tensors = per_expert(tmp_path)
    refuses(tmp_path, tensors, "missing: 3, 4", num_experts=5)
    refuses(tmp_path, tensors, "missing: 3, 4, 5, 6, 7, 8, 9, 10, ...$", num_experts=10**6)
    refuses(tmp_path, tensors, "holds expert 2, but .* says num_experts=2", num_experts=2)
    refuses(tmp_path, tensors, "number of experts is missing", num_experts=None)
    refuses(tmp_path, tensors, "hidden_size 64, .* says 63", hidden_size=63)
    refuses(tmp_path, tensors, "moe_intermediate_size 32, .* says 31", moe_intermediate_size=31)
    refuses(tmp_path, tensors, "num_experts_per_tok=None", num_experts_per_tok=None)
    refuses(tmp_path, tensors, "num_experts_per_tok=4", num_experts_per_tok=4)


@pytest.mark.parametrize(
    "key", ["num_experts", "hidden_size", "num_hidden_layers", "num_experts_per_tok"]
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, {}, [], 10**30], ids=str)
def test_config_values_of_wrong_types_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    refuses(tmp_path, per_expert(tmp_path), f"config.json: {key}", **{key: value})


@pytest.mark.parametrize("value", [[], "x", 7])
def test_nested_config_of_a_wrong_type_is_refused(tmp_path: Path, value: Any) -> None:
    refuses(tmp_path, per_expert(tmp_path), "text_config is a", text_config=value)


def spoiled(tensors: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = "model.layers.0.mlp.experts.1."
    for suffix, array in changes.items():
        name = base + suffix.replace("__", ".")
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    return tensors


BF16 = np.uint16
SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "projection missing": ({"up_proj__weight": None}, "expert 1: tensor up_proj.weight is missing"),
    "rows missing": (
        {"up_proj__weight": np.zeros((31, 64), BF16)},
        r"experts.1.up_proj.*\(31, 64\)",
    ),
    "transposed": (
        {"down_proj__weight": np.zeros((32, 64), BF16)},
        r"experts.1.down_proj.*must be \(64, 32\)",
    ),
    "three dimensions": ({"up_proj__weight": np.zeros((1, 32, 64), BF16)}, "must be a matrix"),
    "no rows": ({"up_proj__weight": np.zeros((0, 64), BF16)}, "must be a matrix"),
    "int weights": ({"up_proj__weight": np.zeros((32, 64), np.int64)}, "I64 without a scale"),
    "fp8 without scale": (
        {"up_proj__weight": ("F8_E4M3", np.zeros((32, 64), np.uint8))},
        "its scale tensor is missing",
    ),
    "fp16 with a scale": (
        {
            "up_proj__weight": ("F16", np.zeros((32, 64), np.float16)),
            "up_proj__weight_scale": np.ones(32, np.float32),
        },
        "only F8_E4M3, F8_E5M2 and mxfp4 take a scale",
    ),
    "scale of a wrong shape": (
        {
            "up_proj__weight": ("F8_E4M3", np.zeros((32, 64), np.uint8)),
            "up_proj__weight_scale": np.ones(31, np.float32),
        },
        "per channel",
    ),
    "scale of a wrong dtype": (
        {
            "up_proj__weight": ("F8_E4M3", np.zeros((32, 64), np.uint8)),
            "up_proj__weight_scale": np.ones(32, np.int64),
        },
        "scales must be one of",
    ),
    "scale of plain weights": ({"up_proj__weight_scale": np.ones(32, np.float32)}, "only F8_E4M3"),
    "gptq": ({"up_proj__qweight": np.zeros((4, 4), np.int64)}, "is named as GPTQ names it"),
    "compressed": (
        {"up_proj__weight_packed": np.zeros((4, 4), np.int64)},
        "is named as compressed-tensors",
    ),
    "unknown suffix": (
        {"up_proj__lora": np.zeros((4, 4), np.float32)},
        "does not know what this is",
    ),
    "bias of one": ({"up_proj__bias": np.zeros(32, np.float32)}, "biases of up"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_expert_is_refused(tmp_path: Path, case: str) -> None:
    changes, match = SPOILED[case]
    refuses(tmp_path, spoiled(per_expert(tmp_path), **changes), f"(?s){match}")


def test_biases_beside_per_expert_weights_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    tensors = per_expert(tmp_path)
    for name in list(tensors):
        rows = tensors[name].shape[0]
        tensors[name.replace(".weight", ".bias")] = store(bf16_like(rng, rows), "bf16")
    write_directory(tmp_path, tensors, base_config("deepseek"))
    experts = open_experts(tmp_path)
    assert experts.spec_fields(0)["has_bias"]
    bias = experts.read(1, 2).down_bias
    np.testing.assert_array_equal(
        bias, bf16_to_f32(tensors["model.layers.1.mlp.experts.2.down_proj.bias"])
    )


def test_names_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    tensors = per_expert(tmp_path)
    refuses(tmp_path, {"a": np.zeros(3, np.float32)}, "no tensor is named like an expert's")
    two = {
        **tensors,
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": np.zeros((2, 2), np.float32),
    }
    refuses(tmp_path, two, "several naming styles .deepseek, mixtral.")
    prefixes = {**tensors, "layers.0.mlp.experts.0.gate_proj.weight": np.zeros((2, 2), np.float32)}
    refuses(tmp_path, prefixes, "layer 0 occurs under layers and model.layers")
    zeros = {name.replace("experts.1.", "experts.01."): t for name, t in tensors.items()}
    refuses(tmp_path, zeros, "missing: 1")


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((3, 64, 64), (3, 64, 31)), "do not fit"),
        (((3, 64, 60), (3, 64, 32)), "do not fit"),
        (((3, 64, 64), (2, 64, 32)), "must be 3"),
        (((2, 64, 64), (2, 64, 32)), "missing: 2"),
        (((4, 64, 64), (4, 64, 32)), "says num_experts=3"),
        (((64, 64), (64, 32)), "says num_experts=3"),
        (((3, 64, 64), None), "down_proj is missing"),
    ],
)
def test_stacked_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, shapes: Any, match: str
) -> None:
    names = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    tensors = {n: np.zeros(s, np.float32) for n, s in zip(names, shapes, strict=True) if s}
    refuses(tmp_path, tensors, match)


def test_stacked_biases_of_an_unknown_model_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "gpt_oss", config={**base_config("gpt_oss"), "model_type": "cousin_of_gpt_oss"})
    with pytest.raises(
        CheckpointError, match="'cousin_of_gpt_oss' ktk does not know whether gate and up alternate"
    ):
        open_experts(tmp_path)


# activations


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, Activation.silu()),
        ({"hidden_act": None}, Activation.silu()),
        ({"hidden_act": "swish"}, Activation.silu()),
        ({"hidden_act": "gelu_pytorch_tanh"}, Activation.gelu_tanh()),
        ({"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}, Activation.gelu_tanh()),
        ({"hidden_act": "relu2"}, Activation.relu2()),
        ({"mlp_hidden_act": "relu2"}, Activation.relu2()),
        ({"swiglu_limit": 10.0}, Activation.silu(10.0)),
        ({"swiglu_limit": 0}, Activation.silu()),
        ({"hidden_act": "swigluoai"}, Activation.swigluoai(1.702, 7.0)),
        ({"swiglu_alpha": 1.5, "swiglu_limit": 6}, Activation.swigluoai(1.5, 6.0)),
        ({"model_type": "gpt_oss"}, Activation.swigluoai(1.702, 7.0)),
        (
            {"model_type": "minimax_m3_vl_text", "swiglu_limit": 5.0},
            Activation.swigluoai(1.702, 5.0),
        ),
    ],
)
def test_activation_follows_the_config(
    tmp_path: Path, config: dict[str, Any], wanted: Activation
) -> None:
    merged = {**base_config("deepseek"), **config}
    write_directory(
        tmp_path, per_expert(tmp_path), {k: v for k, v in merged.items() if v is not None}
    )
    assert open_experts(tmp_path).spec_fields(0)["activation"] == wanted


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not an activation ktk has"),
        ({"hidden_act": 3}, "hidden_act=3"),
        ({"hidden_act": ["silu"]}, "hidden_act="),
        ({"hidden_act": "gelu_pytorch_tanh", "swiglu_limit": 7.0}, "only silu is clamped"),
        ({"swiglu_limit": "7"}, "swiglu_limit='7'"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit"),
        ({"swiglu_alpha": True}, "swiglu_alpha"),
        (
            {"model_type": "muse_spark"},
            "'muse_spark' is not supported: the experts' output is normalised",
        ),
        (
            {"model_type": "muse_spark", "text_config": {"model_type": "muse_spark_text"}},
            "'muse_spark' is not supported",
        ),
        (
            {
                "model_type": "ernie4_5_vl_moe",
                "text_config": {"model_type": "ernie4_5_vl_moe_text"},
            },
            "'ernie4_5_vl_moe' is not supported: text and images have experts of their own",
        ),
    ],
)
def test_activation_ktk_lacks_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], match: str
) -> None:
    refuses(tmp_path, per_expert(tmp_path), match, **config)


def test_module_of_every_per_expert_style_is_in_its_example() -> None:
    for style, (module, *_) in PER_EXPERT_STYLES.items():
        assert module in FAMILIES[style].example
