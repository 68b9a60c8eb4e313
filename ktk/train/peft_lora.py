"""peft over packed experts: a LoraConfig whose experts get a module of ktk's, so that
``get_peft_model``, ``save_pretrained``, ``disable_adapter`` and several adapters work as ever.

peft takes such modules by ``LoraConfig._register_custom_module``, which peft documents
as its interface for layers it does not know, and as experimental.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

try:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError(
        "ktk.train.lora_config and load_peft need peft: pip install 'ktk[train]'"
    ) from error

from ktk.checkpoint.safetensors import Checkpoint
from ktk.experts.lora import MAX_RANK, ExpertLora
from ktk.integration.transformers.adapters import (
    TARGETS,
    LoraTensors,
    initialise,
    matrix_names,
)
from ktk.integration.transformers.experts import handle_of, is_experts
from ktk.integration.transformers.forward import ktk_experts_forward
from ktk.integration.transformers.gradients import why_not_adapted
from ktk.paths import user_path
from ktk.train.files import WEIGHTS, parameter_name

_MATRICES = {f"{t}_{letter}": parameter_name(f"{t}_{letter}") for t in TARGETS for letter in "ab"}
_TARGETS = "expert_targets"  # of a config that ``lora_config`` made
_PLAIN = {  # what else a LoraConfig may say of its modules, and what experts take
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
}


class _IsExperts(type):
    """isinstance() by what a module is, not by its class: each architecture has its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        return is_experts(instance)


class AnyExperts(torch.nn.Module, metaclass=_IsExperts):
    """Every experts module of transformers counts as an instance."""


def lora_config(*, expert_targets: Sequence[str] = TARGETS, **arguments: Any) -> LoraConfig:
    """A peft.LoraConfig that knows packed experts.

    expert_targets : projections of the experts that get adapters, of "gate", "up" and "down".
    arguments : LoraConfig's. target_modules names modules; left out, "experts" alone.
    Raises ValueError for targets that do not exist, TypeError for arguments peft does not know.
    """
    if not expert_targets or any(t not in TARGETS for t in expert_targets):
        raise ValueError(f"expert_targets={expert_targets!r}: must be some of {TARGETS}")
    arguments.setdefault("target_modules", ["experts"])
    return with_experts(LoraConfig(**arguments), expert_targets)


def with_experts(config: LoraConfig, expert_targets: Sequence[str] = TARGETS) -> LoraConfig:
    """The same config, which from now on knows packed experts."""
    config._register_custom_module({AnyExperts: ExpertsLoraLayer})
    setattr(config, _TARGETS, tuple(expert_targets))
    return config


def load_peft(
    model: torch.nn.Module, directory: str | os.PathLike[str], **arguments: Any
) -> PeftModel:
    """``PeftModel.from_pretrained`` of a directory whose adapters are also of packed experts.

    directory : what ``save_pretrained`` of peft or ``save_expert_lora`` wrote. arguments :
    from_pretrained's, e.g. is_trainable. Raises CheckpointError.
    """
    path = user_path(directory)
    with Checkpoint.open(path / WEIGHTS) as file:
        ends = {name.rpartition(".")[2] for name in file.tensors}
    targets = [t for t in TARGETS if parameter_name(f"{t}_a") in ends]
    config = with_experts(LoraConfig.from_pretrained(str(path)), targets or TARGETS)
    config.inference_mode = not arguments.get("is_trainable", False)
    return PeftModel.from_pretrained(model, str(path), config=config, **arguments)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """While it lasts, nothing is said of what peft still asks transformers by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


class _NoWeightedSum(dict[str, torch.nn.Module]):
    """In place of peft's lora_A, which its sums of adapters look into: they would leave out the
    experts.
    """

    def __contains__(self, key: object) -> bool:
        raise ValueError(
            "add_weighted_adapter does not sum adapters of experts: "
            "model.base_model.set_adapter([...]) runs several at once"
        )


class ExpertsLoraLayer(torch.nn.Module, LoraLayer):
    """peft's adapters of one experts module, which it wraps.

    Of each adapter, by its name: lora_gate_A (num_experts, r, in_features), lora_gate_B
    (num_experts, out_features, r), and so on.
    """

    adapter_layer_names = tuple(_MATRICES.values())
    other_param_names = ("r", "lora_alpha", "scaling", "use_rslora", "dropout")

    def __init__(
        self,
        base_layer: torch.nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **arguments: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        # Where peft looks for the device that adapters go to; packed experts have no parameters.
        base_layer.__dict__.setdefault("qweight", torch.empty(0))
        del self.lora_A
        self.__dict__["lora_A"] = _NoWeightedSum()
        self.dropout: dict[str, float] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, torch.nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, **arguments)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **arguments: Any
    ) -> None:
        """Add an adapter, as peft asks for it. ValueError for what experts cannot have."""
        handle = handle_of(self.base_layer)
        if handle is None:
            raise ValueError("the experts are not packed: use_ktk(model) packs them")
        if (reason := why_not_adapted(handle)) is not None:
            raise ValueError(f"these experts cannot have adapters: {reason}")
        if not 1 <= r <= MAX_RANK:
            raise ValueError(f"r={r}: must be in 1..{MAX_RANK} for experts")
        for name, taken in _PLAIN.items():
            if (given := getattr(config, name, taken)) != taken:
                raise ValueError(f"{name}={given!r}: adapters of experts take {taken!r} alone")
        spec = handle.moe.spec
        targets = [t for t in getattr(config, _TARGETS, TARGETS) if t != "gate" or spec.has_gate]
        for name in matrix_names(spec, targets):
            matrix = torch.nn.Parameter(torch.empty(ExpertLora.shape(name, spec, r)))
            initialise(name, matrix)
            getattr(self, _MATRICES[name])[adapter_name] = matrix
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        self.dropout[adapter_name] = config.lora_dropout
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        **arguments: Any,
    ) -> torch.Tensor:
        """What the experts module returns, with the active adapters."""
        if any(value is not None for value in arguments.values()):
            raise ValueError(f"{', '.join(arguments)}: adapters of experts are one batch's alike")
        adapters = [] if self.disable_adapters else self.tensors()
        given = (hidden_states, top_k_index, top_k_weights)
        return ktk_experts_forward(self.base_layer, *given, adapters)

    def tensors(self) -> list[LoraTensors]:
        """Of the active adapters."""
        found = []
        for adapter in self.active_adapters:
            named = {m: getattr(self, name) for m, name in _MATRICES.items()}
            matrices = {m: of[adapter] for m, of in named.items() if adapter in of}
            if matrices:
                dropout = self.dropout[adapter] if self.training else 0.0
                found.append(LoraTensors(matrices, self.scaling[adapter], dropout))
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError, always: packed weights are rounded."""
        raise ValueError(
            "adapters cannot be merged into packed experts in memory, whose weights are rounded: "
            "`ktk train export` merges them into the float checkpoint or packs that anew; "
            "unload() takes the adapters away"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' scaling, as peft asks for it."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo ``scale_layer``: divide by ``scale``; None: back to alpha and rank."""
        for adapter in self.active_adapters:
            if scale is None:
                self.set_scale(adapter, 1.0)
            elif adapter in self.scaling:
                self.scaling[adapter] /= scale

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[None, None]:
        return None, None  # LoraLayer's, of one matrix

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"
