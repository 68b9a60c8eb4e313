"""AMXBF16: bf16 experts on the tile unit of Intel CPUs, activations rounded to bf16."""

from __future__ import annotations

from ktk.backends.amx import AmxBackend


class AmxBf16Backend(AmxBackend):
    name = "AMXBF16"
    weight_format = "bf16"
    isa_rows = ("amxbf16",)
