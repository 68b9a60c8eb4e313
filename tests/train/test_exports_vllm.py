"""vLLM's own loader reads from an exported adapter the delta that ktk computes with.

VLLM_PYTHON names the Python of vLLM's environment (tests/make/vllm_environment.py makes one);
without it these skip. vLLM's CPU kernels run no adapters of experts, so what is compared is what
they would be given.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5")
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from ktk.train.adapter import Adapter
from ktk.train.exports import export
from make import vllm_lora
from make.vllm_lora import EXPERTS, LAYERS, LINEAR

PYTHON = os.environ.get("VLLM_PYTHON")
HIDDEN, INTERMEDIATE, RANK, SCALING = 32, 24, 3, 2.0


def make_adapter(folder: Path, model_type: str) -> Adapter:
    """Random matrices for the experts of all layers and a layer of attention."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    config.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = {}
    for layer in range(LAYERS):
        own = {}
        for name in ("gate", "up", "down"):
            rows, columns = (INTERMEDIATE, HIDDEN) if name != "down" else (HIDDEN, INTERMEDIATE)
            own[f"{name}_a"] = normal(EXPERTS, RANK, columns)
            own[f"{name}_b"] = normal(EXPERTS, rows, RANK)
        experts[f"model.layers.{layer}.mlp.experts"] = own
    said = {"base_model_name_or_path": str(folder / "base")}
    linears = {LINEAR: (normal(RANK, HIDDEN), normal(HIDDEN, RANK))}
    return Adapter(folder, said, RANK, SCALING, experts, linears)


@pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python of vLLM's")
@pytest.mark.parametrize(
    ("model_type", "how"),
    [
        ("qwen3_moe", ("no", "mlp", "gate_proj", "down_proj", "up_proj")),
        ("mixtral", ("no", "block_sparse_moe", "w1", "w2", "w3")),
        ("gpt_oss", ("yes", "mlp")),
    ],
)
def test_vllm_loads_every_delta(model_type: str, how: tuple[str, ...], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, model_type)
    path = export(adapter, "vllm", tmp_path / "out")
    out = tmp_path / "deltas.safetensors"
    command = [str(PYTHON), vllm_lora.__file__, str(path), str(out), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    torch.testing.assert_close(found.pop(LINEAR), adapter.linear_delta(LINEAR))
    assert len(found) == LAYERS * EXPERTS * 3
    for name, delta in found.items():
        layer, expert, projection = name.split(".")
        module = f"model.layers.{layer}.mlp.experts"
        torch.testing.assert_close(delta, adapter.delta(module, projection, int(expert)))
