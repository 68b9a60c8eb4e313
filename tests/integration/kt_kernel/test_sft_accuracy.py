"""Fine-tuning through packed experts against float64 autograd.

KT-Kernel's own test of int8 (3 experts, top-1, 256 x 256, rank 8, 4 tokens, one draw) allows a
relative error of 0.12 forward, 0.18 and 0.12 of the gradients of hidden states and routing weights,
0.15 of the adapters'. The routing weights' gradients are four numbers there, whose terms may
cancel: draws are put together here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

import ktk
from ktk.experts.dequantise import expert_weights

E, SIZE, RANK, TOKENS, ALPHA = 3, 256, 8, 4, 16.0
KT_KERNEL = {"out": 0.12, "hidden": 0.18, "weights": 0.12, "lora": 0.15}
KT_COSINES = {"out": 0.99, "hidden": 0.98, "weights": 0.99, "lora": 0.985}
# A part of those over the weights before they are packed. Of fewer bits it is what rounding the
# weights costs: over the weights as they are packed every format meets a fifth.
PARTS = {"AMXBF16_SFT": 1 / 30, "AMXINT8_SFT": 1 / 5, "INT8_SFT": 1 / 5}
PARTS |= {"AMXINT4_SFT": 1.6, "NL4": 1.4}
A_FIFTH = {"AMXBF16_SFT": 1 / 30} | dict.fromkeys(PARTS.keys() - {"AMXBF16_SFT"}, 1 / 5)
NUM_DRAWS = 4
SHAPES = [(E, RANK, SIZE), (E, SIZE, RANK)] * 3


def autograd(
    projections: list[torch.Tensor],
    lora: list[torch.Tensor],
    call: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> dict[str, list[torch.Tensor]]:
    hidden, ids, weights = call
    x, w = hidden.double().requires_grad_(), weights.double().requires_grad_()
    adapters = [m.double().requires_grad_() for m in lora]
    rows = []
    for token, expert in enumerate(ids[:, 0].tolist()):

        def linear(at: int, v: torch.Tensor, expert: int = expert) -> torch.Tensor:
            a, b = adapters[2 * at][expert], adapters[2 * at + 1][expert]
            return projections[at][expert].double() @ v + ALPHA / RANK * (b @ (a @ v))

        h = torch.nn.functional.silu(linear(0, x[token])) * linear(1, x[token])
        rows.append(w[token, 0] * linear(2, h))
    out = torch.stack(rows)
    out.backward(grad.double())
    gradients = [m.grad for m in (x, w, *adapters)]
    return {"out": [out], "hidden": gradients[:1], "weights": gradients[1:2], "lora": gradients[2:]}


def check(want: torch.Tensor, got: torch.Tensor, error: float, cosine: float) -> None:
    want, got = want.detach().double().flatten(), got.double().flatten()
    assert (got - want).norm() <= error * want.norm()
    assert torch.nn.functional.cosine_similarity(want, got, 0) >= cosine


def test_check_refuses_another_size_and_another_direction():
    want = torch.tensor([1.0, 1.0])
    check(want, torch.tensor([1.0, 1.01]), 0.01, 0.99)
    with pytest.raises(AssertionError):
        check(want, want * 1.1, 0.01, 0.99)
    with pytest.raises(AssertionError):
        check(want, torch.tensor([1.0, 0.5]), 1.0, 0.99)


class Draw(NamedTuple):
    """What one draw gave, and what float64 autograd gives over weights before and after packing."""

    got: dict[str, list[torch.Tensor]]
    before: dict[str, list[torch.Tensor]]
    packed: dict[str, list[torch.Tensor]]


def drawn(method: str, seed: int) -> Draw:
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made)

    projections = [(normal(E, SIZE, SIZE) * SIZE**-0.5).bfloat16() for _ in range(3)]
    wrapper = ktk.KTMoEWrapper(
        0, E, 1, SIZE, SIZE, method=method, mode="sft", lora_rank=RANK, lora_alpha=ALPHA
    )
    wrapper.load_weights_from_tensors(*projections)
    lora = [(normal(*s) * (SIZE**-0.5 if s[1] == RANK else 0.1)).bfloat16() for s in SHAPES]
    buffers = [torch.full(s, 7.0, dtype=torch.bfloat16) for s in SHAPES]
    wrapper.init_lora_weights(*lora, *buffers)
    call = (normal(TOKENS, SIZE).bfloat16(), torch.tensor([[0], [2], [0], [2]]))
    call = (*call, torch.rand(TOKENS, 1, generator=made) + 0.5)
    grad = normal(TOKENS, SIZE).bfloat16()
    got = {"out": [wrapper.forward(*call)], "lora": buffers}
    got["hidden"], got["weights"] = ([g] for g in wrapper.backward(grad))
    assert all((buffer[1] == 0).all() for buffer in buffers)  # nobody's
    stored = wrapper.moe.runner.packed()
    experts = [expert_weights(stored, e) for e in range(E)]
    packed = [np.stack([getattr(e, name) for e in experts]) for name in ("gate", "up", "down")]
    return Draw(
        got,
        autograd(projections, lora, call, grad),
        autograd([torch.from_numpy(matrix) for matrix in packed], lora, call, grad),
    )


def pairs(
    wanted: list[dict[str, list[torch.Tensor]]], found: list[dict[str, list[torch.Tensor]]]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of each matrix what is wanted and what there is, of all draws."""
    for name in KT_KERNEL:
        for at in range(len(wanted[0][name])):
            want, got = (torch.cat([d[name][at].detach() for d in of]) for of in (wanted, found))
            yield name, want, got


@pytest.mark.parametrize("method", PARTS)
def test_errors_are_a_part_of_what_kt_kernel_allows(method):
    draws = [drawn(method, seed) for seed in range(NUM_DRAWS)]
    got = [draw.got for draw in draws]
    for wanted, part in (
        ([draw.before for draw in draws], PARTS[method]),
        ([draw.packed for draw in draws], A_FIFTH[method]),
    ):
        for name, want, found in pairs(wanted, got):
            check(want, found, part * KT_KERNEL[name], 1 - part * (1 - KT_COSINES[name]))
