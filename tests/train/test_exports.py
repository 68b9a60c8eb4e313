"""Adapters in others' layouts: peft computes with them what ktk does with its own, and what vLLM's
and SGLang's loaders read of them is the same delta of each expert.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")
import peft
from safetensors.torch import load_file, save_file

from ktk.errors import CheckpointError
from ktk.integration.transformers import use_ktk
from ktk.train.adapter import read_adapter
from ktk.train.attach import attach_adapter
from ktk.train.exports import export
from make.adapters import logits, make_adapter
from make.transformers_cases import make_model

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_on_the_float_model(family: str, tmp_path: Path) -> None:
    directory, want = make_adapter(tmp_path, family, ("experts", "attention"))
    plain = logits(make_model(family))
    path = export(read_adapter(directory), "peft", tmp_path / "peft")
    got = logits(peft.PeftModel.from_pretrained(make_model(family), str(path)).eval())
    assert float((want - plain).abs().max()) > 0.05 * float(plain.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_an_adapter_attached_again_has_the_same_bits_attention_is_merged(tmp_path: Path) -> None:
    for parts in (("experts",), ("experts", "attention"), ("attention",)):
        directory, want = make_adapter(tmp_path / "-".join(parts), "qwen3_moe", parts)
        model = make_model("qwen3_moe")
        use_ktk(model, "fp32")
        attach_adapter(model, directory)
        close = 2e-5 * float(want.abs().max()) if "attention" in parts else 0.0
        torch.testing.assert_close(logits(model), want, rtol=0, atol=close)
        assert not any(p.requires_grad for p in model.parameters())


def per_expert(path: Path, parent: str, names: dict[str, str]) -> dict[tuple[int, int, str], Any]:
    """(layer, expert, projection) -> delta, as both loaders pair the tensors of a file."""
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for name, a in tensors.items():
        match = re.fullmatch(
            rf"base_model\.model\.model\.layers\.(\d+)\.{parent}\.experts\.(\d+)\.(\w+)"
            r"\.lora_A\.weight",
            name,
        )
        if match:
            b = tensors[name.replace("lora_A", "lora_B")]
            assert match[3] in config["target_modules"]
            found[int(match[1]), int(match[2]), names[match[3]]] = scaling * b @ a
    return found


@pytest.mark.parametrize(
    ("family", "to", "parent", "names"),
    [
        ("qwen3_moe", "sglang", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("qwen3_moe", "vllm", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "vllm", "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_every_expert_has_its_own_delta(
    family: str, to: str, parent: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    directory, _ = make_adapter(tmp_path, family, ("experts",))
    adapter = read_adapter(directory)
    path = export(adapter, to, tmp_path / to)
    called = dict(zip(names, ("gate", "up", "down"), strict=True))
    found = per_expert(path, parent, called)
    modules = list(adapter.experts)
    count = len(adapter.experts[modules[0]]["up_a"])
    assert len(found) == len(modules) * count * 3
    for (layer, expert, projection), delta in found.items():
        expected = adapter.delta(modules[layer], projection, expert)
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-7)


def test_a_stacked_model_of_vllm_gets_stacked_tensors(tmp_path: Path) -> None:
    directory, _ = make_adapter(tmp_path, "gpt_oss", ("experts",))
    path = export(read_adapter(directory), "vllm", tmp_path / "vllm")
    names = set(load_file(path / "adapter_model.safetensors"))
    stem = "base_model.model.model.layers.0.mlp.experts"
    assert {f"{stem}.base_layer.lora_A.weight", f"{stem}.lora_B.weight"} <= names


def test_projections_without_an_adapter_are_zeros_where_loaders_want_them(tmp_path: Path) -> None:
    directory, _ = make_adapter(tmp_path, "qwen3_moe", ("experts",))
    weights = directory / "adapter_model.safetensors"
    left = {n: t for n, t in load_file(weights).items() if "down" in n}
    save_file(left, weights)
    adapter = read_adapter(directory)
    found = per_expert(
        export(adapter, "sglang", tmp_path / "sglang"),
        "mlp",
        {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    )
    whole = make_model("qwen3_moe").model.layers[0].mlp.experts
    for (_, _, projection), delta in found.items():
        rows, columns = whole.down_proj.shape[1:]
        assert tuple(delta.shape) == ((rows, columns) if projection == "down" else (columns, rows))
        assert bool(delta.any()) == (projection == "down")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 200}, "r=200: must be in 1..128"),
        ({"r": 2}, "must be 3-dimensional, of rank 2"),
        ({"lora_alpha": "a"}, "lora_alpha='a': must be a number"),
        ({"use_dora": True}, "use_dora=True is not supported"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory, _ = make_adapter(tmp_path, "qwen3_moe", ("experts",))
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(CheckpointError) as caught:
        read_adapter(directory)
    assert message in str(caught.value)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory, _ = make_adapter(tmp_path, "qwen3_moe", ("experts",))
    weights = directory / "adapter_model.safetensors"
    whole = load_file(weights)
    first = next(name for name in whole if name.endswith("_A"))
    save_file({n: t for n, t in whole.items() if n != first}, weights)
    with pytest.raises(CheckpointError, match="alone"):
        read_adapter(directory)
    save_file({**whole, "model.weight": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError, match="'model.weight' is no matrix of an adapter"):
        read_adapter(directory)
    save_file(whole, weights)
    with pytest.raises(ValueError, match="to='gguf': must be one of"):
        export(read_adapter(directory), "gguf", tmp_path)
    with pytest.raises(CheckpointError, match="give it with --base"):
        export(read_adapter(directory), "peft", tmp_path, tmp_path / "nothing")
    other = make_model("mixtral")
    use_ktk(other, "fp32")
    with pytest.raises((ValueError, CheckpointError), match="adapter"):
        attach_adapter(other, directory)
    with pytest.raises(ValueError, match="is not packed"):
        attach_adapter(make_model("qwen3_moe"), directory)
