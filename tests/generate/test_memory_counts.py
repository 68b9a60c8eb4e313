"""The memory that ``describe_model`` asks for is what loading takes,
layers of multi-token prediction and all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.convert.run import convert
from ktk.generate.describe import describe_model
from ktk.integration.transformers import names
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.loading import load_model
from ktk.kv.sizes import TokenShape
from ktk.models.prediction import gguf_predicts, predicts
from make import gguf_files, whole_models
from make.families import small_config

runs = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)
# model type -> where its checkpoints keep the layers of multi-token prediction; {n} is behind the
# last layer
PREDICTION = {
    "deepseek_v3": "model.layers.{n}.",
    "deepseek_v2": "model.layers.{n}.",
    "glm4_moe": "model.layers.{n}.",
    "glm4_moe_lite": "model.layers.{n}.",
    "hy_v3": "model.layers.{n}.",
    "qwen3_next": "mtp.layers.0.",
    "exaone_moe": "mtp.layers.0.",
    "ernie4_5_moe": "model.mtp_block.0.",
    "mimo_v2_flash": "model.mtp.layers.0.",
    "nemotron_h": "mtp.layers.0.",
    "qwen3_moe": "",
}


def with_prediction(model: Any, folder: Path, prefix: str) -> None:
    """Save a model, and beside its tensors those of one more layer."""
    model.save_pretrained(folder)
    if prefix:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        head = prefix.format(n=model.config.num_hidden_layers)
        own = next(name for name in tensors if ".layers.1." in name).split(".layers.1.")[0]
        layer = {
            name.removeprefix(f"{own}.layers.1."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{own}.layers.1.")
        }
        tensors.update({f"{head}{name}": tensor.clone() for name, tensor in layer.items()})
        tensors[f"{head}eh_proj.weight"] = torch.zeros(32, 64)
        save_file(tensors, path, {"format": "pt"})


def loaded_bytes(model: Any) -> int:
    """Everything that a checkpoint's tensors became, but experts."""
    experts = {p.data_ptr() for n, p in model.named_parameters() if ".experts." in n and p.numel()}
    held = {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}
    return sum(t.numel() * t.element_size() for at, t in held.items() if at not in experts)


@pytest.mark.parametrize("kind", PREDICTION)
def test_layers_that_are_never_loaded_ask_for_no_memory(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32)
    with_prediction(model, tmp_path / "hf", PREDICTION[kind])
    told = describe_model(tmp_path / "hf", weight_format="int8")
    assert told.rest_bytes == loaded_bytes(load_model(tmp_path / "hf"))
    convert(tmp_path / "hf", tmp_path / "packed", quant_method="int8")
    packed = describe_model(tmp_path / "packed")
    assert (packed.rest_bytes, packed.num_moe_layers) == (told.rest_bytes, told.num_moe_layers)


@pytest.mark.parametrize(
    "kind", ["deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_moe", "minimax_m2"]
)
def test_the_kv_cache_is_as_large_as_told(kind: str) -> None:
    config = small_config(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.arange(3, 14)[None], use_cache=True, **{names.CACHE: cache})
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    shape = TokenShape.of_config(json.loads(config.to_json_string(use_diff=False)))
    assert held == shape.num_bytes(4, tokens=11)


@runs
@pytest.mark.parametrize("name", ["glm4moe", "deepseek2-v3"])
def test_a_gguf_files_layers_of_prediction_ask_for_no_memory(name: str, tmp_path: Path) -> None:
    whole_models.write(tmp_path / "hf", name)
    file = tmp_path / "m.gguf"
    convert(tmp_path / "hf", file, quant_method="q8_0", whole="bf16")
    more = tmp_path / "more.gguf"
    source = GgufCheckpoint.open(file)
    architecture = source.metadata["general.architecture"]
    metadata = {k: source.metadata[k] for k in source.metadata if k != "general.architecture"}
    layers = metadata[f"{architecture}.block_count"]
    metadata[f"{architecture}.block_count"] = layers + 1
    metadata[f"{architecture}.nextn_predict_layers"] = 1
    tensors: dict[str, Any] = {}
    for key, tensor in source.tensors.items():
        raw = np.array(source.blocks(key))
        value = (
            raw.view(np.float32) if tensor.type == "F32" else raw,
            gguf.GGMLQuantizationType[tensor.type],
        )
        tensors[key] = value
        if key.startswith(f"blk.{layers - 1}."):
            tensors[key.replace(f"blk.{layers - 1}.", f"blk.{layers}.")] = value
    tensors[f"blk.{layers}.nextn.eh_proj.weight"] = (np.zeros((256, 512), np.float32), None)
    gguf_files.write_gguf(more, architecture, tensors, metadata)
    plain, told = (describe_model(f, linear="none", dtype="float32") for f in (file, more))
    for field in ("num_layers", "num_moe_layers", "expert_bytes", "rest_bytes", "kv_bytes"):
        assert getattr(told, field) == getattr(plain, field), field
    model = load_gguf_model(more, linear="none", dtype="float32")
    assert told.rest_bytes == loaded_bytes(model)
    text = json.loads(model.config.to_json_string(use_diff=False))
    assert told.kv_bytes == TokenShape.of_config(text).num_bytes(4, told.context)


def test_a_packed_directory_from_a_file_counts_the_models_own_layers(tmp_path: Path) -> None:
    whole_models.write(tmp_path / "hf", "glm4moe")
    convert(tmp_path / "hf", tmp_path / "m.gguf", quant_method="q8_0", whole="bf16")
    convert(tmp_path / "m.gguf", tmp_path / "packed", quant_method="int8")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["num_hidden_layers"] == whole_models.LAYERS


@pytest.mark.parametrize(
    ("name", "is_predicting"),
    [
        ("model.layers.2.mlp.gate.weight", True),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.language_model.layers.2.self_attn.q_proj.weight", True),
        ("vision_tower.encoder.layers.2.mlp.weight", False),
        ("model.visual.layers.2.mlp.weight", False),
        ("mtp.fc.weight", True),
        ("model.mtp_block.0.mlp.up_proj.weight", True),
        ("model.mtp_emb_norm.0.weight", True),
        ("model.layers.0.smtp.weight", False),
    ],
)
def test_prediction_is_known_by_name(name: str, is_predicting: bool) -> None:
    assert predicts(name, 2) == is_predicting
    assert predicts(name, None) == (is_predicting and "mtp" in name)
    assert gguf_predicts("blk.2.attn_q.weight", 2) and not gguf_predicts("blk.1.x.weight", 2)
    assert not gguf_predicts("blk.2.attn_q.weight", None)
