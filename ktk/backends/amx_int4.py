"""AMXINT4: int4 experts on the tile unit of Intel CPUs."""

from __future__ import annotations

from ktk.backends.amx import AmxBackend


class AmxInt4Backend(AmxBackend):
    name = "AMXINT4"
    weight_format = "int4"
