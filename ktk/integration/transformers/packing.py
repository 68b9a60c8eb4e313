"""The float weights of an experts module packed, by parameter or at once;
packed experts hung on a module that has no weights.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ktk import backends
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.integration.transformers.activations import recognise
from ktk.integration.transformers.experts import ExpertsHandle, hang, weight_names
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops.hybrid import HybridMoE
from ktk.ops.inputs import as_weights
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_matrix

_lock = threading.RLock()


def source_key(module: Any) -> tuple[object, ...]:
    """What was packed: changes when a weight is replaced or written in place (not through
    ``.data``).
    """
    return tuple(
        (id(w), w.data_ptr(), -1 if w.is_inference() else w._version)
        for w in (getattr(module, name) for name in weight_names(module))
    )


def module_spec(
    module: Any,
    weight_format: str | None,
    group_size: int | None,
    activation_group: int | None,
    rotation: Rotation | int | None = None,
) -> tuple[MoESpec, Activation | None]:
    """The spec a float experts module packs to, and its activation (None if ktk does not know it).

    weight_format None takes the exact one: bf16 for bf16 weights, fp32 for fp32 and fp16.
    Raises TypeError if the weights are not float.
    """
    first = getattr(module, weight_names(module)[0])
    down = module.down_proj
    if first.ndim != 3 or not first.numel():
        raise ValueError(
            f"weights of shape {tuple(first.shape)}: must be (num_experts, out, in), and not "
            "packed already"
        )
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"weights are {first.dtype}: must be float32, float16 or bfloat16; dequantise the "
            "model first"
        )
    num_experts, intermediate_size, hidden_size = (
        down.shape if module.is_transposed else _swapped(down.shape)
    )
    if weight_format is None:
        weight_format = "bf16" if first.dtype == down.dtype == torch.bfloat16 else "fp32"
    activation = recognise(module)
    spec = MoESpec(
        num_experts,
        hidden_size,
        intermediate_size,
        weight_format,
        group_size,
        activation_group,
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        activation=activation or Activation(),
        rotation=rotation,
    )
    return spec, activation


def _swapped(shape: torch.Size) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[1]


class ModulePacker:
    """One module's experts packed parameter by parameter, as a checkpoint hands them out: none
    waits in float for another.

    Raises ValueError or TypeError from ``add`` if a parameter's shape, dtype or values do not fit.
    """

    def __init__(self, module: Any, spec: MoESpec) -> None:
        self.spec = spec
        self.missing = set(weight_names(module))
        self._module = module
        self._data: np.ndarray | None = None

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Pack parameter ``name``: (num_experts, ...) as the module has it."""
        spec, layout = self.spec, self.spec.layout
        if self._data is None:
            size = layout.expert_bytes
            self._data = aligned_buffer(spec.num_experts * size).reshape(spec.num_experts, size)
        data, weight = self._data, weight.detach().cpu()
        is_bias = name.endswith("_bias")
        if weight.shape != self._shape(name):
            raise ValueError(f"{name} is {tuple(weight.shape)}: must be {self._shape(name)}")

        def work(expert: int) -> None:
            rows = weight[expert]
            if self._module.is_transposed and not is_bias:
                rows = rows.T
            for projection, part in _split(self._module, name, rows):
                if is_bias:
                    values = part.float().contiguous().numpy()
                    if not np.isfinite(values).all():
                        raise ValueError(f"expert {expert}: {projection} bias holds NaN or inf")
                    out = layout.bias(data[expert], projection)
                    assert out is not None
                    out.view(np.float32)[: len(values)] = values
                    continue
                try:
                    panels = layout.panels(data[expert], projection)
                    given = as_weights(part.contiguous(), name)
                    pack_matrix(given, layout.matrix(projection), panels)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"expert {expert}: {projection}: {error}") from None

        with ThreadPoolExecutor(cpu.num_physical_cores()) as pool:
            list(pool.map(work, range(spec.num_experts)))
        self.missing.discard(name)

    def packed(self) -> StoredExperts:
        """The packed experts; CheckpointError unless every parameter was added."""
        if self.missing or self._data is None:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(self.missing))}")
        return StoredExperts.of_panels(self.spec, self._data)

    def _shape(self, name: str) -> tuple[int, ...]:
        e, h, i = self.spec.num_experts, self.spec.hidden_size, self.spec.intermediate_size
        rows, columns = (h, i) if name.startswith("down") else ((1 + self.spec.has_gate) * i, h)
        if name.endswith("_bias"):
            return (e, rows)
        return (e, columns, rows) if self._module.is_transposed else (e, rows, columns)


def _split(module: Any, name: str, rows: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """(projection, its rows) out of one expert's parameter, (out_features, ...)."""
    if name.startswith("down"):
        return [("down", rows)]
    if not module.has_gate:
        return [("up", rows)]
    half = len(rows) // 2
    gate, up = (rows[:half], rows[half:]) if module.is_concatenated else (rows[0::2], rows[1::2])
    return [("gate", gate), ("up", up)]


def float_expert(module: Any, expert: int) -> ExpertWeights:
    """One expert of a float module, its matrices (out_features, in_features);
    bf16 stays bf16 bits.
    """
    found: dict[str, np.ndarray] = {}
    for name in weight_names(module):
        rows = getattr(module, name)[expert].detach().cpu()
        is_bias = name.endswith("_bias")
        if module.is_transposed and not is_bias:
            rows = rows.T
        for projection, part in _split(module, name, rows):
            if is_bias:
                found[f"{projection}_bias"] = part.float().contiguous().numpy()
            else:
                found[projection] = as_weights(part.contiguous(), name)
    return ExpertWeights(found.pop("gate", None), **found)


def pack_module(
    module: Any,
    weight_format: str | None = None,
    group_size: int | None = None,
    activation_group: int | None = None,
    method: str = "auto",
    num_threads: int | None = None,
    rotation: Rotation | int | None = None,
) -> ExpertsHandle:
    """Pack a float module and hang the handle on it; its parameters stay as they are."""
    with _lock:
        coding = weight_format, group_size, activation_group, rotation
        spec, activation = module_spec(module, *coding)
        backends.select(method, spec)  # refuse before the long part
        packer = ModulePacker(module, spec)
        for name in weight_names(module):
            packer.add(name, getattr(module, name))
        moe = MoE(packer.packed(), method=method, num_threads=num_threads)
        handle = ExpertsHandle(moe, activation, source_key(module))
        hang(module, handle)
        return handle


def attach(
    module: Any,
    packed: StoredExperts,
    method: str = "auto",
    num_threads: int | None = None,
    operator: Callable[[StoredExperts], MoE | HybridMoE] | None = None,
) -> ExpertsHandle:
    """Hang packed experts or GGUF blocks on a module without weights;
    the module says the activation, not the file.

    operator : makes what runs them; None: ``MoE``.
    """
    activation = recognise(module)
    spec = dataclasses.replace(packed.spec, activation=activation or Activation())
    experts = dataclasses.replace(packed, spec=spec)
    made = (
        MoE(experts, method=method, num_threads=num_threads)
        if operator is None
        else operator(experts)
    )
    hybrid = made if isinstance(made, HybridMoE) else None
    moe = made.moe if isinstance(made, HybridMoE) else made
    blocks = None if packed.is_packed else packed
    handle = ExpertsHandle(moe, activation, None, blocks, hybrid)
    hang(module, handle)
    return handle
