"""gguf: the block formats of GGUF files, each matrix in its own type, run as they lie in the file.

Not a row of ``FORMATS``: nothing packs into it. Which type a matrix has stands in ``ktk.experts.stored.BlockMatrix``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktk.experts.formats.base import GROUP_SIZES, QuantFormat

if TYPE_CHECKING:
    from ktk.experts.spec import MoESpec


@dataclass(frozen=True)
class BlockFormat(QuantFormat):
    def check(self, spec: MoESpec) -> None:
        """ValueError if the spec's groups do not fit."""
        if spec.group_size != 0:
            raise ValueError(
                f"group_size={spec.group_size!r}: GGUF blocks have groups of their own, leave it out"
            )
        if type(spec.activation_group) is not int or spec.activation_group not in GROUP_SIZES:
            raise ValueError(
                f"activation_group={spec.activation_group!r}: gguf takes {', '.join(map(str, GROUP_SIZES))}"
            )


def activation_group_of(bits: float) -> int:
    """The default for the finest of a layer's types, of ``bits`` per weight.

    What one scale for more activations costs drowns in the error of coarser weights.
    """
    return 64 if bits >= 5 else 128


GGUF = BlockFormat(name="gguf", bits=0, is_integer=True, default_activation_group=64)
