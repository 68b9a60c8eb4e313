"""The one table of formats: how a matrix is coded, floats, panels and GGUF blocks alike. One row
here per format.

The C kernels' tables (``ktk/_cy/include``, ``vendor/llamafile/lf_formats.h``) say how each is
multiplied; tests compare them.
"""

from __future__ import annotations

from ktk.experts.formats.base import FINE_GROUP, FINE_MOST, Format, Grid, Plane, Search
from ktk.experts.formats.blocks import ROWS, decoded_only
from ktk.experts.formats.ik import ROWS as IK_ROWS
from ktk.experts.formats.panels import PANELS as _PANELS

# Formats that lie in panels, fewest bits first, and those of GGUF files, as the kernels' table has
# them.
PANELS: dict[str, Format] = {f.name: f for f in _PANELS}
BLOCKS: dict[str, Format] = {
    f.name: f for f in sorted((*ROWS, *IK_ROWS), key=lambda f: f.bits_per_weight)
}
FORMATS: dict[str, Format] = {**PANELS, **BLOCKS}
# The weight_format of experts in a GGUF file's blocks: each matrix says its own.
GGUF = Format("gguf", (), "s8", block=1, default_activation_group=64)


def get_format(name: str) -> Format:
    """What MoESpec.weight_format names; ValueError lists what there is."""
    if name == GGUF.name:
        return GGUF
    try:
        return PANELS[name]
    except (KeyError, TypeError):
        raise ValueError(f"weight_format={name!r}: must be one of {', '.join(PANELS)}") from None


def block_format(name: str) -> Format:
    """The format of a type of GGUF files; ValueError for one that nothing here decodes."""
    found = BLOCKS.get(name) or decoded_only().get(name)
    if found is None:
        raise ValueError(f"neither ktk nor the gguf package decodes {name}")
    return found


def written_types() -> tuple[Format, ...]:
    """The types of GGUF files that ktk writes: blocks, most bits first, then floats."""
    written = [row for row in BLOCKS.values() if row.file_type]
    blocks = [row for row in reversed(written) if row.block > 1]
    return (*blocks, *(row for row in written if row.block == 1))


def activation_group_of(bits: float) -> int:
    """The default for the finest of a layer's GGUF types, of ``bits`` per weight.

    What one scale for more activations costs drowns in the error of coarser weights.
    """
    return 64 if bits >= 5 else 128


__all__ = [
    "BLOCKS",
    "FINE_GROUP",
    "FINE_MOST",
    "FORMATS",
    "GGUF",
    "PANELS",
    "Format",
    "Grid",
    "Plane",
    "Search",
    "activation_group_of",
    "block_format",
    "decoded_only",
    "get_format",
    "written_types",
]
