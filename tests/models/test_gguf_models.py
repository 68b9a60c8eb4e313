"""Experts of GGUF models: every family's names, shapes, activation and routing, as views of the file."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

import ktk
from ktk.backends import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.stored import StoredExperts
from ktk.models.arch import BY_GGUF_NAME
from ktk.models.find import find_gguf_experts
from ktk.models.gguf.experts import GgufExperts
from ktk.models.gguf.routing import Routing
from make.gguf_files import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    expert_shapes,
    quantised,
    random_blocks,
    sizes,
    stacked,
    write_gguf,
)

SILU, FUSED = Activation.silu(), ("gate_up", "down")
# id -> (architecture, projections as written, further metadata, activation, routing)
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], Activation, Routing]] = {
    "mixtral": ("llama", ("gate", "up", "down"), {}, SILU, Routing("softmax", True)),
    "qwen2moe": ("qwen2moe", ("gate", "up", "down"), {}, SILU, Routing("softmax", False)),
    "qwen3moe": ("qwen3moe", ("gate", "up", "down"), {}, SILU, Routing("softmax", True)),
    "qwen3next": ("qwen3next", FUSED, {}, SILU, Routing("softmax", True)),
    "kimi-k2": (
        "deepseek2",
        ("gate", "up", "down"),
        {
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "leading_dense_block_count": 1,
        },
        SILU,
        Routing("sigmoid", True, 2.5, 1, 1),
    ),
    "deepseek-v2": ("deepseek2", ("gate", "up", "down"), {}, SILU, Routing("softmax", False)),
    "glm4moe": ("glm4moe", ("gate", "up", "down"), {}, SILU, Routing("sigmoid", None)),
    "gpt-oss": (
        "gpt-oss",
        ("gate", "up", "down"),
        {},
        Activation.swigluoai(),
        Routing("softmax_of_top_k", False),
    ),
    "minimax-m2": (
        "minimax-m2",
        ("gate", "up", "down"),
        {"expert_gating_func": 2},
        SILU,
        Routing("sigmoid", True),
    ),
    "llama4": (
        "llama4",
        ("gate", "up", "down"),
        {},
        SILU,
        Routing("sigmoid", False, weighs_input=True),
    ),
    "olmoe": ("olmoe", ("gate", "up", "down"), {}, SILU, Routing("softmax", False)),
    "granitemoe": ("granitemoe", ("gate", "up", "down"), {}, SILU, Routing("softmax", True)),
    "grok": ("grok", ("gate", "up", "down"), {}, Activation.gelu_tanh(), Routing("softmax", True)),
    "gemma4": ("gemma4", FUSED, {}, Activation.gelu_tanh(), Routing("softmax", True)),
    "nemotron-h": ("nemotron_h_moe", ("up", "down"), {}, Activation.relu2(), Routing(None)),
    "deepseek4": (
        "deepseek4",
        ("gate", "up", "down"),
        {"swiglu_clamp_exp": [0.0, 10.0, 10.0]},
        Activation.silu(10.0),
        Routing(None),
    ),
}


def opened(path: Path) -> GgufExperts:
    return find_gguf_experts(GgufCheckpoint.open(path))


def family_file(path: Path, family: str, layers: tuple[int, ...] = (1, 2)) -> tuple[Path, dict]:
    """A tiny model of a family, its first layer dense; and the tensors in it."""
    architecture, parts, more, _, _ = FAMILIES[family]
    rng = np.random.default_rng(3)
    tensors: dict[str, Any] = stacked(rng, layers, parts)
    tensors["blk.0.ffn_gate.weight"] = rng.standard_normal((INTERMEDIATE, HIDDEN), np.float32)
    tensors["blk.1.ffn_gate_inp.weight"] = rng.standard_normal((EXPERTS, HIDDEN), np.float32)
    tensors["blk.1.ffn_gate_shexp.weight"] = rng.standard_normal((INTERMEDIATE, HIDDEN), np.float32)
    return write_gguf(path, architecture, tensors, sizes(architecture, **more)), tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_layers_spec_and_routing(tmp_path: Path, family: str) -> None:
    architecture, parts, _, activation, routing = FAMILIES[family]
    path, _ = family_file(tmp_path / "a.gguf", family)
    experts = opened(path)
    assert experts.architecture == architecture and experts.layers == (1, 2)
    spec = experts.spec(2)
    assert (spec.num_experts, spec.hidden_size, spec.intermediate_size) == (
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
    )
    assert spec.weight_format == "gguf" and spec.activation == activation
    assert spec.has_gate == (parts != ("up", "down")) and not spec.has_bias
    assert experts.routing == routing and experts.num_experts_per_tok == 2
    assert experts.tensor_names(2) == {f"blk.2.ffn_{part}_exps.weight" for part in parts}
    with pytest.raises(CheckpointError, match="layer 0 has no experts; MoE layers: 1, 2"):
        experts.spec(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_blocks_are_views_of_the_file(tmp_path: Path, family: str) -> None:
    path, tensors = family_file(tmp_path / "a.gguf", family)
    experts = opened(path)
    blocks = experts.experts(1)
    whole = experts.checkpoint.file_bytes(path)
    fused = tensors.get("blk.1.ffn_gate_up_exps.weight")
    for name, matrix in blocks.matrices.items():
        assert np.shares_memory(matrix.data, whole) and matrix.format.name == "Q8_0"
        if fused is not None and name != "down":
            half = slice(0, INTERMEDIATE) if name == "gate" else slice(INTERMEDIATE, None)
            np.testing.assert_array_equal(matrix.data, fused[0][:, half])
        else:
            np.testing.assert_array_equal(matrix.data, tensors[f"blk.1.ffn_{name}_exps.weight"][0])


def test_every_architecture_of_the_table_is_opened_or_refused_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, row in BY_GGUF_NAME.items():
        assert row.gguf is not None
        path = write_gguf(
            tmp_path / f"{name}.gguf", name, stacked(np.random.default_rng(1), (0,)), sizes(name)
        )
        caplog.clear()
        if row.gguf.refused:
            with pytest.raises(CheckpointError, match=row.gguf.refused):
                opened(path)
        else:
            assert opened(path).spec(0).activation == row.activation
            assert "not known" not in caplog.text


def test_an_unknown_architecture_runs_as_silu_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = stacked(np.random.default_rng(1), (0, 1))
    path = write_gguf(tmp_path / "a.gguf", "newmoe", tensors, sizes("newmoe"))
    experts = opened(path)
    assert experts.spec(0).activation == experts.spec(1).activation == SILU
    assert experts.routing == Routing(None)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "'newmoe'" in caplog.text


@pytest.mark.parametrize(
    ("types", "group"),
    [
        ((Type.Q4_K, Type.Q4_K, Type.Q4_K), 128),
        ((Type.Q4_K, Type.Q4_K, Type.Q6_K), 64),
        ((Type.IQ2_XXS, Type.IQ2_XXS, Type.Q2_K), 128),
        ((Type.Q5_1, Type.Q4_0, Type.Q4_0), 64),
        ((Type.MXFP4, Type.MXFP4, Type.MXFP4), 128),
        ((Type.BF16, Type.BF16, Type.BF16), 64),
    ],
)
def test_each_projection_has_its_type_and_the_finest_decides_the_activation_group(
    tmp_path: Path, types: tuple[Type, ...], group: int
) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        f"blk.0.ffn_{part}_exps.weight": random_blocks(rng, kind, 2, 256, 256)
        for part, kind in zip(("gate", "up", "down"), types, strict=True)
    }
    experts = opened(write_gguf(tmp_path / "a.gguf", "qwen3moe", tensors))
    blocks = experts.experts(0)
    assert tuple(m.format.name for m in blocks.matrices.values()) == tuple(k.name for k in types)
    assert blocks.spec.activation_group == group


# One tensor per expert


def singles(rng: np.random.Generator, order: str) -> dict[str, Any]:
    """Mixtral's old names; ``order`` tells how the tensors lie."""
    names = [
        f"blk.0.ffn_{part}.{e}.weight" for e in range(EXPERTS) for part in ("gate", "up", "down")
    ]
    if order == "uneven":
        names = [names[i] for i in np.random.default_rng(5).permutation(len(names))]
    elif order == "descending":
        names.reverse()
    return {
        name: quantised(rng, Type.Q8_0, *expert_shapes(name.split("_")[1].split(".")[0])[1:])
        for name in names
    }


@pytest.mark.parametrize("order", ["even", "uneven", "descending"])
def test_tensors_per_expert_are_stacked_without_a_copy_where_they_lie_evenly(
    tmp_path: Path, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = singles(np.random.default_rng(1), order)
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, sizes("llama"))
    experts = opened(path)
    with caplog.at_level(logging.INFO, "ktk"):
        blocks = experts.experts(0)
    for name, matrix in blocks.matrices.items():
        want = np.stack([tensors[f"blk.0.ffn_{name}.{e}.weight"][0] for e in range(EXPERTS)])
        np.testing.assert_array_equal(matrix.data, want)
        shared = np.shares_memory(matrix.data, experts.checkpoint.file_bytes(path))
        assert shared == (order == "even")
    assert ("uneven distances" in caplog.text) == (order != "even")
    assert len(experts.tensor_names(0)) == 3 * EXPERTS


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = singles(np.random.default_rng(1), "even")
    del tensors["blk.0.ffn_up.2.weight"]
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, sizes("llama"))
    with pytest.raises(CheckpointError, match="up holds 3 experts.*missing: 2"):
        opened(path)


def test_experts_of_several_types_in_one_projection_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = singles(rng, "even")
    tensors["blk.0.ffn_up.2.weight"] = quantised(rng, Type.Q4_0, INTERMEDIATE, HIDDEN)
    experts = opened(write_gguf(tmp_path / "a.gguf", "llama", tensors, sizes("llama")))
    with pytest.raises(CheckpointError, match="'blk.0.ffn_up.2.weight' is Q4_0"):
        experts.experts(0)


# Biases and scales


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_biases_of_gpt_oss_come_as_float32(tmp_path: Path, kind: Type) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = stacked(rng, (0,), kind=Type.MXFP4)
    want = {}
    for part in ("gate", "up", "down"):
        bias = rng.standard_normal(expert_shapes(part)[:2]).astype(np.float16).astype(np.float32)
        stored = quants.quantize(bias, kind)
        want[part] = quants.dequantize(stored, kind)
        tensors[f"blk.0.ffn_{part}_exps.bias"] = (stored, kind)
    experts = opened(write_gguf(tmp_path / "a.gguf", "gpt-oss", tensors, sizes("gpt-oss")))
    blocks = experts.experts(0)
    assert blocks.spec.has_bias and set(blocks.biases) == set(want)
    for part, bias in blocks.biases.items():
        assert bias.dtype == np.float32
        np.testing.assert_array_equal(bias, want[part])


def test_a_fused_bias_is_split_as_its_rows_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = stacked(rng, (0,), FUSED)
    bias = rng.standard_normal(expert_shapes("gate_up")[:2]).astype(np.float32)
    tensors["blk.0.ffn_gate_up_exps.bias"] = bias
    blocks = opened(write_gguf(tmp_path / "a.gguf", "qwen3next", tensors)).experts(0)
    assert set(blocks.biases) == {"gate", "up"}
    np.testing.assert_array_equal(blocks.biases["gate"], bias[:, :INTERMEDIATE])
    np.testing.assert_array_equal(blocks.biases["up"], bias[:, INTERMEDIATE:])


def test_the_output_scale_of_gemma_is_the_callers_and_others_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors: dict[str, Any] = stacked(np.random.default_rng(1), (0, 1), FUSED)
    scale = np.arange(EXPERTS, dtype=np.float32)
    tensors["blk.0.ffn_down_exps.scale"] = scale
    experts = opened(write_gguf(tmp_path / "a.gguf", "gemma4", tensors))
    np.testing.assert_array_equal(experts.output_scale(0), scale)
    np.testing.assert_array_equal(ktk.load_gguf(tmp_path / "a.gguf").output_scale(0), scale)
    assert experts.output_scale(1) is None and "output scales" in caplog.text
    tensors["blk.0.ffn_gate_up_exps.scale"] = scale
    with pytest.raises(CheckpointError, match="scales of gate and up"):
        opened(write_gguf(tmp_path / "b.gguf", "gemma4", tensors))


# Metadata and tensors that contradict each other


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"expert_count": 8}, "have experts 4, the metadata's qwen3moe.expert_count is 8"),
        ({"expert_feed_forward_length": 99}, "a width of 32.*expert_feed_forward_length is 99"),
        ({"embedding_length": 128}, "a hidden size of 64.*embedding_length is 128"),
        ({"block_count": 2}, "layer 2 has experts, but qwen3moe.block_count is 2"),
        ({"expert_count": "four"}, "'four': must be an int"),
        ({"expert_count": [4]}, "lists 1 layers: must be more than 1"),
        ({"expert_gating_func": 9}, "expert_gating_func is 9.0: ktk knows"),
        ({"expert_weights_norm": 1}, "expert_weights_norm=1: must be true or false"),
        ({"expert_weights_scale": float("nan")}, "expert_weights_scale=nan: must be a number"),
        ({"nextn_predict_layers": 3}, "nextn_predict_layers=3: must be at most 2"),
        ({"nextn_predict_layers": 2}, "no layer is left"),
    ],
    ids=str,
)
def test_contradictions_are_errors_that_say_both(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    tensors = stacked(np.random.default_rng(1), (1, 2))
    metadata = sizes("qwen3moe", **change)
    with pytest.raises(CheckpointError, match=text):
        opened(write_gguf(tmp_path / "a.gguf", "qwen3moe", tensors, metadata))


def test_shapes_stand_in_for_missing_metadata_and_per_layer_lists_are_read(tmp_path: Path) -> None:
    tensors = stacked(np.random.default_rng(1), (1, 2))
    experts = opened(write_gguf(tmp_path / "a.gguf", "qwen3moe", tensors))
    assert experts.spec(1).num_experts == EXPERTS
    with pytest.raises(CheckpointError, match="qwen3moe.expert_used_count is None"):
        _ = experts.num_experts_per_tok
    metadata = sizes("qwen3moe", expert_count=[0, 4, 4], expert_used_count=5)
    experts = opened(write_gguf(tmp_path / "b.gguf", "qwen3moe", tensors, metadata))
    with pytest.raises(CheckpointError, match="is 5: must be an int of 1 to 4"):
        _ = experts.num_experts_per_tok


def test_layers_of_multi_token_prediction_are_left_alone(tmp_path: Path) -> None:
    tensors = stacked(np.random.default_rng(1), (1, 2))
    metadata = sizes("glm4moe", nextn_predict_layers=1)
    assert opened(write_gguf(tmp_path / "a.gguf", "glm4moe", tensors, metadata)).layers == (1,)


def test_one_expert_whose_dimension_ggml_dropped_is_an_expert(tmp_path: Path) -> None:
    tensors = {n: (b[0], k) for n, (b, k) in stacked(np.random.default_rng(1), (0,)).items()}
    blocks = opened(write_gguf(tmp_path / "a.gguf", "qwen3moe", tensors)).experts(0)
    assert blocks.up.data.shape[:2] == (1, INTERMEDIATE)


def test_a_clamp_of_an_architecture_ktk_has_not_seen_clamping_is_refused(tmp_path: Path) -> None:
    tensors = stacked(np.random.default_rng(1), (0,))
    path = write_gguf(tmp_path / "a.gguf", "qwen3moe", tensors, {"qwen3moe.swiglu_clamp_exp": 7.0})
    with pytest.raises(CheckpointError, match="swiglu_clamp_exp is 7.0"):
        opened(path).spec(0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gate": None}, "no tensor for gate; has"),
        ({"down": (EXPERTS, HIDDEN, 64)}, "they do not fit"),
        ({"up": (EXPERTS + 1, INTERMEDIATE, HIDDEN)}, "they do not fit"),
        ({"down": (HIDDEN, INTERMEDIATE)}, "they do not fit"),
        ({"up": (2, 2, INTERMEDIATE, HIDDEN)}, "must be \\(experts, out, in\\)"),
        ({"gate_up": (EXPERTS, 2 * INTERMEDIATE, HIDDEN)}, "under several names"),
        ({"gate": None, "up": None, "gate_up": (EXPERTS, 33, HIDDEN)}, "33 rows: must be even"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = stacked(rng, (0,))
    for part, shape in changes.items():
        name = f"blk.0.ffn_{part}_exps.weight"
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = quantised(rng, Type.Q8_0, *shape)
    with pytest.raises(CheckpointError, match=text):
        opened(write_gguf(tmp_path / "a.gguf", "qwen3moe", tensors))


# The model


def test_a_model_is_a_mapping_of_its_layers(tmp_path: Path) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    model = ktk.load_gguf(path)
    assert model.layers == (1, 2) == tuple(model) and len(model) == 2 and 1 in model
    assert model.spec(1).num_experts == EXPERTS and model.num_experts_per_tok == 2
    assert model.metadata["general.architecture"] == "deepseek2"
    assert model.routing.expert_weights_scale == 2.5
    assert model.experts(1).up.format.name == "Q8_0" and "deepseek2, 2 MoE layers" in repr(model)
    with pytest.raises(KeyError):
        model[0]
    with pytest.raises(CheckpointError, match="layer 0 has no experts"):
        model.moe(0)


def test_a_method_or_repack_that_is_none_is_refused(tmp_path: Path) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    with pytest.raises(ValueError, match="method='Q4_K' is unknown"):
        ktk.load_gguf(path, method="Q4_K")
    model = ktk.load_gguf(path, repack="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repack='no': must be True, False or None"):
        model[1]


def test_a_model_equals_itself_alone_and_comparing_makes_no_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    model = ktk.load_gguf(path)
    monkeypatch.setattr(GgufExperts, "experts", None)
    assert model == model and model != ktk.load_gguf(path) and model != {}
    assert model in {model}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_layer_is_made_makes_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    model, experts = ktk.load_gguf(path), GgufExperts.experts
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: GgufExperts, layer: int) -> StoredExperts:
        if layer == 1:
            begun.set()
            go_on.wait(60)
        return experts(self, layer)

    monkeypatch.setattr(GgufExperts, "experts", slow)
    maker = threading.Thread(target=model.moe, args=(1,))
    maker.start()
    try:
        assert begun.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that waits for the lock is killed
            made = model[2].spec == model.spec(2)
            os._exit(0 if made else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        maker.join()


def test_the_next_layer_is_read_ahead_only_if_it_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "qwen3moe")
    made: list[Any] = []
    monkeypatch.setattr(
        "ktk.ops.gguf_model.MoE", lambda blocks, **kw: made.append((blocks, kw)) or kw
    )
    model = ktk.load_gguf(path, method="LLAMAFILE", num_threads=2, repack=False)
    asked: list[int] = []
    monkeypatch.setattr(GgufExperts, "prefetch", lambda self, layer: asked.append(layer))
    monkeypatch.setattr(GgufExperts, "is_resident", lambda self, layer: layer == 1)
    for layer in (1, 2, 1):
        model.moe(layer)
        if model._reader is not None:
            model._reader.join()
    assert asked == [2, 2]  # the layer after 2 is 1, which is there
    assert [kw for _, kw in made] == [
        {"method": "LLAMAFILE", "num_threads": 2, "repack": False}
    ] * 2


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_layer_whose_moe_has_its_own_weights_is_not_read_ahead_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_copied: bool
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "qwen3moe")
    monkeypatch.setattr("ktk.ops.gguf_model.MoE", lambda blocks, **_: None if is_copied else blocks)
    monkeypatch.setattr(GgufExperts, "is_resident", lambda self, layer: False)
    asked: list[int] = []
    monkeypatch.setattr(GgufExperts, "prefetch", lambda self, layer: asked.append(layer))
    model = ktk.load_gguf(path)
    for layer in (1, 2, 1):
        model.moe(layer)
        if model._reader is not None:
            model._reader.join()
    assert asked == ([2] if is_copied else [2, 1, 2])


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("style", ["stacked", "fused", "even", "uneven"])
def test_a_layer_of_a_model_runs(tmp_path: Path, style: str, repack: bool) -> None:
    if "LLAMAFILE" not in backends():
        pytest.skip("LLAMAFILE: no such backend")
    if reason := backends()["LLAMAFILE"].why_not():
        pytest.skip(f"LLAMAFILE: {reason}")
    rng = np.random.default_rng(2)
    tensors: dict[str, Any] = (
        stacked(rng, (0,), FUSED if style == "fused" else ("gate", "up", "down"))
        if style in ("stacked", "fused")
        else singles(rng, style)
    )
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, sizes("llama"))
    model = ktk.load_gguf(path, method="LLAMAFILE", repack=repack)
    hidden = rng.standard_normal((3, HIDDEN), np.float32)
    ids = np.array([[0, 1], [2, 3], [1, 1]])
    weights = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.5]], np.float32)
    got = model.moe(0)(hidden, ids, weights)
    assert model.moe(0) is model[0] and model._copied == ({0} if repack else set())
    values = {name: quants.dequantize(*given) for name, given in tensors.items()}
    w: dict[str, np.ndarray] = {}
    for part in ("gate", "up", "down"):
        if style == "fused" and part != "down":
            rows = slice(0, INTERMEDIATE) if part == "gate" else slice(INTERMEDIATE, None)
            w[part] = values["blk.0.ffn_gate_up_exps.weight"][:, rows]
        elif style in ("even", "uneven"):
            w[part] = np.stack([values[f"blk.0.ffn_{part}.{e}.weight"] for e in range(EXPERTS)])
        else:
            w[part] = values[f"blk.0.ffn_{part}_exps.weight"]
    want = np.zeros_like(got)
    for t, slot in np.ndindex(ids.shape):
        e = ids[t, slot]
        g, u = w["gate"][e] @ hidden[t], w["up"][e] @ hidden[t]
        want[t] += weights[t, slot] * (w["down"][e] @ (g / (1 + np.exp(-g)) * u))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
