"""Dense linear layers of a model that run as a GGUF file's blocks, where they are mapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import ktk.ops.linear
from ktk.checkpoint.gguf import GgufCheckpoint, GgufTensor
from ktk.experts.stored import StoredMatrix
from ktk.integration.transformers.gguf_tensors import (
    EMBEDDING,
    HEAD,
    Plan,
    joined_blocks,
    misshapen,
    read_tensor,
    tied,
)
from ktk.integration.transformers.linear import KtkLinear, is_dense
from ktk.log import logger
from ktk.machine.memory import aligned_buffer
from ktk.models.whole.rope import Fields
from ktk.models.whole.rows import Tensor, WholeModel
from ktk.ops.linear import Linear
from ktk.placement.blocks import kernel_types


def file_linears(
    checkpoint: GgufCheckpoint, row: WholeModel, num_layers: int
) -> dict[str, tuple[Tensor, str]]:
    """Weights of dense linear layers that run as the file's blocks: module tensor -> (row, the
    file's tensor).

    Those of one tensor of the file, its rows in any order, of a type that kernels read, but F32, of
    which torch reads half the bytes once it is bf16. One row by 4096 x 2048, two Zen 4 cores: BF16
    0.56 ms, F16 0.54, torch's bf16 0.83, fp16 0.46 (and 512 rows in 185 ms, F16 in 42). Empty where
    the kernels do not run.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    if ktk.ops.linear.why_not() is not None:
        return found
    seen: set[str] = set()
    for tensor, layer in row.layer_tensors(num_layers):
        name = tensor.hf.format(n=layer)
        pieces = tuple(piece.format(n=layer) for piece in tensor.pieces)
        if name in seen or not all(piece in checkpoint.tensors for piece in pieces):
            continue
        seen.add(name)
        if (
            len(pieces) == 1
            and (tensor.join is None or tensor.moves_rows)
            and pieces[0] != EMBEDDING
        ):
            found[name] = (tensor, pieces[0])
    if HEAD not in seen:  # tied to the embedding
        found[HEAD] = (Tensor(EMBEDDING, HEAD), EMBEDDING)
    return {
        name: (tensor, piece)
        for name, (tensor, piece) in found.items()
        if _runs_as_blocks(name, checkpoint.info(piece))
    }


def _runs_as_blocks(name: str, tensor: GgufTensor) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or len(tensor.shape) != 2 or not is_dense(module, tensor.shape):
        return False
    return tensor.type != "F32" and tensor.type in kernel_types()


@dataclass(frozen=True)
class LinearPlan:
    """A linear layer of the file's blocks: its weight, perhaps a bias."""

    weight: Plan
    bias: Plan | None


def take_linears(
    checkpoint: GgufCheckpoint, row: WholeModel, model: Any, plans: dict[str, Plan]
) -> dict[str, LinearPlan]:
    """The model's linear layers that run as blocks, by name;
    their tensors are taken out of ``plans``.
    """
    if reason := ktk.ops.linear.why_not():
        logger.warning("linear layers are dequantised and stay with torch: %s", reason)
    taken = {}
    found = file_linears(checkpoint, row, model.config.num_hidden_layers)
    for name, (tensor, piece) in found.items():
        owner = name.rpartition(".")[0]
        if name not in plans and name not in tied(model):
            continue
        module = model.get_submodule(owner)
        if type(module) is torch.nn.Linear:
            weight = plans.pop(name, None) or Plan(tensor, (piece,), module.weight)
            taken[owner] = LinearPlan(weight, plans.pop(f"{owner}.bias", None))
    return taken


def linear_of_blocks(
    checkpoint: GgufCheckpoint, plan: LinearPlan, fields: Fields, num_threads: int | None
) -> KtkLinear:
    """A layer over the mapped blocks; where their rows are in another order, over a copy."""
    weight = plan.weight
    tensor = checkpoint.info(weight.pieces[0])
    if tensor.shape != tuple(weight.target.shape):
        raise misshapen(tensor, weight, tensor.shape)
    blocks = checkpoint.blocks(tensor.name)  # (rows, row bytes)
    if weight.row.join is None:
        checkpoint.will_need(tensor.name)
    else:
        copy = aligned_buffer(blocks.size).reshape(blocks.shape)
        copy[:] = joined_blocks(checkpoint, weight, [blocks], fields)
        blocks = copy
    bias = None
    if plan.bias is not None:
        bias = read_tensor(checkpoint, plan.bias, torch.float32, fields)
    matrix = StoredMatrix.of_rows(tensor.type, tensor.shape[1], blocks[None])
    return KtkLinear(Linear.of_blocks(matrix, bias, num_threads=num_threads), weight.target.dtype)
