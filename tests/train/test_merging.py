"""An adapter added to a float checkpoint: the model that transformers loads of it computes what the
adapter beside the weights computes; a checkpoint that is not its model's is refused.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktk.errors import CheckpointError
from ktk.integration.transformers import load_model
from ktk.train.adapter import read_adapter
from ktk.train.merging import merge
from make.adapters import logits, make_adapter
from make.command_line import ktk


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_merged_checkpoint_computes_what_the_adapter_does(family: str, tmp_path: Path) -> None:
    directory, want = make_adapter(tmp_path, family, ("experts", "attention"))
    before = {f.name for f in (tmp_path / "base").iterdir()}
    path = merge(read_adapter(directory), tmp_path / "base", tmp_path / "merged")
    assert {f.name for f in path.iterdir()} == before
    got = logits(AutoModelForCausalLM.from_pretrained(path).eval())
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_it_is_packed_for_ktk_run(tmp_path: Path) -> None:
    directory, want = make_adapter(tmp_path, "qwen3_moe", ("experts", "attention"))
    arguments = ("--to", "packed", "--out", tmp_path / "packed")
    done = ktk("train", "export", str(directory), *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["experts_modules"] == 2
    got = logits(load_model(tmp_path / "packed"))
    assert float((got - want).abs().mean()) < 0.05 * float(want.abs().mean())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base", "packed"]


@pytest.mark.parametrize("to", ["vllm", "merged"])
def test_the_command_writes_layouts(to: str, tmp_path: Path) -> None:
    directory, _ = make_adapter(tmp_path, "mixtral", ("experts",))
    done = ktk("train", "export", str(directory), "--to", to, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert f"{to}, rank 3, adapters of 2 layers' experts and 0 linear layers" in done.stdout
    done = ktk("train", "export", str(directory), "--to", "gguf", "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "--to gguf: must be one of" in done.stderr


def test_another_models_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    directory, _ = make_adapter(tmp_path, "qwen3_moe", ("experts", "attention"))
    adapter, base, out = read_adapter(directory), tmp_path / "base", tmp_path / "out"
    (file,) = base.glob("*.safetensors")
    whole = load_file(file)
    one = next(name for name in whole if name.endswith("experts.3.up_proj.weight"))
    save_file({n: t for n, t in whole.items() if n != one}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="has no weight of .*experts, up of expert 3"):
        merge(adapter, base, out)
    save_file({**whole, one: whole[one].to(torch.int32)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="is I32: must be a float"):
        merge(adapter, base, out)
    save_file(whole, file, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="is packed or quantised"):
        merge(adapter, base, out)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="is not empty"):
        merge(adapter, base, base)
