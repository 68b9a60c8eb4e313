"""Experts that lie on a device of torch's, dequantised, and their sums there.

Each has a slot of stacked matrices, so that one grouped product runs all that a call needs. Their
numbers are what the packed codes say, rounded to the device's dtype; activations are not quantised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ktk.errors import BackendError
from ktk.experts.activation import Activation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights

DTYPES = (torch.bfloat16, torch.float32)
SUM_BYTES = 64 << 20  # of the rows that wait for their sum: more tokens are cut
_GROUPED = getattr(torch.nn.functional, "grouped_mm", None)


class Pairs(NamedTuple):
    """The (token, expert) pairs of a call that the device runs, one row each, slot by slot.

    token : int64 (rows,). slots : int64 (rows,), ascending. weights : float32 (rows,). places :
    int64 (num_tokens, top_k), the row of each pair; ``rows`` where another runs it.
    """

    token: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, slots: np.ndarray, topk_weights: np.ndarray) -> Pairs:
        """slots : int64 (num_tokens, top_k), -1 where another runs the pair. topk_weights :
        float32, likewise.
        """
        flat = slots.reshape(-1)
        pairs = np.flatnonzero(flat >= 0)
        pairs = pairs[np.argsort(flat[pairs], kind="stable")]
        places = np.full(flat.shape, len(pairs), np.int64)
        places[pairs] = np.arange(len(pairs))
        token = pairs // slots.shape[1]
        return cls(token, flat[pairs], topk_weights.reshape(-1)[pairs], places.reshape(slots.shape))


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

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Sum over each token's pairs of weight * expert(hidden).

        hidden : (num_tokens, hidden_size), any float dtype, on any device. Returns float32
        (num_tokens, hidden_size) on the experts' device; a device that works on its own may not
        have made it yet. Pairs are summed in top-k order.
        """
        top_k = pairs.places.shape[1]
        step = max(1, SUM_BYTES // (4 * top_k * self.spec.hidden_size))
        if len(hidden) <= step:
            return self._sums(hidden, pairs)
        parts = []
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            slots = np.append(pairs.slots, -1)[pairs.places[rows]]
            weights = np.append(pairs.weights, np.float32(0))[pairs.places[rows]]
            parts.append(self._sums(hidden[rows], Pairs.of(slots, weights)))
        return torch.cat(parts)

    def _sums(self, hidden: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if not len(pairs.token):
            return torch.zeros(hidden.shape, dtype=torch.float32, device=self.device)
        x = hidden.to(self.device, self.dtype)[self._on_device(pairs.token)]  # (rows, H)
        slots = self._on_device(pairs.slots)
        counts = np.bincount(pairs.slots, minlength=self.num_slots)
        y = self._linear("first", x, counts, slots)  # float32 (rows, 2 I), or I without a gate
        gate, up = y.chunk(2, dim=1) if self.spec.has_gate else (None, y)
        act = activate(gate, up, self.spec.activation).to(self.dtype)  # (rows, I)
        y = self._linear("down", act, counts, slots)  # float32 (rows, H)
        y = y * self._on_device(pairs.weights)[:, None]
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])  # the last row: pairs that are not here
        return y[self._on_device(pairs.places)].sum(dim=1)

    def _linear(
        self, name: str, x: torch.Tensor, counts: np.ndarray, slots: torch.Tensor
    ) -> torch.Tensor:
        y = grouped_linear(x, self._planes[name], counts).float()
        bias = self._planes.get(f"{name}_bias")
        return y if bias is None else y + bias[slots]

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

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


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
    """The first counts[0] rows times weights[0] transposed, the next by weights[1], and so on.

    x : (rows, in_features). weights : (groups, out_features, in_features). counts : int (groups,),
    sums to rows. Returns (rows, out_features) of x's dtype.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if _GROUPED is not None and aligned:  # as its strides must be
        ends = torch.from_numpy(np.cumsum(counts, dtype=np.int32)).to(x.device)
        y: torch.Tensor = _GROUPED(x, weights.transpose(1, 2), offs=ends)
        return y
    out, start = x.new_empty(len(x), weights.shape[1]), 0
    for group in np.flatnonzero(counts).tolist():
        rows = slice(start, start + int(counts[group]))
        torch.mm(x[rows], weights[group].T, out=out[rows])
        start = rows.stop
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
