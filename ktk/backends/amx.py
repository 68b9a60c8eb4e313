"""What the AMX backends share: one weight format each, on the ISA rows with tiles."""

from __future__ import annotations

from ktk.backends.native import NativeBackend
from ktk.experts.spec import MoESpec
from ktk.machine import cpu


class AmxBackend(NativeBackend):
    weight_format: str
    isa_rows = ("amx",)

    @property
    def is_emulated(self) -> bool:
        return bool(cpu.detect().emulated)

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        if spec is not None and spec.weight_format != self.weight_format:
            return f"runs {self.weight_format} weights, these are {spec.weight_format}"
        return super().why_not(spec)

    def kernel(self, spec: MoESpec) -> str:
        isa, what = super().kernel(spec).split(" ", 1)
        return f"{isa}{'(emulated)' * self.is_emulated} {what}"
