"""What a packed directory holds: every style, that it loads alone, the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ktk
from ktk.checkpoint import Checkpoint, list_layers, read_config, read_layer
from ktk.convert.run import Progress, convert
from ktk.convert.sinks import packed as sink
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.rotation import Rotation
from ktk.models import plain
from make.checkpoints import (
    STYLES,
    base_config,
    bf16_like,
    e4m3,
    e4m3_codes,
    make,
    store,
    write_directory,
    write_safetensors,
)
from make.conversions import contents, packed_by_hand


@pytest.mark.parametrize("style", STYLES)
def test_every_style_converts_and_its_other_tensors_stay(tmp_path: Path, style: str) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    expected = make(source, style, shards=2)
    summary = convert(source, output, quant_method="int8", threads=2)
    assert list_layers(output) == (0, 1)
    for layer in (0, 1):
        np.testing.assert_array_equal(
            read_layer(output, layer).data, packed_by_hand(source, layer, weight_format="int8")
        )
    with Checkpoint.open(output) as checkpoint:  # by its index: experts are not in it
        assert {
            name: checkpoint.read(name).tobytes() for name in checkpoint.tensors
        } == expected.plain
    said = read_config(output)
    assert (said.family, said.source_dtype) == (summary.family, summary.source_dtype)
    assert said.layers == (0, 1)
    assert said.specs[0].weight_format == "int8"


@pytest.mark.parametrize(
    ("quant_method", "options"),
    [
        ("int4", {}),
        ("int4", {"group_size": 128}),
        ("int4", {"group_size": 0, "activation_group": 128}),
        ("int8", {"activation_group": 64}),
        ("int8", {"activation_group": 256, "rotation": 64}),
        ("int4", {"rotation": (256, 7)}),
        ("nl4", {}),
        ("nl4", {"rotation": 0}),
        ("bf16", {}),
    ],
)
def test_options_reach_the_layers_and_config(
    tmp_path: Path, quant_method: str, options: dict[str, Any]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    summary = convert(source, output, quant_method=quant_method, input_type="bf16", **options)
    np.testing.assert_array_equal(
        read_layer(output, 1).data, packed_by_hand(source, 1, weight_format=quant_method, **options)
    )
    before = json.loads((source / "config.json").read_text())
    after = json.loads((output / "config.json").read_text())
    said = after.pop("quantization_config")
    assert after == before
    spec = read_config(output).specs[0]
    assert spec.turns == Rotation.of(options.get("rotation", PANELS[quant_method].default_rotation))
    rotation = {"rotation": list(spec.turns)} if spec.turns.width else {}
    assert said == {
        "quant_method": "ktk",
        "weight_format": quant_method,
        "group_size": spec.group_size,
        "activation_group": spec.activation_group,
        **rotation,
        "layout_version": LAYOUT_VERSION,
        "layers": [0, 1],
        "family": "deepseek",
        "source_dtype": "bf16",
    }
    assert (summary.group_size, summary.activation_group) == (
        spec.group_size,
        spec.activation_group,
    )
    assert summary.rotation == rotation.get("rotation")
    assert json.dumps(summary.to_json())


@pytest.mark.parametrize("kind", ["block", "channel"])
def test_fp8_outside_the_experts_becomes_bf16(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    source, output = tmp_path / "in", tmp_path / "out"
    tensors: dict[str, Any] = {}
    suffix = "weight_scale_inv" if kind == "block" else "weight_scale"
    wanted: dict[str, np.ndarray] = {}

    def add(stem: str, rows: int, columns: int) -> None:
        codes = e4m3_codes(rng, rows, columns)
        size = (-(-rows // 128), -(-columns // 128)) if kind == "block" else (rows, 1)
        scale = bf16_like(rng, *size)
        spread = (
            np.repeat(np.repeat(scale, 128, 0), 128, 1)[:rows, :columns]
            if kind == "block"
            else scale
        )
        tensors.update({f"{stem}.weight": ("F8_E4M3", codes), f"{stem}.{suffix}": scale})
        wanted[f"{stem}.weight"] = f32_to_bf16(e4m3(codes) * spread)

    for expert in range(2):
        for role, shape in (("gate", (160, 96)), ("up", (160, 96)), ("down", (96, 160))):
            add(f"model.layers.0.mlp.experts.{expert}.{role}_proj", *shape)
    add("model.layers.0.self_attn.q_proj", 300, 200)
    tensors["model.layers.0.self_attn.q_proj.input_scale"] = np.ones(1, np.float32)
    add(
        "model.layers.1.mlp.experts.0.gate_proj", 130, 130
    )  # a prediction layer: copied, not packed
    tensors["model.norm.weight"] = store(bf16_like(rng, 96), "bf16")
    config = {
        **base_config("deepseek"),
        "num_experts": 2,
        "num_hidden_layers": 1,
        "hidden_size": 96,
        "moe_intermediate_size": 160,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    write_directory(source, tensors, config)
    summary = convert(source, output, quant_method="int4")
    assert summary.source_dtype == "fp8"
    with Checkpoint.open(output) as checkpoint:
        q_proj, gate = (
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.mlp.experts.0.gate_proj.weight",
        )
        assert set(checkpoint.tensors) == {q_proj, gate, "model.norm.weight"}
        for name in (q_proj, gate):
            assert checkpoint.tensors[name].dtype == "BF16"
            np.testing.assert_array_equal(checkpoint.read(name), wanted[name])
    np.testing.assert_array_equal(read_layer(output, 0).data, packed_by_hand(source, 0))


def test_band_wise_dequantisation_equals_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    rng = np.random.default_rng(1)
    codes, scale = e4m3_codes(rng, 700, 64), bf16_like(rng, 6, 1)
    extra = {"lm_head.weight": ("F8_E4M3", codes), "lm_head.weight_scale_inv": scale}
    write_safetensors(source / "extra.safetensors", extra)
    (source / "model.safetensors").rename(source / "first.safetensors")
    _drop(source / "first.safetensors", "lm_head.weight")
    monkeypatch.setattr(plain, "DEQUANTISE_WEIGHTS", 1000)
    convert(source, tmp_path / "out", quant_method="bf16")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        want = f32_to_bf16(e4m3(codes) * np.repeat(scale, 128, 0)[:700])
        np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), want)


def _drop(file: Path, name: str) -> None:
    with Checkpoint.open(file) as checkpoint:
        kept = {
            n: (i.dtype, checkpoint.read(n)) for n, i in checkpoint.tensors.items() if n != name
        }
    write_safetensors(file, kept)


def test_other_tensors_are_cut_into_aligned_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    source, output = tmp_path / "in", tmp_path / "out"
    rng = np.random.default_rng(2)
    make(source, "deepseek")
    extra: dict[str, Any] = {f"t{i}": rng.standard_normal(50).astype(np.float32) for i in range(7)}
    extra |= {"odd": rng.integers(0, 9, 3, np.uint8), "empty": np.empty((0, 4), np.float32)}
    extra |= {"big": rng.standard_normal(999), "wide": np.arange(3, dtype=np.int64)}
    extra["big"] = extra["big"].astype(np.float32)
    write_safetensors(source / "extra.safetensors", extra)
    (source / "model.safetensors").rename(source / "first.safetensors")
    monkeypatch.setattr(sink, "SHARD_BYTES", 500)
    convert(source, output, quant_method="bf16")
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 4
    for name, file in index.items():
        with Checkpoint.open(output / file) as checkpoint:
            info = checkpoint.tensors[name]
            assert info.begin % {"F32": 4, "I64": 8, "BF16": 2, "U8": 1}[info.dtype] == 0
    with Checkpoint.open(output) as checkpoint:
        for name, array in extra.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
            with safe_open(output / index[name], "np") as official:
                np.testing.assert_array_equal(official.get_tensor(name), array)


def test_small_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "mixtral")
    for name in (
        "chat_template.jinja",
        "merges.txt",
        "modeling_tiny.py",
        "tokenizer.model",
        "LICENSE",
    ):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "x.pt",
        ".gitattributes",
        "pytorch_model.bin.index.json",
    ):
        (source / name).write_text(name)
    (source / "blob").write_text("linked")
    (source / "special_tokens_map.json").symlink_to("blob")
    convert(source, output, quant_method="bf16")
    assert sorted(contents(output)) == sorted(
        [
            "LICENSE",
            "additional_chat_templates/tool.jinja",
            "blob",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "ktk-convert.json",
            "ktk-experts-00000.safetensors",
            "ktk-experts-00001.safetensors",
            "merges.txt",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "modeling_tiny.py",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
        ]
    )
    assert not (output / "special_tokens_map.json").is_symlink()
    (source / "blob").unlink()
    with pytest.raises(
        CheckpointError, match="special_tokens_map.json: symbolic link to a missing file"
    ):
        convert(source, tmp_path / "again", quant_method="bf16")


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek", sizes=(3, 7, 64, 32))
    outputs = []
    for threads in (1, 2, 5):
        convert(tmp_path / "in", tmp_path / str(threads), threads=threads)
        outputs.append(contents(tmp_path / str(threads)))
    assert outputs[0] == outputs[1] == outputs[2]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak resident memory of processes: packed spans are mmapped,
    tracemalloc does not see them.
    """
    code = """
import re, sys
from ktk.convert import convert
convert(sys.argv[1], sys.argv[2], quant_method="bf16", threads=2)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    peaks = []
    for layers in (1, 8):
        source, output = tmp_path / f"{layers}", tmp_path / f"{layers}.out"
        make(source, "deepseek", sizes=(layers, 8, 512, 256))  # 6.3 MB of experts per layer
        done = subprocess.run(
            [sys.executable, "-c", code, str(source), str(output)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 15_000, peaks  # KiB; seven more layers are 44 MB


def test_progress_only_rises_and_ends_at_the_total(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    seen: list[Progress] = []
    summary = convert(tmp_path / "in", tmp_path / "out", progress=seen.append)
    done = [p.done_bytes for p in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes == summary.input_bytes
    assert len({p.what for p in seen}) > 2


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    for name in ("a", "b"):
        ktk.convert.convert(tmp_path / "in", tmp_path / name, quant_method="bf16")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
