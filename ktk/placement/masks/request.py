"""What a command line asks of a device's experts: ``ktk run``, ``chat`` and ``serve``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ktk.placement.residency.capacity import parse_bytes


@dataclass(frozen=True)
class HybridRequest:
    """As ``KtkConfig`` takes them, under the same names; None and 0: as if not said."""

    gpu_experts: int | float | str | None = None
    placement: str | None = None
    device: str | None = None
    max_deferred_experts: int = 0

    @classmethod
    def of(
        cls, gpu_experts: str | None, placement: str | None, device: str | None, deferred: int
    ) -> HybridRequest | None:
        """Of the texts of --gpu-experts, --placement and --device; None if nothing is asked for.

        gpu_experts : "16", of each layer on average; "0.4" or "40%", a share of all; "8GiB".
        Raises ValueError that names the option.
        """
        if gpu_experts is None and placement is None:
            if device is not None:
                raise ValueError(f"--device {device}: say which experts it runs: --gpu-experts")
            return cls(max_deferred_experts=deferred) if deferred else None
        number = None if gpu_experts is None else _number(gpu_experts)
        return cls(number, placement, device, deferred)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``KtkConfig``."""
        return dict(vars(self))


def _number(text: str) -> int | float | str:
    if text.isdecimal():
        return int(text)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        try:
            parse_bytes(text)
        except ValueError as error:
            raise ValueError(
                f"--gpu-experts {text}: must be a number of each layer, as 16; a share of all, as "
                f"0.4 or 40%; or bytes, as 8GiB: {error}"
            ) from None
        return text
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise ValueError(f"--gpu-experts {text}: a share must be 0 to 1, or 0% to 100%")
    return share
