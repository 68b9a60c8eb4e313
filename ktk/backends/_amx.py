"""What the AMX backends share: one weight format each, on the ``amx`` ISA row, which no build has yet."""

from __future__ import annotations

from ktk._cy import native_module
from ktk.backends._native import NativeBackend
from ktk.types import MoESpec


class AmxBackend(NativeBackend):
    weight_format: str
    isa_rows = ("amx",)

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        if spec is not None and spec.weight_format != self.weight_format:
            return f"runs {self.weight_format} weights, these are {spec.weight_format}"
        native = native_module()
        if native is not None and "amx" not in native.isa_rows():
            return "this version of ktk has no AMX kernels"
        return super().why_not(spec)
