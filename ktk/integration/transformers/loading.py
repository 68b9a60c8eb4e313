"""Models with packed experts: packed in place (``use_ktk``), loaded from what ``ktk convert`` wrote, or from a GGUF file."""

from __future__ import annotations

import contextvars
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktk import backends
from ktk.errors import CheckpointError
from ktk.gguf_model import open_experts
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    attach,
    drop_weights,
    find_experts,
    handle_of,
    module_spec,
    pack_module,
    weight_names,
)
from ktk.models.gguf import GgufExperts
from ktk.types import BlockExperts, MoESpec, Packed

# method= of the load_model() call in progress; from_pretrained has no way to pass it to a packed directory.
_method: contextvars.ContextVar[str | None] = contextvars.ContextVar("ktk_method", default=None)


@dataclass(frozen=True)
class PackedModule:
    """One experts module as it runs now. bytes: of its packed experts."""

    name: str
    kernel: str
    bits_per_weight: float
    bytes: int
    fused_activation: bool

    @classmethod
    def of(cls, name: str, handle: ExpertsHandle) -> PackedModule:
        moe, spec = handle.moe, handle.moe.spec
        return cls(
            name,
            moe.kernel,
            moe.bits_per_weight,
            round(moe.bits_per_weight * spec.num_weights * spec.num_experts / 8),
            handle.activation is not None,
        )


def packed_modules(model: torch.nn.Module) -> list[PackedModule]:
    """What runs in each packed experts module of a model."""
    found = ((name, handle_of(module)) for name, module in find_experts(model))
    return [PackedModule.of(name, handle) for name, handle in found if handle is not None]


def use_ktk(
    model: torch.nn.Module,
    weight_format: str | None = "int8",
    group_size: int | None = None,
    activation_group: int | None = None,
    method: str = "auto",
    num_threads: int | None = None,
) -> list[PackedModule]:
    """Pack every experts module of a float model in place, freeing its float weights layer by layer.

    weight_format : a name of ``ktk.formats.FORMATS``; None takes the exact one for the weights' dtype.
    group_size, activation_group, method, num_threads : as in ``ktk.MoE.from_weights``.
    Returns one row per module. Raises ValueError if there is nothing to pack or a module is packed already,
    BackendError if nothing runs it; both before anything is changed.
    """
    modules = list(find_experts(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that ktk can run: it needs modules decorated with "
            f"transformers' use_experts_implementation"
        )
    for name, module in modules:
        handle = handle_of(module)
        if handle is not None and handle.sources is None:
            raise ValueError(
                f"{name} runs {handle.moe.kernel} already: load the float model again to pack it otherwise"
            )
        try:
            backends.select(
                method, module_spec(module, weight_format, group_size, activation_group)[0]
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    report = []
    for name, module in modules:
        handle = pack_module(
            module, weight_format, group_size, activation_group, method, num_threads
        )
        drop_weights(module)
        report.append(PackedModule.of(name, handle))
    _select_ktk(model, [module for _, module in modules])
    if getattr(model, "hf_quantizer", None) is None and hasattr(model, "save_pretrained"):
        owner: Any = model
        owner.hf_quantizer = KtkHfQuantizer(KtkConfig(), pre_quantized=False)
    return report


def _select_ktk(model: torch.nn.Module, modules: list[torch.nn.Module]) -> None:
    configs = [getattr(owner, "config", None) for owner in (model, *modules)]
    for config in {id(c): c for c in configs if c is not None}.values():
        config._experts_implementation = "ktk"


class KtkConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed directory; given to from_pretrained, packs a float model on load.

    weight_format, group_size, activation_group, method : as in ``use_ktk``. A packed directory's own values
    win over given ones; its method is KTK_BACKEND, ``load_model(method=...)`` or "method" in its config.json.
    gguf : as in ``load_model``; weight_format and the groups do not count then.
    """

    def __init__(
        self,
        weight_format: str | None = "int8",
        group_size: int | None = None,
        activation_group: int | None = None,
        method: str = "auto",
        gguf: str | os.PathLike[str] | None = None,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        self.quant_method = "ktk"  # type: ignore[assignment]  # plug-ins have no row in transformers' enum
        self.weight_format = weight_format
        self.group_size = group_size
        self.activation_group = activation_group
        self.method = method
        self.gguf = None if gguf is None else os.fspath(gguf)
        for name, value in others.items():
            setattr(self, name, value)


class KtkHfQuantizer(HfQuantizer):
    """Hangs packed experts on a model while from_pretrained loads the rest."""

    requires_calibration = False

    quantization_config: KtkConfig

    def __init__(self, quantization_config: KtkConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.directory: Path | None = None  # of packed experts
        self.gguf: GgufExperts | None = None

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        where = f"{self.directory}" if self.directory else "the directory `ktk convert` writes"
        raise ValueError(
            f"a model with packed ktk experts cannot be saved by save_pretrained in this version: copy {where} instead"
        )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without the experts' converters nothing looks for float experts, which come from elsewhere."""
        if self.directory is None and self.gguf is None:
            return weight_conversions
        packed = {name for _, module in find_experts(model) for name in weight_names(module)}
        targets = [(c, getattr(c, "_original_target_patterns", [])) for c in weight_conversions]
        return [
            c for c, names in targets if not any(str(n).rpartition(".")[2] in packed for n in names)
        ]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        specs = self._open(checkpoint_files)
        if specs is None:
            return
        source = self.directory or self.quantization_config.gguf
        modules: dict[str, Any] = dict(find_experts(model))
        for name, module in modules.items():
            layer = layer_of(name)
            if layer not in specs:
                raise CheckpointError(
                    f"{source}: no packed experts for {name}; it has layers {sorted(specs)}"
                )
            _check_shapes(name, module, specs[layer])
            drop_weights(module)
            module._is_hf_initialized = True
        unused = sorted(set(specs) - {layer_of(name) for name in modules})
        if unused:
            raise CheckpointError(
                f"{source}: packed experts of layers {unused} have no module in {type(model).__name__}"
            )
        if self.gguf is not None:  # the directory's own experts stay unread: that is no mistake
            known = {rf"(^|\.){re.escape(name)}\." for name in modules}
            ignored = model._keys_to_ignore_on_load_unexpected
            model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *known}
        _select_ktk(model, list(modules.values()))

    def _open(self, checkpoint_files: list[str] | None) -> dict[int, MoESpec] | None:
        """The specs of experts that lie packed or in a GGUF file; None if the checkpoint's float ones are to be packed."""
        if self.pre_quantized:
            from ktk.checkpoint.packed import read_config

            if not checkpoint_files:
                raise CheckpointError(
                    "a packed ktk model loads from its directory: no state_dict can be given instead"
                )
            self.directory = Path(checkpoint_files[0]).parent
            return read_config(self.directory).specs
        if self.quantization_config.gguf is None:
            return None
        self.gguf = open_experts(Path(self.quantization_config.gguf))
        return {layer: self.gguf.spec(layer) for layer in self.gguf.layers}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from ktk.checkpoint.packed import read_layer

        config = self.quantization_config
        method = _method.get() or config.method
        read: Callable[[int], Packed | BlockExperts]
        if self.gguf is not None:
            read = self.gguf.experts
        elif self.directory is not None:
            read = partial(read_layer, self.directory)
        else:
            use_ktk(model, config.weight_format, config.group_size, config.activation_group, method)
            return
        for name, module in find_experts(model):
            attach(module, read(layer_of(name)), method)


def layer_of(name: str) -> int:
    """The layer number in a module's name: its last number. ``model.layers.3.mlp.experts`` is 3."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if not numbers:
        raise CheckpointError(
            f"experts module {name} has no layer number in its name: ktk cannot tell its packed file"
        )
    return int(numbers[-1])


def _check_shapes(name: str, module: Any, spec: MoESpec) -> None:
    """CheckpointError unless the packed spec is that of the module, whose parameters are still there (on meta)."""
    down = module.down_proj.shape
    inner, outer = (1, 2) if module.is_transposed else (2, 1)
    wanted = (down[0], down[outer], down[inner], module.has_gate, module.has_bias)
    given = (
        spec.num_experts,
        spec.hidden_size,
        spec.intermediate_size,
        spec.has_gate,
        spec.has_bias,
    )
    if tuple(wanted) != given:
        fields = "num_experts, hidden_size, intermediate_size, has_gate, has_bias"
        raise CheckpointError(
            f"{name}: the packed experts have ({fields}) = {given}, the model's config says {wanted}"
        )


def load_model(
    path: str | os.PathLike[str],
    method: str = "auto",
    dtype: Any = None,
    *,
    gguf: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """A causal language model from a packed or an ordinary directory, its experts run by ktk.

    An ordinary directory's experts run unquantised, packed exactly on each layer's first call.
    method : as in ``ktk.MoE``. dtype : of everything but the experts; None keeps the checkpoint's.
    gguf : a GGUF model's file, any part of a split one, or their directory: its experts run, from the mapped file,
        in place of those of ``path``, which must be an ordinary directory; they are not read.
    kwargs : for ``AutoModelForCausalLM.from_pretrained``. Raises CheckpointError, BackendError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: must be a directory with a config.json")
    backends.check_method(method)
    config = AutoConfig.from_pretrained(path)
    quantised = getattr(config, "quantization_config", None)
    given = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if given not in (None, "ktk"):
        raise CheckpointError(
            f"{path}: its weights are quantised ({given}): run `ktk convert` on it first"
        )
    if gguf is not None:
        if quantised is not None:
            raise CheckpointError(
                f"{path}: its experts are packed already: leave gguf out, or name the directory they came from"
            )
        kwargs["quantization_config"] = KtkConfig(method=method, gguf=gguf)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    token = _method.set(None if method.lower() == "auto" else method)
    try:
        if quantised is not None:
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", **kwargs)
        kwargs.setdefault("experts_implementation", "ktk")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", **kwargs)
        if method.lower() != "auto":
            use_ktk(model, None, method=method)
        return model
    finally:
        _method.reset(token)


register_quantization_config("ktk")(KtkConfig)
register_quantizer("ktk")(KtkHfQuantizer)
