"""LLAMAFILE: experts in GGUF blocks, run from the file's own bytes (vendor/llamafile)."""

from __future__ import annotations

from ktk._cy import native_module
from ktk.backends.base import Backend, Runner
from ktk.backends.native import NativeRunner, kernel_isa
from ktk.experts.formats import BLOCKS, GGUF, decoded_only
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.threads import EngineLayout
from ktk.placement.blocks import kernel_types
from ktk.placement.store import ExpertStore


def types_by_path() -> dict[str, list[str]]:
    """GGUF types by what becomes of their weights here, those of most bits first.

    kernel : read as they lie. float_copies : no kernel, they run as F16 or F32 copies. packed_anew
    : no kernel over blocks runs here at all, they become int8 or int4.
    """
    rows = {**BLOCKS, **decoded_only()}
    ordered = sorted(rows, key=lambda name: -rows[name].bits_per_weight)
    runs, known = LlamafileBackend().why_not() is None, kernel_types()
    paths: dict[str, list[str]] = {"kernel": [], "float_copies": [], "packed_anew": []}
    for name in ordered:
        path = "packed_anew"
        if runs:
            path = "kernel" if name in known else "float_copies"
        paths[path].append(name)
    return paths


class LlamafileBackend(Backend):
    name = "LLAMAFILE"
    takes_stores = True

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        if native_module() is None:
            return "the compiled extension is not built (reinstall with a C compiler)"
        if reason := cpu.why_not("avx2", cpu.detect()):
            return reason
        if spec is not None and spec.is_packed:
            return f"runs the blocks of GGUF files, these are {spec.weight_format} weights"
        return None

    def kernel(self, spec: MoESpec) -> str:
        return f"{kernel_isa('BF16')} {GGUF.name}"  # the level of most instructions

    def load(self, packed: StoredExperts | ExpertStore, engine: EngineLayout) -> Runner:
        isa = cpu.best_isa()
        assert isa is not None  # select() asked why_not first
        return NativeRunner(packed, isa, engine)
