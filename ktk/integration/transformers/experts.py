"""Experts modules of transformers models: which modules they are, their parameters, and the packed
experts that hang on them.

Those hang on the module as a plain attribute, ``_ktk``, not as a parameter or buffer: so
``model.to(dtype)`` leaves them alone, and accelerate does not move them to a GPU (its hooks move
every parameter of a module that is mapped to "cpu").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.integration.transformers import names as hf
from ktk.ops.hybrid import HybridMoE
from ktk.ops.streamed import AnyMoE

NAME = "ktk"  # of the experts function
_ATTRIBUTE = "_ktk"
_LISTENER = "_ktk_listener"
Listener = Callable[[torch.Tensor, torch.Tensor], None]
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts(module: Any) -> bool:
    """Whether transformers' ``use_experts_implementation`` decorated the module's class."""
    return isinstance(module, torch.nn.Module) and all(hasattr(module, name) for name in _FLAGS)


def find_experts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of every experts module, in order."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def left_eager(model: torch.nn.Module) -> dict[str, str]:
    """Class name -> why ktk does not run it, of experts that transformers'
    ``use_experts_implementation`` leaves out.
    """
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


def has_post_norm(module: Any) -> bool:
    """Whether the module normalises each expert's output before it is weighted."""
    return bool(getattr(module, "has_post_expert_norm", False))


class Deferring(Protocol):
    """Who runs a layer's experts where some of them wait for the next layer."""

    def is_on(self) -> bool:
        """Whether they wait in this call."""

    def run(
        self,
        layer: int,
        handle: ExpertsHandle,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """What the layer's experts module returns."""


class ExpertsHandle:
    """One module's experts, ready to run.

    Copies of the model share it: packed weights never change.
    """

    def __init__(
        self,
        moe: AnyMoE,
        activation: Activation | None,
        sources: tuple[object, ...] | None,
        blocks: StoredExperts | None = None,
        hybrid: HybridMoE | None = None,
    ) -> None:
        self.moe = moe  # of the CPU
        self.hybrid = hybrid  # if a device has some of them
        self.deferral: tuple[Deferring, int] | None = None  # and the layer's number in it
        self.activation = activation  # None: the module computes its own
        self.sources = sources  # what was packed; None if the float weights are gone
        self.blocks = blocks  # in the file's order, which the operator may have repacked
        self._biases: tuple[torch.Tensor, torch.Tensor] | None = None

    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 gate|up (num_experts, 2 I) and down (num_experts, H) biases,
        from the packed experts.
        """
        if self._biases is None:
            packed, spec = self.moe.packed, self.moe.spec
            first = ("gate", "up") if spec.has_gate else ("up",)

            def stacked(*names: str) -> torch.Tensor:
                found = [packed.biases[name] for name in names]
                return torch.from_numpy(np.concatenate(found, axis=1))

            self._biases = (stacked(*first), stacked("down"))
        return self._biases

    def dequantised(self, expert: int) -> ExpertWeights:
        """One expert's weights as the packed codes or blocks say, float32."""
        return expert_weights(self.blocks or self.moe.packed, expert)

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertsHandle:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "a model with ktk experts cannot be pickled: save the float model, or convert it once "
            "with `ktk convert` and load that directory in each process"
        )


def handle_of(module: Any) -> ExpertsHandle | None:
    """The packed experts of a module, if it has any."""
    handle: ExpertsHandle | None = module.__dict__.get(_ATTRIBUTE)
    return handle


def hang(module: Any, handle: ExpertsHandle) -> None:
    """Have a module's experts run by these once ``select_ktk`` chose the experts function."""
    setattr(module, _ATTRIBUTE, handle)


def listen(module: Any, listener: Listener | None) -> None:
    """Have ``listener`` called with the expert ids and weights, (num_tokens, top_k), of each call
    of a module that ktk runs; None: no more.
    """
    if listener is None:
        module.__dict__.pop(_LISTENER, None)
    else:
        module.__dict__[_LISTENER] = listener


def listener_of(module: Any) -> Listener | None:
    """Who ``listen`` was given, if anybody."""
    found: Listener | None = module.__dict__.get(_LISTENER)
    return found


@contextlib.contextmanager
def unheard(owner: torch.nn.Module) -> Iterator[None]:
    """While it lasts, nobody is told of calls of experts in ``owner``: they are no model's pass."""
    listeners = [(module, listener_of(module)) for module in owner.modules()]
    heard = [(module, listener) for module, listener in listeners if listener is not None]
    for module, _ in heard:
        listen(module, None)
    try:
        yield
    finally:
        for module, listener in heard:
            listen(module, listener)


def select_ktk(model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> None:
    """Choose the experts function "ktk" for a model and its experts modules."""
    configs = [getattr(owner, "config", None) for owner in (model, *modules)]
    for config in {id(c): c for c in configs if c is not None}.values():
        hf.set_experts_implementation(config, NAME)


def drop_weights(module: Any) -> None:
    """Replace the float parameters by empty tensors that no state_dict holds."""
    for name in weight_names(module):
        weight = module._parameters.pop(name)
        empty = torch.empty(0, dtype=weight.dtype, device="cpu")
        hf.mark_initialised(empty)
        setattr(module, name, empty)
    handle = handle_of(module)
    if handle is not None:
        handle.sources = None
