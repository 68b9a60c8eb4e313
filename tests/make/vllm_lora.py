"""What vLLM's own loader makes of an adapter's directory, in vLLM's environment: python
vllm_lora.py DIRECTORY OUT.safetensors STACKED PARENT GATE DOWN UP. OUT has scaling * B A of each
layer, expert and projection that vLLM would compute with, as LAYER.EXPERT.PROJECTION, and of a
linear layer by its name.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

EXPERTS, LAYERS = 4, 2
LINEAR = "model.layers.0.self_attn.q_proj"


def load(path: str, expected: set[str]) -> Any:
    """The adapter as vLLM has it once it is read."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(path, 128)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    return LoRAModel.from_local_checkpoint(
        path, expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )


def per_expert(path: str, parent: str, names: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """names : of gate, down and up, in vLLM's order."""
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    expected = {f"experts.{e}.{name}" for e in range(EXPERTS) for name in names} | {"q_proj"}
    model, found = load(path, expected), {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.{parent}.experts"
        own = [model.get_lora(f"{stem}.{e}.{name}") for e in range(EXPERTS) for name in names]
        packed = PackedLoRALayerWeights.pack_moe(own, stem).optimize()
        for at, projection in enumerate(("gate", "down", "up")):
            for e in range(EXPERTS):
                delta = packed.lora_b[at][e] @ packed.lora_a[at][e]
                found[f"{layer}.{e}.{projection}"] = delta
    return model, found


def stacked(path: str, parent: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Of a model whose gate and up rows alternate."""
    from vllm.lora.model_manager import LoRAModelManager

    model, found = load(path, {"experts", "q_proj"}), {}
    manager: Any = SimpleNamespace(
        _is_3d_moe_model=True, _get_lora_layer_weights=lambda model, name: model.get_lora(name)
    )
    module: Any = SimpleNamespace(
        w13_lora_a_stacked=[torch.empty(1, EXPERTS)], global_num_experts=EXPERTS, ep_rank=0
    )
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.{parent}.experts"
        LoRAModelManager._stack_moe_lora_weights(manager, model, module, name)
        weights = model.get_lora(name)
        for e in range(EXPERTS):
            both, down = (
                weights.scaling * b[e] @ a[e]
                for a, b in zip(weights.lora_a, weights.lora_b, strict=True)
            )
            found[f"{layer}.{e}.down"] = down
            found[f"{layer}.{e}.gate"], found[f"{layer}.{e}.up"] = both[::2], both[1::2]
    return model, found


def main(path: str, out: str, is_stacked: str, parent: str, *names: str) -> None:
    if is_stacked == "yes":
        model, found = stacked(path, parent)
    else:
        model, found = per_expert(path, parent, list(names))
    linear = model.get_lora(LINEAR).optimize()
    found[LINEAR] = linear.lora_b @ linear.lora_a
    save_file({name: delta.contiguous() for name, delta in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
