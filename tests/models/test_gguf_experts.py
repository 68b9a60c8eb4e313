"""Experts of GGUF models: every family's names, shapes, activation and routing,
as views of the file.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

import ktk
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.models.arch import BY_GGUF_NAME
from ktk.models.find import find_gguf_experts
from ktk.models.gguf.experts import GgufExperts
from ktk.models.gguf.routing import Routing
from make.gguf_families import FAMILIES, FUSED, SILU, family_file, singles
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


def opened(path: Path) -> GgufExperts:
    return find_gguf_experts(GgufCheckpoint.open(path))


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
