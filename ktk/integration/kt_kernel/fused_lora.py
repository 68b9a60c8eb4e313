"""fused_expert_lora.safetensors: the adapters of every layer's experts in one file, as KT-Kernel
keeps them.

Six bfloat16 tensors a layer, ``layers.{layer_idx}.experts.{gate,up,down}_lora_{a,b}``, of the
shapes of ``SftWrapper.init_lora_weights``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from safetensors.torch import save

from ktk.checkpoint.packed import replacing, write_all
from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.integration.kt_kernel.sft import SftWrapper
from ktk.paths import user_path

NAME = "fused_expert_lora.safetensors"


def save_fused_expert_lora(
    wrappers: Iterable[SftWrapper], directory: str | os.PathLike[str]
) -> None:
    """Write the layers' adapters, at once or not at all.

    Raises ValueError without layers, or with two of one number; RuntimeError without adapters.
    """
    tensors = {}
    for wrapper in wrappers:
        for name, tensor in _named(wrapper):
            if name in tensors:
                raise ValueError(f"layer {wrapper.layer_idx} is given twice")
            tensors[name] = tensor
    if not tensors:
        raise ValueError("no layers: nothing to save")
    path = user_path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / NAME) as file:
        write_all(file, save(tensors, {"format": "pt"}))


def load_fused_expert_lora(
    wrappers: Iterable[SftWrapper], directory: str | os.PathLike[str]
) -> None:
    """Copy a file's adapters into the memory that init_lora_weights registered.

    Raises CheckpointError unless the file holds these layers and no others, in these shapes and as
    bfloat16; nothing is changed then. RuntimeError without adapters.
    """
    wanted = {name: tensor for wrapper in wrappers for name, tensor in _named(wrapper)}
    path = user_path(directory) / NAME
    with Checkpoint.open(path) as file:
        if missing := wanted.keys() - set(file.tensors):
            raise CheckpointError(f"{path}: lacks {', '.join(sorted(missing)[:3])}")
        if left := set(file.tensors) - wanted.keys():
            raise CheckpointError(f"{path}: no layer here has {', '.join(sorted(left)[:3])}")
        found = {}
        for name, tensor in wanted.items():
            info = file.info(name)
            if info.dtype != "BF16" or info.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{path}: {name} is {info.dtype} {info.shape}: must be BF16 "
                    f"{tuple(tensor.shape)}"
                )
            found[name] = torch.from_numpy(file.read(name)).view(torch.bfloat16)
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def _named(wrapper: SftWrapper) -> list[tuple[str, torch.Tensor]]:
    prefix = f"layers.{wrapper.layer_idx}.experts."
    return [(prefix + name, tensor) for name, tensor in wrapper.lora_tensors.items()]
