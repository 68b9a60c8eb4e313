"""Training in float32 over a bf16 model's own weights: they stay bf16 in memory and are widened a
block at a time.

Most CPUs have no bf16 products, and torch's own are slow there: of SmolLM2's, with 256 tokens, one
took 25 ms on the average, in float32 0.9 ms (AVX2). A float32 copy of all weights would double what
they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BLOCK = 4096  # rows of a weight that are float32 at once


class _Product(torch.autograd.Function):
    """rows @ weight.T in float32; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        out = rows.new_empty(len(rows), len(weight))
        for block in _blocks(weight):
            out[:, block] = rows @ weight[block].float().T
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        out = grads[0].new_zeros(len(grads[0]), weight.shape[1])
        for block in _blocks(weight):
            out.addmm_(grads[0][:, block], weight[block].float())
        return out, None


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    return (slice(at, at + BLOCK) for at in range(0, len(weight), BLOCK))


class WidenedLinear(torch.nn.Linear):
    """float32 (..., in_features) to float32 (..., out_features)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.float().reshape(-1, self.in_features)
        out: torch.Tensor = _Product.apply(rows, self.weight)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*input.shape[:-1], self.out_features)


class WidenedEmbedding(torch.nn.Embedding):
    """float32 (..., embedding_dim) of ids."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


_WIDENED = {torch.nn.Linear: WidenedLinear, torch.nn.Embedding: WidenedEmbedding}
_HALVES = (torch.bfloat16, torch.float16)


def compute_in_float32(model: torch.nn.Module) -> None:
    """Have a bf16 or fp16 model compute in float32, in place. Its linear layers' and embeddings'
    weights, which are frozen, keep their dtype and bits; all else is small and becomes float32.
    """
    for module in list(model.modules()):
        wide = _WIDENED.get(type(module))
        if wide is not None and module.weight.dtype in _HALVES:
            module.weight.requires_grad_(False)
            module.__class__ = wide
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.data = module.bias.data.float()
            continue
        for values in (*module.parameters(False), *module.buffers(False)):
            if values.dtype in _HALVES:
                values.data = values.data.float()
