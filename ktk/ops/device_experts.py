"""Experts that lie on a device of torch's, dequantised, and their sums there.

Each has a slot of stacked matrices, so that one grouped product runs all that a call needs. Their
numbers are what the packed codes say, rounded to the device's dtype; activations are not quantised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ktk.errors import BackendError
from ktk.experts.activation import Activation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights

DTYPES = (torch.bfloat16, torch.float32)
SUM_BYTES = 64 << 20  # of the rows that wait for their sum: more tokens are cut
_GROUPED = getattr(torch.nn.functional, "grouped_mm", None)


class DeviceExperts:
    """Room for so many experts of one layer on a device.

    Parameters
    ----------
    spec : MoESpec
        Shapes and activation.
    num_slots : int
        Experts that have room. 0 is none.
    device : torch.device
    dtype : torch.dtype
        Of weights and of what is multiplied: torch.bfloat16 or torch.float32. Sums are float32.

    Raises
    ------
    ValueError for another dtype, BackendError if the device has not the memory.
    """

    def __init__(
        self, spec: MoESpec, num_slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype}: experts on a device are torch.bfloat16 or float32")
        self.spec, self.num_slots, self.device, self.dtype = spec, num_slots, device, dtype
        self.expert_bytes = device_expert_bytes(spec, dtype)
        with torch.inference_mode(False):  # else nothing could be written outside of that mode
            self._planes = self._new(num_slots)
            self._numbers = torch.arange(num_slots, device=device)

    @torch.no_grad()
    def write(self, slot: int, weights: ExpertWeights | dict[str, torch.Tensor]) -> None:
        """Put an expert into a slot that no call uses. weights : of ``ktk.experts``, or what
        ``staged`` made.
        """
        planes = weights if isinstance(weights, dict) else self._host_planes(weights)
        for name, plane in planes.items():
            self._planes[name][slot].copy_(plane)

    @torch.no_grad()
    def staged(self, weights: ExpertWeights) -> dict[str, torch.Tensor]:
        """An expert on the device, beside the slots. BackendError if there is no memory for it."""
        made = self._new(1)
        for name, plane in self._host_planes(weights).items():
            made[name][0].copy_(plane)
        return {name: plane[0] for name, plane in made.items()}

    def synchronise(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @property
    def is_grouped(self) -> bool:
        """Whether one product of torch's runs all slots; else the host learns first how many rows
        each has, and waits for the device to say so.
        """
        widths = self.spec.hidden_size, self.spec.intermediate_size
        return _GROUPED is not None and all(w * self.dtype.itemsize % 16 == 0 for w in widths)

    @torch.no_grad()
    def forward(
        self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over each token's pairs of weight * expert(hidden).

        hidden : (num_tokens, hidden_size), any float dtype. slots : int64 (num_tokens, top_k), -1
        where another runs the pair. weights : float32, likewise. All on any device. Returns float32
        (num_tokens, hidden_size) on the experts' device, which may not have made it yet if it works
        on its own. Pairs are summed in top-k order.
        """
        step = max(1, SUM_BYTES // (4 * slots.shape[1] * self.spec.hidden_size))
        parts = [
            self._sums(hidden[i : i + step], slots[i : i + step], weights[i : i + step])
            for i in range(0, max(1, len(hidden)), step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _sums(
        self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        (num_tokens, top_k), last = slots.shape, self.num_slots
        if not slots.numel() or not last:
            return torch.zeros(hidden.shape, dtype=torch.float32, device=self.device)
        # Pairs slot by slot, those of others last: no size depends on what the device found.
        slots = slots.to(self.device).flatten()  # (num_tokens * top_k,)
        slots, pairs = torch.sort(torch.where(slots < 0, last, slots), stable=True)
        ends = torch.searchsorted(slots, self._numbers, right=True, out_int32=True)  # (num_slots,)
        is_here, slots = (slots < last)[:, None], slots.clamp(max=last - 1)
        x = hidden.to(self.device, self.dtype)[pairs // top_k]  # (num_tokens * top_k, H)
        y = self._linear("first", x, ends, slots)  # float32 (.., 2 I), or I without a gate
        gate, up = y.chunk(2, dim=1) if self.spec.has_gate else (None, y)
        act = activate(gate, up, self.spec.activation).to(self.dtype)  # (.., I)
        y = self._linear("down", act, ends, slots)  # float32 (.., H)
        y = y * weights.to(self.device).flatten()[pairs, None]
        y = torch.where(is_here, y, 0.0)  # what a product leaves behind the last end may be NaN
        by_token = torch.empty_like(y).index_copy_(0, pairs, y)
        return by_token.view(num_tokens, top_k, -1).sum(dim=1)

    def _linear(
        self, name: str, x: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        y = grouped_linear(x, self._planes[name], ends).float()
        bias = self._planes.get(f"{name}_bias")
        return y if bias is None else y + bias[slots]

    def _new(self, count: int) -> dict[str, torch.Tensor]:
        """Stacked matrices (count, out_features, in_features), float32 biases (count,
        out_features).
        """
        spec = self.spec
        first = (1 + spec.has_gate) * spec.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "first": (count, first, spec.hidden_size),
            "down": (count, spec.hidden_size, spec.intermediate_size),
        }
        if spec.has_bias:
            shapes |= {"first_bias": (count, first), "down_bias": (count, spec.hidden_size)}
        try:
            return {
                name: torch.empty(
                    shape,
                    dtype=torch.float32 if name.endswith("bias") else self.dtype,
                    device=self.device,
                )
                for name, shape in shapes.items()
            }
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise self._no_room(count) from error
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise self._no_room(count) from error

    def _no_room(self, count: int) -> BackendError:
        return BackendError(
            f"{self.device}: no memory for {count} experts of {self.expert_bytes} bytes, "
            f"{self.dtype}: keep fewer there"
        )

    def _host_planes(self, weights: ExpertWeights) -> dict[str, torch.Tensor]:
        w = weights
        first = [w.up] if w.gate is None else [w.gate, w.up]
        arrays: dict[str, Any] = {"first": np.concatenate(first), "down": w.down}
        if self.spec.has_bias:
            biases = [b for b in (w.gate_bias, w.up_bias) if b is not None]
            arrays |= {"first_bias": np.concatenate(biases), "down_bias": w.down_bias}
        return {
            name: torch.from_numpy(array).to(self._planes[name].dtype)
            for name, array in arrays.items()
        }


def why_not(device: torch.device) -> str | None:
    """Why torch has no such device here; None if it has."""
    if device.type == "cpu":
        return None
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.type:
        named = "no accelerator" if found is None else f"{found.type} alone"
        return f"torch {torch.__version__} finds {named} here"
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        return f"there are {count} of {device.type}"
    return None


def accelerator() -> torch.device | None:
    """The device that torch finds beside the CPU."""
    if not torch.accelerator.is_available():  # torch 2.6 raises where there is none
        return None
    found = torch.accelerator.current_accelerator()
    return found if found is not None and why_not(found) is None else None


def device_expert_bytes(spec: MoESpec, dtype: torch.dtype) -> int:
    """Bytes that an expert takes on a device, biases included."""
    outs = (1 + spec.has_gate) * spec.intermediate_size + spec.hidden_size
    return spec.num_weights * dtype.itemsize + (4 * outs if spec.has_bias else 0)


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x up to ends[0] times weights[0] transposed, those up to ends[1] by weights[1], and
    so on.

    x : (rows, in_features). weights : (groups, out_features, in_features). ends : int32 (groups,),
    ascending, at most rows, on x's device. Returns (rows, out_features) of x's dtype; rows behind
    the last end hold anything.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if _GROUPED is not None and aligned:  # as its strides must be
        y: torch.Tensor = _GROUPED(x, weights.transpose(1, 2), offs=ends)
        return y
    out, start = x.new_empty(len(x), weights.shape[1]), 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weights[group].T, out=out[start:end])
        start = end
    return out


def activate(gate: torch.Tensor | None, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """``Activation.apply`` of tensors."""
    x = up if gate is None else gate
    if act.kind == "sigmoid_glu":
        if gate is not None:
            x = gate.clamp(act.gate_min, act.gate_max)
        h = x * torch.sigmoid(act.alpha * x)
    elif act.kind == "gelu_tanh":
        h = torch.nn.functional.gelu(x, approximate="tanh")
    else:
        h = torch.relu(x).square()
    return h if gate is None else h * (up.clamp(act.up_min, act.up_max) + act.up_offset)
