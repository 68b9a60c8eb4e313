"""The experts function "ktk": one module's float weights packed, and what runs instead of its forward.

The packed experts hang on the module as a plain attribute, ``_ktk``, not as a parameter or buffer: so
``model.to(dtype)`` leaves them alone, and accelerate does not move them to a GPU (its hooks move every
parameter of a module that is mapped to "cpu").
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ktk import backends
from ktk.integration.transformers.activations import join_gate_up, recognise
from ktk.moe import MoE, as_weights
from ktk.pack import pack_experts
from ktk.reference.moe import ExactExperts
from ktk.types import Activation, BlockExperts, ExpertWeights, MoESpec, Packed

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


def weight_names(module: Any) -> tuple[str, ...]:
    """Names of the parameters that ktk packs."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (f"{first}_bias", "down_proj_bias") if module.has_bias else ()
    return (first, "down_proj", *biases)


class ExpertsHandle:
    """One module's experts, ready to run. Copies of the model share it: packed weights never change."""

    def __init__(
        self, moe: MoE, activation: Activation | None, sources: tuple[object, ...] | None
    ) -> None:
        self.moe = moe
        self.activation = activation  # None: the module computes its own
        self.sources = sources  # what was packed; None if the float weights are gone
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


def _expert_weights(module: Any, expert: int) -> ExpertWeights:
    """One expert's matrices as (out, in), gate and up told apart; bf16 stays bf16 bits."""
    names = weight_names(module)
    first, down = (getattr(module, name)[expert].detach().cpu() for name in names[:2])
    if module.is_transposed:
        first, down = first.T, down.T
    gate, up = _split(first, module)
    bias: list[np.ndarray | None] = [None, None, None]
    if module.has_bias:
        first_bias, down_bias = (
            getattr(module, name)[expert].detach().float().cpu() for name in names[2:]
        )
        gate_bias, up_bias = _split(first_bias, module)
        bias = [
            None if b is None else b.contiguous().numpy() for b in (gate_bias, up_bias, down_bias)
        ]
    matrices = [
        None if w is None else as_weights(w.contiguous(), "weights") for w in (gate, up, down)
    ]
    assert matrices[1] is not None
    assert matrices[2] is not None
    return ExpertWeights(matrices[0], matrices[1], matrices[2], *bias)


def _split(first: torch.Tensor, module: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Rows of gate and of up out of the module's fused order."""
    if not module.has_gate:
        return None, first
    if module.is_concatenated:
        half = len(first) // 2
        return first[:half], first[half:]
    return first[0::2], first[1::2]


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
        packed = pack_experts(spec, lambda expert: _expert_weights(module, expert))
        moe = MoE(packed, method=method, num_threads=num_threads)
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
    handle = ExpertsHandle(moe, activation, None)
    setattr(module, _ATTRIBUTE, handle)
    return handle


def drop_weights(module: Any) -> None:
    """Replace the float parameters by empty tensors that no state_dict holds."""
    for name in weight_names(module):
        weight = module._parameters.pop(name)
        empty = torch.empty(0, dtype=weight.dtype, device="cpu")
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, name, empty)
    handle = module.__dict__.get(_ATTRIBUTE)
    if handle is not None:
        handle.sources = None


def handle_of(module: Any) -> ExpertsHandle | None:
    """The packed experts of a module, if it has any."""
    handle: ExpertsHandle | None = module.__dict__.get(_ATTRIBUTE)
    return handle


class _InferenceOnly(torch.autograd.Function):
    """Keeps the graph, so that a backward pass fails instead of leaving gradients out."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "ktk experts are inference-only in this version: they have no gradients. Run under torch.no_grad(), "
            'or train with model.set_experts_implementation("eager")'
        )


def ktk_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls instead of the module's forward.

    hidden_states : (num_tokens, hidden_size), on any device. top_k_index, top_k_weights : (num_tokens, top_k).
    Returns (num_tokens, hidden_size) in hidden_states' dtype and device.
    """
    handle = handle_of(module)
    if handle is None or (handle.sources is not None and handle.sources != _source_key(module)):
        handle = pack_module(module)

    def run() -> torch.Tensor:
        ids, weights = top_k_index.detach().cpu(), top_k_weights.detach().cpu()
        if handle.activation is not None and not getattr(module, "has_post_expert_norm", False):
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

    if torch.is_grad_enabled():
        inputs = [hidden_states, top_k_weights, *module.parameters(recurse=False)]
        if any(x.requires_grad for x in inputs):
            out: torch.Tensor = _InferenceOnly.apply(run, *inputs)
            return out
    return run()


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
    if getattr(module, "has_post_expert_norm", False):
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
