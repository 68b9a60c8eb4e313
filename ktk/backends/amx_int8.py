"""AMXINT8: int8 experts on the tile unit of Intel CPUs."""

from __future__ import annotations

from ktk.backends.amx import AmxBackend


class AmxInt8Backend(AmxBackend):
    name = "AMXINT8"
    weight_format = "int8"
