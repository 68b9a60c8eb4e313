"""The experts function "ktk": one module's float weights packed, and what runs instead of its forward.

The packed experts hang on the module as a plain attribute, ``_ktk``, not as a parameter or buffer: so
``model.to(dtype)`` leaves them alone, and accelerate does not move them to a GPU (its hooks move every
parameter of a module that is mapped to "cpu").
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ktk import backends
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.spec import MoESpec
from ktk.experts.stored import BlockExperts, ExpertWeights, Packed
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.activations import join_gate_up, recognise
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops.inputs import as_weights
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_matrix
from ktk.reference.moe import ExactExperts

_ATTRIBUTE = "_ktk"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Rows per step of the paths that keep one float32 row per (token, slot): bounds their memory.
_SLOT_TOKENS = 256
_lock = threading.RLock()


def is_experts(module: Any) -> bool:
    """Whether transformers' ``use_experts_implementation`` decorated the module's class."""
    return isinstance(module, torch.nn.Module) and all(hasattr(module, name) for name in _FLAGS)


def find_experts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of every experts module, in order."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def left_eager(model: torch.nn.Module) -> dict[str, str]:
    """Class name -> why ktk does not run it, of experts that transformers' ``use_experts_implementation`` leaves out."""
    found: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        named = type(module).__name__.endswith("Experts") or last == "experts"
        if last.startswith("shared"):  # every token's: not chosen by a router
            continue
        if not named or is_experts(module) or (inside and name.startswith(inside)):
            continue
        if not any(True for _ in module.parameters()):
            continue
        inside = (*inside, f"{name}.")
        if isinstance(module, torch.nn.ModuleDict | torch.nn.ModuleList):
            reason = "each expert is a module of its own"
        else:
            reason = "only its own forward tells how its weights are used"
        found[type(module).__name__] = reason
    return found


def weight_names(module: Any) -> tuple[str, ...]:
    """Names of the parameters that ktk packs."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (f"{first}_bias", "down_proj_bias") if module.has_bias else ()
    return (first, "down_proj", *biases)


class ExpertsHandle:
    """One module's experts, ready to run. Copies of the model share it: packed weights never change."""

    def __init__(
        self,
        moe: MoE,
        activation: Activation | None,
        sources: tuple[object, ...] | None,
        blocks: BlockExperts | None = None,
    ) -> None:
        self.moe = moe
        self.activation = activation  # None: the module computes its own
        self.sources = sources  # what was packed; None if the float weights are gone
        self.blocks = blocks  # in the file's order, which the operator may have repacked
        self._biases: tuple[torch.Tensor, torch.Tensor] | None = None

    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 gate|up (num_experts, 2 I) and down (num_experts, H) biases, from the packed experts."""
        if self._biases is None:
            packed, spec = self.moe.packed, self.moe.spec
            first = ("gate", "up") if spec.has_gate else ("up",)

            def bias(name: str) -> np.ndarray:
                if isinstance(packed, BlockExperts):
                    return packed.biases[name]
                experts = ExactExperts(packed)
                rows = [experts.bias(e, name) for e in range(spec.num_experts)]
                return np.stack([row for row in rows if row is not None])

            def stacked(*names: str) -> torch.Tensor:
                return torch.from_numpy(np.concatenate([bias(name) for name in names], axis=1))

            self._biases = (stacked(*first), stacked("down"))
        return self._biases

    def dequantised(self, expert: int) -> ExpertWeights:
        """One expert's weights as the packed codes or blocks say, float32."""
        packed = self.moe.packed
        if isinstance(packed, BlockExperts):
            return expert_weights(self.blocks or packed, expert)
        return ExactExperts(packed).dequantised(expert)

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertsHandle:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "a model with ktk experts cannot be pickled: save the float model, or convert it once with "
            "`ktk convert` and load that directory in each process"
        )


def _source_key(module: Any) -> tuple[object, ...]:
    """Changes when a weight is replaced or written in place (not through ``.data``)."""
    return tuple(
        (id(w), w.data_ptr(), -1 if w.is_inference() else w._version)
        for w in (getattr(module, name) for name in weight_names(module))
    )


def module_spec(
    module: Any,
    weight_format: str | None,
    group_size: int | None,
    activation_group: int | None,
) -> tuple[MoESpec, Activation | None]:
    """The spec a float experts module packs to, and its activation (None if ktk does not know it).

    weight_format None takes the exact one: bf16 for bf16 weights, fp32 for fp32 and fp16.
    Raises TypeError if the weights are not float.
    """
    first = getattr(module, weight_names(module)[0])
    down = module.down_proj
    if first.ndim != 3 or not first.numel():
        raise ValueError(
            f"weights of shape {tuple(first.shape)}: must be (num_experts, out, in), and not packed already"
        )
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"weights are {first.dtype}: must be float32, float16 or bfloat16; dequantise the model first"
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
    )
    return spec, activation


def _swapped(shape: torch.Size) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[1]


class ModulePacker:
    """One module's experts packed parameter by parameter, as a checkpoint hands them out: none waits in float for another.

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

    def packed(self) -> Packed:
        """The packed experts; CheckpointError unless every parameter was added."""
        if self.missing or self._data is None:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(self.missing))}")
        return Packed(self.spec, self._data)

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
    """One expert of a float module, its matrices (out_features, in_features); bf16 stays bf16 bits."""
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
) -> ExpertsHandle:
    """Pack a float module and hang the handle on it; its parameters stay as they are."""
    with _lock:
        spec, activation = module_spec(module, weight_format, group_size, activation_group)
        backends.select(method, spec)  # refuse before the long part
        packer = ModulePacker(module, spec)
        for name in weight_names(module):
            packer.add(name, getattr(module, name))
        moe = MoE(packer.packed(), method=method, num_threads=num_threads)
        handle = ExpertsHandle(moe, activation, _source_key(module))
        setattr(module, _ATTRIBUTE, handle)
        return handle


def attach(
    module: Any,
    packed: Packed | BlockExperts,
    method: str = "auto",
    num_threads: int | None = None,
) -> ExpertsHandle:
    """Hang packed experts or GGUF blocks on a module without weights; the module says the activation, not the file."""
    activation = recognise(module)
    spec = dataclasses.replace(packed.spec, activation=activation or Activation())
    moe = MoE(dataclasses.replace(packed, spec=spec), method=method, num_threads=num_threads)
    blocks = packed if isinstance(packed, BlockExperts) else None
    handle = ExpertsHandle(moe, activation, None, blocks)
    setattr(module, _ATTRIBUTE, handle)
    return handle


def drop_weights(module: Any) -> None:
    """Replace the float parameters by empty tensors that no state_dict holds."""
    for name in weight_names(module):
        weight = module._parameters.pop(name)
        empty = torch.empty(0, dtype=weight.dtype, device="cpu")
        hf.mark_initialised(empty)
        setattr(module, name, empty)
    handle = module.__dict__.get(_ATTRIBUTE)
    if handle is not None:
        handle.sources = None


def handle_of(module: Any) -> ExpertsHandle | None:
    """The packed experts of a module, if it has any."""
    handle: ExpertsHandle | None = module.__dict__.get(_ATTRIBUTE)
    return handle


def ktk_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls instead of the module's forward.

    hidden_states : (num_tokens, hidden_size), on any device. top_k_index, top_k_weights : (num_tokens, top_k).
    Returns (num_tokens, hidden_size) in hidden_states' dtype and device. Gradients reach hidden_states,
    top_k_weights and a norm behind the experts; see ``gradients``.
    """
    handle = handle_of(module)
    if handle is None or (handle.sources is not None and handle.sources != _source_key(module)):
        handle = pack_module(module)
    if torch.is_grad_enabled():
        inputs = (hidden_states, top_k_weights, *module.parameters())
        if any(x.requires_grad for x in inputs):
            from ktk.integration.transformers.gradients import ExpertsFunction

            out: torch.Tensor = ExpertsFunction.apply(
                module, handle, hidden_states, top_k_index, top_k_weights, *module.parameters()
            )
            return out
    return run_experts(module, handle, hidden_states, top_k_index, top_k_weights)


def run_experts(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """``ktk_experts_forward`` without a graph."""
    ids, weights = top_k_index.detach().cpu(), top_k_weights.detach().cpu()
    if handle.activation is not None and not has_post_norm(module):
        out: torch.Tensor = handle.moe.forward(hidden_states.detach().cpu(), ids, weights)
    else:
        steps = range(0, len(hidden_states), _SLOT_TOKENS)
        parts = [slice(start, start + _SLOT_TOKENS) for start in steps]
        rows = [
            _by_slot(module, handle, hidden_states[p].detach().cpu(), ids[p], weights[p])
            for p in parts
        ]
        out = torch.cat(rows) if rows else torch.empty(hidden_states.shape)
    return out.to(device=hidden_states.device, dtype=hidden_states.dtype)


def has_post_norm(module: Any) -> bool:
    """Whether the module normalises each expert's output before it is weighted."""
    return bool(getattr(module, "has_post_expert_norm", False))


def _by_slot(
    module: Any,
    handle: ExpertsHandle,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The same sum, one float32 row per (token, slot): for what happens between or after ktk's projections.

    Slots are added in top-k order, in float32.
    """
    valid = (ids >= 0) & (ids < handle.moe.spec.num_experts)
    token, slot = torch.nonzero(valid, as_tuple=True)
    out = torch.zeros(hidden.shape, dtype=torch.float32)  # (tokens, H)
    if not len(token):
        return out
    experts = ids[token, slot]  # (rows,)
    x = hidden[token].float()  # (rows, H)
    if handle.activation is not None:
        y = handle.moe.forward(x, experts[:, None], torch.ones(len(x), 1))
    else:
        y = _own_activation(module, handle, x, experts)
    if has_post_norm(module):
        norm = module.post_expert_norm
        device = next((p.device for p in norm.parameters()), y.device)
        y = norm(y.to(device)).detach().float().cpu()
    by_slot = torch.zeros(*ids.shape, hidden.shape[1])  # (tokens, top_k, H)
    by_slot[token, slot] = y
    scale = torch.where(valid, weights.float(), 0.0)
    for k in range(ids.shape[1]):
        out += scale[:, k, None] * by_slot[:, k]
    return out


def _own_activation(
    module: Any, handle: ExpertsHandle, x: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """ktk's projections around the module's own activation: float32 (rows, H) to float32 (rows, H)."""
    moe, index = handle.moe, experts.numpy()
    # (rows, 2 I): gate, then up
    gate_up = torch.from_numpy(moe.linear("gate_up", x.numpy(), index))
    if moe.spec.has_bias:
        gate_up = gate_up + handle.biases()[0][experts]
    with torch.no_grad():
        if moe.spec.has_gate:
            gate, up = gate_up.chunk(2, dim=-1)
            act = module._apply_gate(join_gate_up(gate, up, module.is_concatenated))
        else:
            act = module.act_fn(gate_up)  # (rows, I)
    y = torch.from_numpy(moe.linear("down", act.detach().float().numpy(), index))
    return y + handle.biases()[1][experts] if moe.spec.has_bias else y
