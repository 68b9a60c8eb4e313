"""A rank of several that train over rank 0's experts: run in a process of its own."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ktk
from ktk.integration.kt_kernel.ranks import forward_of_ranks
from make.wrapper_cases import E, H, K, N, random_weights, routed

RANK, TOKENS = 4, (5, 0, 3)  # of each rank: one has none


def layer() -> tuple[Any, list[torch.Tensor]]:
    """A wrapper, and the gradients' buffers."""
    made = torch.Generator().manual_seed(0)
    wrapper = ktk.KTMoEWrapper(
        0, E, K, H, N, mode="sft", method="INT8_SFT", lora_rank=RANK, lora_alpha=8.0
    )
    wrapper.load_weights_from_tensors(*random_weights())
    up = [(E, RANK, H), (E, N, RANK)]
    sizes = [*up, *up, (E, RANK, N), (E, H, RANK)]
    lora = [(torch.randn(s, generator=made) / 8).bfloat16() for s in sizes]
    buffers = [torch.zeros_like(matrix) for matrix in lora]
    wrapper.init_lora_weights(*lora, *buffers)
    return wrapper, buffers


def call(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, ids, weights and the output's gradient of a rank's tokens."""
    hidden, ids, weights = map(torch.from_numpy, routed(TOKENS[rank], rank))
    return hidden.bfloat16(), ids, weights, torch.from_numpy(routed(TOKENS[rank], 9)[0]).bfloat16()


def run(folder: str, rank: int) -> None:
    """Two steps that accumulate; what the rank has then goes to a file."""
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=len(TOKENS), rank=rank
    )
    wrapper, buffers = layer() if rank == 0 else (None, [])
    hidden, ids, weights, grad = call(rank)
    hidden.requires_grad_(rank != 2)  # a rank that wants none takes part
    weights.requires_grad_()
    for _ in range(2):
        out = forward_of_ranks(wrapper, hidden, ids, weights)
        out.backward(grad)
    found = {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, "lora": buffers}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
