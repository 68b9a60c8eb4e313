"""What a weight format must tell: its codes and its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktk.experts.spec import MoESpec

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantFormat:
    """One row of the format table.

    bits : bits of a code. zero_point : the code that means 0 (integer formats).
    code_min, code_max : range of (code - zero_point) the quantiser uses.
    group_sizes : allowed values of MoESpec.group_size; 0 = per output channel.
    default_group, default_activation_group : what `group_size=None` means.
    """

    name: str
    bits: int
    is_integer: bool
    zero_point: int = 0
    code_min: int = 0
    code_max: int = 0
    group_sizes: tuple[int, ...] = (0,)
    default_group: int = 0
    default_activation_group: int = 0

    def check(self, spec: MoESpec) -> None:
        """ValueError if the spec's groups do not fit this format."""
        if type(spec.group_size) is not int or spec.group_size not in self.group_sizes:
            allowed = ", ".join(map(str, self.group_sizes))
            raise ValueError(
                f"group_size={spec.group_size!r}: {self.name} takes {allowed} (0 = one scale per output channel)"
            )
        allowed_activation = GROUP_SIZES if self.is_integer else (0,)
        if (
            type(spec.activation_group) is not int
            or spec.activation_group not in allowed_activation
        ):
            raise ValueError(
                f"activation_group={spec.activation_group!r}: {self.name} takes "
                f"{', '.join(map(str, allowed_activation))}"
            )
