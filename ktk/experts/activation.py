"""The activations that kernels compute between up and down."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# Order is the C enum `ktk_activation_kind`.
ACTIVATION_KINDS = ("sigmoid_glu", "gelu_tanh", "relu2")


@dataclass(frozen=True)
class Activation:
    """The elementwise function between the gate|up and the down projection.

    ``sigmoid_glu``: ``g = clamp(gate, gate_min, gate_max)``, ``u = clamp(up, up_min, up_max)``,
    result ``g * sigmoid(alpha * g) * (u + up_offset)``. It covers SiLU, clamped SiLU and the
    gpt-oss / MiniMax-M3 variants. ``gelu_tanh`` and ``relu2`` apply to the gate and multiply by up.
    Without a gate projection (``MoESpec.has_gate`` False) the function applies to up alone.
    """

    kind: str = "sigmoid_glu"
    alpha: float = 1.0
    gate_min: float = -math.inf
    gate_max: float = math.inf
    up_min: float = -math.inf
    up_max: float = math.inf
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATION_KINDS:
            raise ValueError(f"activation kind={self.kind!r}: must be one of {ACTIVATION_KINDS}")
        for name in ("alpha", "gate_min", "gate_max", "up_min", "up_max", "up_offset"):
            given = getattr(self, name)
            if isinstance(given, (str, bool)):
                raise ValueError(f"activation {name}={given!r}: must be a number")
            try:
                with np.errstate(over="ignore"):
                    value = float(np.float32(given))  # what the kernels compute with
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"activation {name}={given!r}: must be a number") from None
            infinite = {
                "gate_min": -math.inf,
                "up_min": -math.inf,
                "gate_max": math.inf,
                "up_max": math.inf,
            }
            if not math.isfinite(value) and (given != value or value != infinite.get(name)):
                raise ValueError(f"activation {name}={given}: must be finite in float32")
        if self.gate_min > self.gate_max or self.up_min > self.up_max:
            raise ValueError(f"activation {self}: a lower bound is above its upper bound")

    @classmethod
    def silu(cls, limit: float = 0.0) -> Activation:
        """SiLU(gate) * up; ``limit`` not 0 clamps gate from above and up on both sides first."""
        if limit == 0:
            return cls()
        return cls(gate_max=limit, up_min=-limit, up_max=limit)

    @classmethod
    def swigluoai(
        cls, alpha: float = 1.702, limit: float = 7.0, gate_floor: bool = False
    ) -> Activation:
        """gate * sigmoid(alpha * gate) * (up + 1) with both clamped by ``limit`` unless it is 0.

        ``gate_floor`` also clamps the gate from below: KT-Kernel's rule; gpt-oss clamps it from
        above only.
        """
        bound = math.inf if limit == 0 else limit
        return cls(
            alpha=alpha,
            gate_min=-bound if gate_floor else -math.inf,
            gate_max=bound,
            up_min=-bound,
            up_max=bound,
            up_offset=1.0,
        )

    @classmethod
    def gelu_tanh(cls) -> Activation:
        """GELU in its tanh form, times up."""
        return cls(kind="gelu_tanh")

    @classmethod
    def relu2(cls) -> Activation:
        """max(x, 0) ** 2."""
        return cls(kind="relu2")

    def apply(self, gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
        """The function itself, float32 or float64 (...) as gate and up are; gate None without a
        gate projection.

        By its definition: kernels compute their own exponential, see ``ktk.reference.activation``.
        """
        x, one = up if gate is None else gate, up.dtype.type(1)
        with np.errstate(all="ignore"):
            if self.kind == "sigmoid_glu":
                if gate is not None:
                    x = _clipped(gate, self.gate_min, self.gate_max)
                h = x / (one + np.exp(up.dtype.type(-self.alpha) * x))
            elif self.kind == "gelu_tanh":
                root = up.dtype.type(math.sqrt(2.0 / math.pi))
                inner = root * (x + up.dtype.type(0.044715) * x * x * x)
                h = up.dtype.type(0.5) * x * (one + np.tanh(inner))
            else:
                positive = np.maximum(x, up.dtype.type(0))
                h = positive * positive
        if gate is None:
            return np.asarray(h)
        return np.asarray(
            h * (_clipped(up, self.up_min, self.up_max) + up.dtype.type(self.up_offset))
        )

    def gradient(
        self, gate: np.ndarray | None, up: np.ndarray, d_h: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Gradients of gate (None without one) and up, given that of ``apply``'s result; all
        float32, or all float64, (...).

        A clamped value gets zero; one on its bound gets the gradient, as torch.clamp's.
        """
        x, one = up if gate is None else gate, up.dtype.type(1)
        with np.errstate(all="ignore"):
            if self.kind == "sigmoid_glu":
                if gate is not None:
                    x = _clipped(gate, self.gate_min, self.gate_max)
                alpha = up.dtype.type(self.alpha)
                sigmoid = one / (one + np.exp(-alpha * x))
                h, slope = x * sigmoid, sigmoid * (one + alpha * x * (one - sigmoid))
            elif self.kind == "gelu_tanh":
                half, root = up.dtype.type(0.5), up.dtype.type(math.sqrt(2.0 / math.pi))
                cubic = up.dtype.type(0.044715)
                tanh = np.tanh(root * (x + cubic * x * x * x))
                inner = root * (one + 3 * cubic * x * x)  # the slope of tanh's argument
                h, slope = half * x * (one + tanh), half * (one + tanh)
                slope += half * x * (one - tanh * tanh) * inner
            else:
                positive = np.maximum(x, up.dtype.type(0))
                h, slope = positive * positive, 2 * positive
            if gate is None:
                return None, d_h * slope
            if self.kind == "sigmoid_glu":
                slope = np.where(_is_inside(gate, self.gate_min, self.gate_max), slope, 0)
            offset = up.dtype.type(self.up_offset)
            d_gate = d_h * (_clipped(up, self.up_min, self.up_max) + offset) * slope
            d_up = np.where(_is_inside(up, self.up_min, self.up_max), d_h * h, 0)
            return d_gate.astype(up.dtype, copy=False), d_up.astype(up.dtype, copy=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-able dict; infinities become None (JSON has none)."""
        fields = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Activation:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(fields) - known
        if unknown:
            raise ValueError(
                f"activation has unknown fields {sorted(unknown)}; known: {sorted(known)}"
            )
        return cls(**{k: v for k, v in fields.items() if v is not None})


def _clipped(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(x, x.dtype.type(low), x.dtype.type(high))


def _is_inside(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Also where x is NaN, which then stays visible."""
    return ~((x < x.dtype.type(low)) | (x > x.dtype.type(high)))
