"""GGUF models as input: packed directories of their experts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ktk
from ktk.checkpoint import list_layers, read_config, read_layer
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.convert.run import Progress, convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.models.find import find_gguf_experts
from ktk.quantise.pack import pack_experts
from make import gguf_files
from make.conversions import tiny_gguf

F = np.float32


@pytest.mark.parametrize("method", ["int4", "int8", "bf16"])
def test_a_gguf_becomes_a_packed_directory(tmp_path: Path, method: str) -> None:
    source = find_gguf_experts(GgufCheckpoint.open(tiny_gguf(tmp_path / "m.gguf")))
    summary = convert(tmp_path / "m.gguf", tmp_path / "out", quant_method=method, threads=2)
    packed = read_config(tmp_path / "out")
    assert packed.layers == (0, 2)
    assert (packed.family, packed.source_dtype) == ("qwen3moe", "gguf Q8_0")
    config = packed.config
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == (
        "qwen3moe",
        3,
        64,
    )
    assert (config["num_experts"], config["num_experts_per_tok"], config["norm_topk_prob"]) == (
        4,
        2,
        True,
    )
    for layer, spec in packed.specs.items():
        blocks = source.experts(layer)
        want = pack_experts(spec, lambda e, blocks=blocks: expert_weights(blocks, e))
        np.testing.assert_array_equal(read_layer(tmp_path / "out", layer).data, want.data)
    assert "experts only" in summary.notes[0]
    assert summary.weight_format == method and summary.num_layers == 2
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_a_packed_gguf_runs(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", quant_method="int8")
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 64)).astype(F)
    ids, weights = rng.integers(0, 4, (5, 2)), rng.random((5, 2)).astype(F)
    got = ktk.MoE.load(tmp_path / "out", 2).forward(x, ids, weights)
    blocks = find_gguf_experts(GgufCheckpoint.open(tmp_path / "m.gguf")).experts(2)
    want = np.zeros_like(x)
    for token in range(5):
        for slot in range(2):
            e = expert_weights(blocks, int(ids[token, slot]))
            assert e.gate is not None
            g, u = e.gate @ x[token], e.up @ x[token]
            want[token] += weights[token, slot] * (e.down @ (g / (1 + np.exp(-g)) * u))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_output_scales_go_into_the_down_projections(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    tensors: dict[str, Any] = dict(gguf_files.stacked(rng, (0,), ("gate_up", "down")))
    scale = np.array([0.5, 1, 2, 4], F)
    tensors["blk.0.ffn_down_exps.scale"] = scale
    metadata = gguf_files.sizes("gemma4", block_count=1)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "gemma4", tensors, metadata)
    summary = convert(path, tmp_path / "out", quant_method="bf16")
    assert any("output scales" in note for note in summary.notes)
    blocks = find_gguf_experts(GgufCheckpoint.open(path)).experts(0)

    def read_expert(expert: int) -> ktk.experts.stored.ExpertWeights:
        weights = expert_weights(blocks, expert)
        return weights._replace(down=weights.down * scale[expert])

    spec = read_config(tmp_path / "out").specs[0]
    assert spec.activation == ktk.Activation.gelu_tanh()
    want = pack_experts(spec, read_expert)
    np.testing.assert_array_equal(read_layer(tmp_path / "out", 0).data, want.data)


def test_bad_metadata_is_met_before_anything_is_written(tmp_path: Path) -> None:
    tensors = gguf_files.stacked(np.random.default_rng(0), (0,))
    metadata = gguf_files.sizes("qwen3moe", block_count=1, expert_used_count=9)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "qwen3moe", tensors, metadata)
    with pytest.raises(CheckpointError, match="expert_used_count=9: must be at most 4"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weighed_inputs_are_noted(tmp_path: Path) -> None:
    tensors = gguf_files.stacked(np.random.default_rng(0), (0,))
    metadata = gguf_files.sizes("llama4", block_count=1)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "llama4", tensors, metadata)
    assert any("input" in n for n in convert(path, tmp_path / "out").notes)


def test_a_gguf_conversion_resumes(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "whole", threads=1)

    def stop(progress: Progress) -> None:
        if progress.what == "layer 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m.gguf", tmp_path / "out", threads=1, progress=stop)
    assert list_layers(tmp_path / "out") == (0,)
    with pytest.raises(CheckpointError, match="did not finish"):
        read_config(tmp_path / "out")
    summary = convert(tmp_path / "m.gguf", tmp_path / "out", resume=True)
    assert summary.reused_layers == 1
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "out")) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    tiny_gguf(tmp_path / "m.gguf", some_key=1)
    with pytest.raises(ValueError, match="source file m.gguf changed since the conversion began"):
        convert(tmp_path / "m.gguf", tmp_path / "out", resume=True)


def test_a_directory_of_a_split_gguf_converts(tmp_path: Path) -> None:
    tensors = gguf_files.stacked(np.random.default_rng(0), (0, 1, 2))
    (tmp_path / "in").mkdir()
    gguf_files.write_gguf(
        tmp_path / "in" / "m.gguf",
        "qwen3moe",
        tensors,
        gguf_files.sizes("qwen3moe"),
        split_max_tensors=4,
    )
    convert(tmp_path / "in", tmp_path / "out", quant_method="int8")
    assert list_layers(tmp_path / "out") == (0, 1, 2)
    with pytest.raises(ValueError, match="lies in the input"):
        convert(tmp_path / "in", tmp_path / "in" / "out", quant_method="int8")


@pytest.mark.parametrize(
    ("options", "output", "text"),
    [
        ({"input_type": "bf16"}, "out", "a GGUF file says its types"),
        ({"quant_method": "q4_0"}, "n.gguf", "GGUF to GGUF adds one error to another"),
    ],
)
def test_options_a_gguf_input_does_not_take(
    tmp_path: Path, options: dict[str, Any], output: str, text: str
) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=text):
        convert(tmp_path / "m.gguf", tmp_path / output, **options)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_gguf_that_holds_nan_names_the_expert(tmp_path: Path) -> None:
    tensors = gguf_files.stacked(np.random.default_rng(0), (0,))
    blocks, _ = tensors["blk.0.ffn_up_exps.weight"]
    blocks[3, 0, :2] = 255  # the first block's scale
    metadata = gguf_files.sizes("qwen3moe", block_count=1)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "qwen3moe", tensors, metadata)
    with pytest.raises(CheckpointError, match="layer 0 expert 3: .*NaN or inf"):
        convert(path, tmp_path / "out")


def test_the_wrapper_takes_a_packed_gguf(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", quant_method="int8")
    wrapper = ktk.KTMoEWrapper(
        2,
        num_experts=4,
        num_experts_per_tok=2,
        hidden_size=64,
        moe_intermediate_size=32,
        method="NUMPY",
        weight_format="int8",
        weight_path=str(tmp_path / "out"),
    )
    wrapper.load_weights()
    x = np.random.default_rng(2).standard_normal((5, 64)).astype(F)
    ids, weights = np.tile([1, 3], (5, 1)), np.full((5, 2), 0.5, F)
    moe = ktk.MoE.load(tmp_path / "out", 2, method="NUMPY")
    got = wrapper.forward(torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights))
    np.testing.assert_array_equal(got.numpy(), moe.forward(x, ids, weights))
