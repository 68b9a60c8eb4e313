"""GGUF files of experts: what other programs read, errors, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import ktk
from ktk.checkpoint import Checkpoint
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.packed import TEMPORARY_PREFIX
from ktk.convert.plan import GGUF_METHODS
from ktk.convert.run import Progress, convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import BLOCKS
from ktk.models import find_experts
from ktk.models.arch import BY_MODEL_TYPE
from ktk.models.find import find_gguf_experts
from ktk.quantise.feedback import rows_alike
from make import gguf_files
from make.checkpoints import (
    STYLES,
    Expected,
    base_config,
    make,
    write_directory,
)

F = np.float32
BIG = (2, 3, 256, 512)  # rows of whole K blocks


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata values and tensors of a GGUF file, by name, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: t for t in reader.tensors}


def expected_blocks(expected: Expected, layer: int, projection: str, type: str) -> np.ndarray:
    experts = expected.experts[layer]
    return np.stack([rows_alike(np.ascontiguousarray(e[projection]), type) for e in experts])


@pytest.mark.parametrize("style", STYLES)
def test_every_style_gives_the_tensors_of_llama_cpp(tmp_path: Path, style: str) -> None:
    expected = make(tmp_path / "in", style, shards=2)
    output = tmp_path / "out" / "m.gguf"
    summary = convert(tmp_path / "in", output, quant_method="q8_0", threads=2)
    fields, tensors = read(output)
    names = set()
    for layer, experts in expected.experts.items():
        for projection in ("gate", "up", "down"):
            if projection not in experts[0]:
                continue
            name = f"blk.{layer}.ffn_{projection}_exps"
            names.add(f"{name}.weight")
            found = tensors[f"{name}.weight"]
            assert found.tensor_type == gguf.GGMLQuantizationType.Q8_0
            assert list(found.shape) == [*experts[0][projection].shape[::-1], len(experts)]
            want = expected_blocks(expected, layer, projection, "Q8_0")
            np.testing.assert_array_equal(found.data, want)
            if f"{projection}_bias" in experts[0]:
                names.add(f"{name}.bias")
                want = np.stack([e[f"{projection}_bias"] for e in experts])
                np.testing.assert_array_equal(tensors[f"{name}.bias"].data, want)
    assert set(tensors) == names
    assert fields["GGUF.tensor_count"] == len(names)
    assert summary.expert_bytes == sum(int(t.n_bytes) for t in tensors.values())
    assert not list(output.parent.glob(TEMPORARY_PREFIX + "*"))


@pytest.mark.parametrize("method", [m for m in GGUF_METHODS if BLOCKS[m.upper()].block > 1])
def test_every_method_writes_its_type(tmp_path: Path, method: str) -> None:
    expected = make(tmp_path / "in", "deepseek", sizes=BIG)
    output = tmp_path / "m.gguf"
    summary = convert(tmp_path / "in", output, quant_method=method, threads=2)
    fields, tensors = read(output)
    type = method.upper()
    for projection in ("gate", "up", "down"):
        found = tensors[f"blk.1.ffn_{projection}_exps.weight"]
        assert found.tensor_type.name == type
        np.testing.assert_array_equal(found.data, expected_blocks(expected, 1, projection, type))
    assert gguf.LlamaFileType(fields["general.file_type"]).name.startswith(f"MOSTLY_{type}")
    kind = BLOCKS[type]
    assert summary.weight_format == type
    assert summary.bits_per_weight == pytest.approx(kind.block_bytes * 8 / kind.block)
    assert (summary.group_size, summary.activation_group) == (0, 0)


@pytest.mark.parametrize(("method", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16)])
def test_float_methods_write_the_weights_rounded_to_nearest(
    tmp_path: Path, method: str, bits: int
) -> None:
    expected = make(tmp_path / "in", "deepseek", sizes=BIG)
    output = tmp_path / "m.gguf"
    summary = convert(tmp_path / "in", output, quant_method=method, threads=2)
    assert (summary.weight_format, summary.bits_per_weight) == (method.upper(), bits)
    checkpoint = GgufCheckpoint.open(output)
    for projection in ("gate", "up", "down"):
        name = f"blk.1.ffn_{projection}_exps.weight"
        assert checkpoint.tensors[name].type == method.upper()
        wanted = torch.stack([torch.from_numpy(e[projection]) for e in expected.experts[1]])
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[method]
        got = torch.from_numpy(checkpoint.read(name))
        assert torch.equal(got, wanted.to(dtype).float())


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    make(tmp_path / "in", "mixtral", sizes=BIG)
    for threads in (1, 3):
        convert(tmp_path / "in", tmp_path / f"{threads}.gguf", quant_method="q4_k", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_rows_that_are_not_whole_blocks_of_256_become_q8_0(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", "fused", sizes=(1, 2, 256, 96))
    output = tmp_path / "m.gguf"
    summary = convert(tmp_path / "in", output, quant_method="q6_k")
    _, tensors = read(output)
    types = [tensors[f"blk.0.ffn_{p}_exps.weight"].tensor_type.name for p in ("gate", "up", "down")]
    assert types == ["Q6_K", "Q6_K", "Q8_0"]
    np.testing.assert_array_equal(
        tensors["blk.0.ffn_down_exps.weight"].data, expected_blocks(expected, 0, "down", "Q8_0")
    )
    assert summary.weight_format == "Q6_K+Q8_0"
    assert any("down: Q8_0, as its rows of 96" in note for note in summary.notes)


@pytest.mark.parametrize("method", ["q4_k", "q8_0"])
def test_rows_that_fit_no_block_are_refused(tmp_path: Path, method: str) -> None:
    make(tmp_path / "in", "fused", sizes=(1, 2, 64, 40))
    with pytest.raises(
        ValueError, match=r"blk.0.ffn_down_exps.weight: in_features=40: .* multiple"
    ):
        convert(tmp_path / "in", tmp_path / "m.gguf", quant_method=method)
    assert os.listdir(tmp_path) == ["in"]


def test_mxfp4_experts_stay_as_they_are(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", "gpt_oss_mxfp4")
    convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="mxfp4")
    fields, tensors = read(tmp_path / "m.gguf")
    for projection in ("gate", "up", "down"):
        found = tensors[f"blk.0.ffn_{projection}_exps.weight"]
        want = np.stack([e[projection] for e in expected.experts[0]])
        np.testing.assert_array_equal(gguf.dequantize(found.data, found.tensor_type), want)
    assert fields["general.architecture"] == "gpt-oss"
    assert json.loads(fields["ktk.activation"])["alpha"] == 1.702


def test_metadata_says_what_the_config_says(tmp_path: Path) -> None:
    config = base_config("deepseek")
    config.update(
        model_type="deepseek_v3",
        intermediate_size=512,
        n_shared_experts=1,
        n_group=3,
        topk_group=2,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
    )
    make(tmp_path / "Tiny-V3", "deepseek", config=config)
    summary = convert(tmp_path / "Tiny-V3", tmp_path / "m.gguf", quant_method="q4_0")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "deepseek2"
    assert fields["general.name"] == "Tiny-V3"
    want = {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 512,
        "expert_count": 3,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_count": 1,
        "expert_group_count": 3,
        "expert_group_used_count": 2,
        "leading_dense_block_count": 0,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_gating_func": 2,
    }
    assert {key: fields[f"deepseek2.{key}"] for key in want} == want
    assert summary.notes == (summary.notes[0],) and "experts only" in summary.notes[0]


def test_an_unknown_model_type_is_the_architecture_and_noted(tmp_path: Path) -> None:
    make(tmp_path / "in", "ffn")
    summary = convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q4_0")
    assert read(tmp_path / "m.gguf")[0]["general.architecture"] == "ffn"
    assert any("general.architecture is 'ffn'" in note for note in summary.notes)


def test_the_outer_model_type_of_a_multimodal_config_counts(tmp_path: Path) -> None:
    text = base_config("fused")
    text["model_type"] = "qwen3_vl_moe_text"
    make(tmp_path / "in", "fused")
    text.update(num_hidden_layers=2, num_experts=3, hidden_size=64, moe_intermediate_size=32)
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q4_0")
    assert read(tmp_path / "m.gguf")[0]["general.architecture"] == "qwen3vlmoe"


def test_architectures_are_gguf_s() -> None:
    written = {row.gguf.name for row in BY_MODEL_TYPE.values() if row.gguf}
    assert written - {"minimax-m3"} <= set(gguf.MODEL_ARCH_NAMES.values())  # that is newer


@pytest.mark.parametrize(
    ("options", "output", "text"),
    [
        ({"quant_method": "q4_k"}, "out", "writes a GGUF file; give a name that ends in .gguf"),
        ({"quant_method": "int4"}, "m.gguf", "int4 writes a directory"),
        ({"quant_method": "q9_k"}, "m.gguf", "for a GGUF file q8_0, q6_k, q5_k, q4_k, q4_0"),
        (
            {"quant_method": "q4_k", "group_size": 32},
            "m.gguf",
            "group_size=32: q4_k has groups of its own",
        ),
        (
            {"quant_method": "q4_k", "rotation": 64},
            "m.gguf",
            "rotation=64: q4_k is not rotated",
        ),
        ({"quant_method": "q4_k", "resume": True}, "m.gguf", "written in one go"),
        ({"quant_method": "q4_k", "input_type": "fp16"}, "m.gguf", "are bf16; leave it out"),
    ],
)
def test_arguments_that_do_not_fit(
    tmp_path: Path, options: dict[str, Any], output: str, text: str
) -> None:
    make(tmp_path / "in", "deepseek")
    with pytest.raises(ValueError, match=text):
        convert(tmp_path / "in", tmp_path / output, **options)
    assert os.listdir(tmp_path) == ["in"]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists; give another output"):
        convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_a_packed_directory_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    convert(tmp_path / "in", tmp_path / "packed", quant_method="int8")
    with pytest.raises(CheckpointError, match="is a packed directory already"):
        convert(tmp_path / "packed", tmp_path / "m.gguf", quant_method="q8_0")


def test_nan_names_the_expert_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = {}
    for expert in range(3):
        for part, shape in (
            ("gate_proj", (32, 64)),
            ("up_proj", (32, 64)),
            ("down_proj", (64, 32)),
        ):
            tensors[f"model.layers.0.mlp.experts.{expert}.{part}.weight"] = np.ones(shape, F)
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][5, 5] = np.nan
    config = base_config("deepseek") | {"num_hidden_layers": 1}
    write_directory(tmp_path / "in", tensors, config)
    with pytest.raises(CheckpointError, match="layer 0 expert 2: up: weights hold NaN or inf"):
        convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q4_0")
    assert os.listdir(tmp_path) == ["in"]


def test_an_exception_in_between_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0", progress=stop)
    assert os.listdir(tmp_path) == ["in"]
    assert 0 < seen[-1].done_bytes < seen[-1].total_bytes


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")

    def touch(progress: Progress) -> None:
        os.utime(tmp_path / "in" / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="source file model.safetensors changed"):
        convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0", progress=touch)
    assert os.listdir(tmp_path) == ["in"]


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", "deepseek")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="disk is full"):
        convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("failing", ["pwrite", "ftruncate", "fsync"])
def test_a_disk_that_fills_up_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    make(tmp_path / "in", "deepseek")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=r"m.gguf: the disk is full \(.*make room and run again$"):
        convert(tmp_path / "in", tmp_path / "new" / "m.gguf", quant_method="q8_0")
    assert os.listdir(tmp_path) == ["in"]


def test_a_killed_run_leaves_no_gguf_and_the_next_removes_its_rest(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek", sizes=BIG)
    code = (
        "import sys, time; from ktk.convert import convert\n"
        "stop = lambda p: (print(p.what, flush=True), time.sleep(60))\n"
        "convert('in', 'm.gguf', quant_method='q8_0', progress=stop)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"layer 0\n"
        with pytest.raises(FileExistsError, match="another conversion is writing it"):
            convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0")
        convert(tmp_path / "in", tmp_path / "other" / "m.gguf", quant_method="q8_0")
        run.send_signal(signal.SIGKILL)
    left = [p.name for p in tmp_path.glob("*") if p.is_file()] + [
        p.name for p in tmp_path.glob(TEMPORARY_PREFIX + "*")
    ]
    assert left and all(name.startswith(TEMPORARY_PREFIX) for name in left)
    convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0")
    assert sorted(os.listdir(tmp_path)) == ["in", "m.gguf", "other"]
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "other" / "m.gguf").read_bytes()


def test_no_more_experts_are_held_than_twice_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", "deepseek", sizes=(2, 20, 64, 32))
    from ktk.models import Experts

    begun: list[float] = []
    original = Experts.read

    def counted(self: Experts, layer: int, expert: int) -> Any:
        begun.append(time.monotonic())
        return original(self, layer, expert)

    done: list[int] = []

    def slow(progress: Progress) -> None:
        done.append(len(begun))
        time.sleep(0.01)

    monkeypatch.setattr(Experts, "read", counted)
    convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0", threads=2, progress=slow)
    assert all(started <= finished + 5 for finished, started in enumerate(done[:40]))


@pytest.mark.parametrize("style", STYLES)
def test_what_ktk_writes_ktk_reads(tmp_path: Path, style: str) -> None:
    config = base_config(style)
    if style == "ffn":  # of an architecture that GGUF has no name for
        config["hidden_act"] = "gelu_pytorch_tanh"
    expected = make(tmp_path / "in", style, config=config)
    convert(tmp_path / "in", tmp_path / "m.gguf", quant_method="q8_0")
    before = find_experts(Checkpoint.open(tmp_path / "in"))
    after = find_gguf_experts(GgufCheckpoint.open(tmp_path / "m.gguf"))
    assert after.layers == before.layers
    assert after.num_experts_per_tok == before.num_experts_per_tok
    for layer in after.layers:
        spec = after.spec(layer)
        want = before.spec_fields(layer)
        assert {name: getattr(spec, name) for name in want} == want
        for expert, w in enumerate(expected.experts[layer]):
            got = expert_weights(after.experts(layer), expert)
            for name, matrix in w.items():
                tolerance = 0 if name.endswith("bias") else np.abs(matrix).max() / 250
                np.testing.assert_allclose(getattr(got, name), matrix, rtol=0, atol=tolerance)


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "no"}', '{"alpha": "x"}', '{"beta": 1}'])
def test_an_activation_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    tensors = gguf_files.stacked(np.random.default_rng(0), (0,))
    metadata = gguf_files.sizes("qwen3moe", block_count=1) | {"ktk.activation": text}
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "qwen3moe", tensors, metadata)
    with pytest.raises(CheckpointError, match="ktk.activation must be JSON of an activation"):
        find_gguf_experts(GgufCheckpoint.open(path)).spec(0)


# Root of mean squared error of the output, relative to it; measured 0.018, 0.032, 0.121, 0.151,
# 0.185; 0.065, 0.130, 0.135, 0.254, 0.459.
OUTPUT_ERROR = {"q8_0": 0.025, "q6_k": 0.04, "q4_k": 0.15, "q4_0": 0.18, "mxfp4": 0.22}


OUTPUT_ERROR |= {"q5_k": 0.08, "iq4_nl": 0.16, "iq4_xs": 0.16, "q3_k": 0.3, "q2_k": 0.55}


OUTPUT_ERROR |= {"bf16": 0.004, "f16": 0.0005, "f32": 1e-6}


@pytest.mark.parametrize("method", GGUF_METHODS)
def test_a_converted_file_runs_as_the_original_does(tmp_path: Path, method: str) -> None:
    expected = make(tmp_path / "in", "deepseek", sizes=BIG)
    convert(tmp_path / "in", tmp_path / "m.gguf", quant_method=method)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 256)).astype(F)
    ids, weights = rng.integers(0, 3, (9, 2)), rng.random((9, 2)).astype(F)
    want = np.zeros_like(x)
    for token, slot in np.ndindex(9, 2):
        e = expected.experts[1][ids[token, slot]]
        g, u = e["gate"] @ x[token], e["up"] @ x[token]
        want[token] += weights[token, slot] * (e["down"] @ (g / (1 + np.exp(-g)) * u))
    got = ktk.load_gguf(tmp_path / "m.gguf")[1].forward(x, ids, weights)
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < OUTPUT_ERROR[method]
