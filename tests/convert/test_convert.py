"""Conversion: what is written, that it loads alone, and that no interruption can be seen in the bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ktk
from ktk.checkpoint import Checkpoint, list_layers, read_config, read_layer
from ktk.checkpoint.packed import STATE_FILE, TEMPORARY_PREFIX
from ktk.convert.run import Progress, convert
from ktk.convert.sinks import packed as sink
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.spec import MoESpec
from ktk.models import find_experts, plain
from ktk.quantise.pack import pack_expert
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


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def packed_by_hand(source: Path, layer: int, **options: Any) -> np.ndarray:
    """What ``pack_expert`` makes of each expert, without convert."""
    experts = find_experts(Checkpoint.open(source))
    spec = MoESpec(**experts.spec_fields(layer), **options)
    out = np.empty((spec.num_experts, spec.layout.expert_bytes), np.uint8)
    for expert in range(spec.num_experts):
        pack_expert(spec, experts.read(layer, expert), out[expert])
    return out


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
        ("bf16", {}),
    ],
)
def test_options_reach_the_layers_and_config(
    tmp_path: Path, quant_method: str, options: dict[str, int]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    summary = convert(source, output, quant_method=quant_method, input_type="bf16", **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        read_layer(output, 1).data, packed_by_hand(source, 1, weight_format=quant_method, **options)
    )
    before = json.loads((source / "config.json").read_text())
    after = json.loads((output / "config.json").read_text())
    said = after.pop("quantization_config")
    assert after == before
    spec = read_layer(output, 0).spec
    assert said == {
        "quant_method": "ktk",
        "weight_format": quant_method,
        "group_size": spec.group_size,
        "activation_group": spec.activation_group,
        "layout_version": LAYOUT_VERSION,
        "layers": [0, 1],
        "family": "deepseek",
        "source_dtype": "bf16",
    }
    assert (summary.group_size, summary.activation_group) == (
        spec.group_size,
        spec.activation_group,
    )
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
            "LICENSE", "additional_chat_templates/tool.jinja", "blob", "chat_template.jinja", "config.json",
            "generation_config.json", "ktk-convert.json", "ktk-experts-00000.safetensors",
            "ktk-experts-00001.safetensors", "merges.txt", "model-00001-of-00001.safetensors",
            "model.safetensors.index.json", "modeling_tiny.py", "special_tokens_map.json", "tokenizer.json",
            "tokenizer.model",
        ]
    )  # fmt: skip
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
    """Peak resident memory of whole processes: packed spans are mmapped, which tracemalloc does not see."""
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


# arguments and places


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quant_method": "int3"}, "quant_method='int3'"),
        ({"quant_method": "fp32"}, "quant_method='fp32'"),
        ({"input_type": "fp8"}, "input_type='fp8': the experts of .* are bf16"),
        ({"input_type": "float"}, "input_type='float': must be one of fp32"),
        ({"group_size": 48}, "group_size=48"),
        ({"quant_method": "int8", "group_size": 32}, "group_size=32: int8"),
        ({"activation_group": 7}, "activation_group=7"),
        ({"threads": 0}, "threads=0"),
        ({"threads": True}, "threads=True"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    make(tmp_path / "in", "deepseek")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


def test_output_in_the_input_or_not_empty_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    before = contents(source)
    for output in (source, source / "out", tmp_path / "x" / ".." / "in" / "y"):
        with pytest.raises(ValueError, match="lies in the input"):
            convert(source, output)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="lies in the input"):
        convert(source, tmp_path / "link" / "out")
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty.*--resume"):
        convert(source, output)
    with pytest.raises(FileExistsError, match="nothing to resume"):
        convert(source, output, resume=True)
    (output / "notes.txt").rename(tmp_path / "file")
    with pytest.raises(FileExistsError, match="not a directory"):
        convert(source, tmp_path / "file")
    assert contents(output) == {}
    assert contents(source) == before


def test_packed_directory_is_not_converted_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a packed directory already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_second_conversion_into_the_same_place_waits_outside(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")

    def meddle(_: Progress) -> None:
        with pytest.raises(FileExistsError, match="another conversion"):
            convert(tmp_path / "in", tmp_path / "out", resume=True)

    convert(tmp_path / "in", tmp_path / "out", progress=meddle)


def test_nan_weight_names_layer_and_expert(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    with Checkpoint.open(source) as checkpoint:
        info = checkpoint.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(info.begin)
        file.write(b"\xc0\x7f")
    with pytest.raises(CheckpointError, match="layer 1 expert 2: .*NaN"):
        convert(source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "ktk-convert.json",
        "ktk-experts-00000.safetensors",
    ]


def test_source_truncated_on_the_way_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")

    def cut(_: Progress) -> None:
        os.truncate(source / "model.safetensors", 20_000)

    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out", threads=1, progress=cut)
    assert not (tmp_path / "out" / "config.json").exists()


def test_source_changed_on_the_way_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")

    def touch(_: Progress) -> None:
        os.utime(tmp_path / "in" / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"model.safetensors changed while it was converted"):
        convert(tmp_path / "in", tmp_path / "out", progress=touch)
    assert not (tmp_path / "out" / "config.json").exists()


def test_foreign_quantisation_outside_the_experts_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    (source / "model.safetensors").rename(source / "first.safetensors")
    for name, array, match in (
        ("q_proj.qweight", np.zeros((2, 2), np.int64), "is named as GPTQ names it"),
        ("q_proj.weight", ("F8_E4M3", np.zeros((2, 2), np.uint8)), "scale tensor is missing"),
    ):
        write_safetensors(source / "second.safetensors", {name: array})
        with pytest.raises(CheckpointError, match=match):
            convert(source, tmp_path / "out")


# interruption


def test_full_disk_is_a_clear_error_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for failing in range(1, 12):
        calls = 0

        def fails(fd: int, real: Any = os.fsync, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            try:
                convert(source, output)
            except OSError as error:
                assert "make room and run again with --resume" in str(error)  # noqa: PT017
        left = contents(output)
        assert all(whole[name] == data for name, data in left.items())
        assert "config.json" not in left or len(left) == len(whole)
        convert(source, output, resume=True)
        assert contents(output) == whole
        shutil.rmtree(output)


def test_too_small_a_disk_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", "deepseek")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="disk is full") as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert "are to be written" in str(caught.value.__cause__)


def test_resume_refuses_another_job(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, output, quant_method="int4")
    before = contents(output)
    with pytest.raises(ValueError, match="begun with quant_method='int4', now 'int8'"):
        convert(source, output, quant_method="int8", resume=True)
    with pytest.raises(ValueError, match="begun with group_size=32, now 64"):
        convert(source, output, group_size=64, resume=True)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"source file model\.safetensors changed since"):
        convert(source, output, resume=True)
    (output / STATE_FILE).write_text('{"source": 3}')
    with pytest.raises(ValueError, match="begun with"):
        convert(source, output, resume=True)
    (output / STATE_FILE).write_text("[")
    with pytest.raises(CheckpointError, match="not JSON"):
        convert(source, output, resume=True)
    assert {k: v for k, v in contents(output).items() if k != STATE_FILE} == {
        k: v for k, v in before.items() if k != STATE_FILE
    }


def test_resume_of_a_finished_job_does_nothing_and_of_none_starts(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    assert convert(source, output, resume=True).reused_layers == 0
    before = contents(output)
    stamp = (output / "ktk-experts-00000.safetensors").stat().st_mtime_ns
    summary = convert(source, output, resume=True)
    assert summary.reused_layers == 2
    assert contents(output) == before
    assert (output / "ktk-experts-00000.safetensors").stat().st_mtime_ns == stamp


def test_resume_writes_damaged_or_missing_files_again(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, output)
    before = contents(output)
    for name in before:
        if name == STATE_FILE:
            continue
        (output / name).unlink()
        (output / f"{TEMPORARY_PREFIX}{name}.77").write_bytes(b"left over")
        convert(source, output, resume=True)
        assert contents(output) == before
        os.truncate(output / name, 5)
        convert(source, output, resume=True)
        assert contents(output) == before


def test_job_written_again_is_not_called_finished_meanwhile(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, output)
    (output / "ktk-experts-00001.safetensors").unlink()

    def finished(progress: Progress) -> None:
        assert (output / "config.json").exists() == (progress.what == "done")

    convert(source, output, resume=True, progress=finished)


# The child imports once, then forks one victim per trial; a victim dies by SIGKILL, at the n-th file
# operation or when the parent's timer says so.
VICTIM = """
import json, os, random, signal, sys, time
from pathlib import Path
from ktk.convert import convert
from ktk._cy import native_module
native_module()
job = json.loads(sys.argv[1])

def run(resume, threads=2):
    convert(job["source"], job["output"], quant_method=job["quant_method"], threads=threads, resume=resume)

def die_at(operation, nth, after):
    count = 0
    real = getattr(os, operation)
    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if count == nth and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, operation, counted)

def victim(trial):
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            if "operation" in trial:
                die_at(trial["operation"], trial["nth"], trial["after"])
            run(trial["resume"])
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    if "delay" in trial:
        time.sleep(trial["delay"])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

for line in sys.stdin:
    started = time.monotonic()
    status = victim(json.loads(line))
    print(json.dumps([status, time.monotonic() - started]), flush=True)
"""


class Victims:
    """Runs conversions in processes that die on command."""

    def __init__(self, source: Path, output: Path, quant_method: str) -> None:
        job = {"source": str(source), "output": str(output), "quant_method": quant_method}
        self.process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(ktk.__file__).parent.parent)},
        )

    def run(self, **trial: Any) -> tuple[int, float]:
        """(exit status or minus the signal, seconds)."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def check_after_kill(output: Path, whole: dict[str, bytes]) -> None:
    """Every file under a final name is whole; config.json is there only if all are."""
    left = contents(output) if output.exists() else {}
    final = {name: data for name, data in left.items() if TEMPORARY_PREFIX not in name}
    for name, data in final.items():
        assert data == whole[name], name
    assert "config.json" not in final or set(final) == set(whole)


@pytest.mark.slow
def test_killed_at_every_file_operation_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek", sizes=(3, 4, 64, 32))
    convert(source, tmp_path / "whole", quant_method="bf16")
    whole = contents(tmp_path / "whole")
    kills = 0
    with Victims(source, output, "bf16") as victims:
        for operation, after in (("replace", False), ("replace", True), ("fsync", False)):
            nth = 1
            while True:
                status, _ = victims.run(resume=False, operation=operation, nth=nth, after=after)
                check_after_kill(output, whole)
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                kills += 1
                assert victims.run(resume=True)[0] == 0
                assert contents(output) == whole, (operation, after, nth)
                shutil.rmtree(output)
                nth += 1
            shutil.rmtree(output)
    assert kills > 2 * len(whole)


@pytest.mark.parametrize("quant_method", ["bf16", "int4"])
@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    tmp_path: Path, quant_method: str
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek", sizes=(6, 8, 256, 128))
    convert(source, tmp_path / "whole", quant_method=quant_method)
    whole = contents(tmp_path / "whole")
    seed = int(time.time())
    rng = random.Random(seed)
    print(f"seed {seed}")
    with Victims(source, output, quant_method) as victims:
        status, seconds = victims.run(resume=False)
        assert status == 0
        for _ in range(4):
            shutil.rmtree(output)
            kills = 0
            resume = False
            while True:  # killed again and again, ever later, until it gets through
                status, _ = victims.run(
                    resume=resume, delay=rng.uniform(0, seconds * (0.5 + kills / 4))
                )
                check_after_kill(output, whole)
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                kills += 1
                resume = True
            assert contents(output) == whole


# the command


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ktk", "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(ktk.__file__).parent.parent)},
    )


def test_command_converts_and_reports(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    arguments = ("-i", tmp_path / "in", "-o", tmp_path / "out", "--group-size", 64)
    done = run_command(*arguments, "--quant-method", "int4")
    assert done.returncode == 0, done.stderr
    assert "2 layers of 3 experts, deepseek bf16 -> int4" in done.stdout
    assert done.stderr == ""
    assert read_config(tmp_path / "out").specs[0].group_size == 64
    done = run_command(*arguments, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--quant-method", "int3"), "quant_method='int3'"),
        (("--input-type", "fp8"), "input_type='fp8'"),
        (("-i", "/nothing/here"), "no such file or directory"),
    ],
)
def test_command_says_errors_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], match: str
) -> None:
    make(tmp_path / "in", "deepseek")
    done = run_command("-i", tmp_path / "in", "-o", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert match in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    for name in ("a", "b"):
        ktk.convert.convert(tmp_path / "in", tmp_path / name, quant_method="bf16")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
