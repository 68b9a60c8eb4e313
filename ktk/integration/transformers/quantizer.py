"""``KtkConfig`` and what from_pretrained calls by it: experts packed while they are read,
or hung on from where they lie packed.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktk import backends
from ktk.errors import CheckpointError
from ktk.experts.rotation import NO_ROTATION, Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.integration.choices import check_linear
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.activations import recognise
from ktk.integration.transformers.decoder_layers import fuse_decoder_layers
from ktk.integration.transformers.deferral import defer_experts
from ktk.integration.transformers.experts import (
    drop_weights,
    find_experts,
    left_eager,
    select_ktk,
    weight_names,
)
from ktk.integration.transformers.gpu_experts import GpuExperts, Placement
from ktk.integration.transformers.linear import run_linears
from ktk.integration.transformers.multimodal import leave_out_towers
from ktk.integration.transformers.packing import ModulePacker, attach, module_spec
from ktk.integration.transformers.saving import SavePretrained, write_experts
from ktk.integration.transformers.sources import (
    ExpertsSource,
    gguf_source,
    layer_of,
    packed_directory,
)
from ktk.integration.transformers.streaming import stream
from ktk.log import logger
from ktk.ops.gguf_model import open_experts
from ktk.paths import user_path
from ktk.placement.residency.expert_memory import ExpertMemory


@dataclass(frozen=True)
class Request:
    """What one call asks for while a model is loaded; it is never saved.

    method, linear : in place of the KtkConfig's own, unless None. source : of the experts, instead
    of the checkpoint that from_pretrained reads. only_text : towers are left out. expert_memory :
    None: all experts are loaded. gpu : which experts a device holds.
    most_deferred : experts of a token that run with the next layer.
    """

    method: str | None = None
    linear: str | None = None
    source: ExpertsSource | None = None
    only_text: bool = False
    expert_memory: ExpertMemory | None = None
    gpu: GpuExperts | None = None
    most_deferred: int = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Request:
        return self


class SavedConfig(dict[str, Any]):
    """A packed directory's own KtkConfig as its config.json has it,
    and what a call asks for besides.
    """

    def __init__(self, said: dict[str, Any], request: Request) -> None:
        super().__init__(said)
        self.request = request


BESIDE_ATTRIBUTES = ("request",)  # which are saved, all of them


class KtkConfig(hf.QuantizationConfigMixin):
    """``quantization_config`` of a packed directory; given to from_pretrained, packs a float model
    on load.

    weight_format, group_size, activation_group, rotation, method : as in ``use_ktk``; rotation may
    be [width, seed], as it is saved. A packed directory's own values win over given ones; its
    method is KTK_BACKEND, ``load_model(method=...)`` or "method" in its config.json.
    gguf : as in ``load_model``; weight_format, the groups and rotation do not count then.
    linear : how the dense linear layers run, one of ``ktk.integration.choices.LINEAR``; None, in
    directories of before, is "none".
    expert_memory : of a packed directory or gguf, as in ``load_model``; it is not saved.
    gpu_experts : experts that a device runs: an int of each layer on average, a float 0..1 of all,
        or bytes, as "8GiB". placement : "uniform", "front-loading" or "random", or a .pt file of
        masks (then without gpu_experts) or of statistics, placed by frequency. device : of torch's,
        by default its accelerator. load_gpu_experts : keep them in the CPU's memory, too, which
        swaps, gradients and save_pretrained need. gpu_update : "prefill", "prefill:1024" or
        "online": who is there goes with the text, see ``ktk.placement.masks.updates``.
    max_deferred_experts : of each token, at most, that run with the next layer: see
        ``ktk.integration.transformers.deferral``.
    From gpu_experts on they are of this machine: never saved, and for a packed directory taken by
    ``load_model`` alone.
    Raises ValueError for a weight_format, method or linear that is unknown and for groups or a
    rotation that the format has not, TypeError for other options.
    """

    __slots__ = BESIDE_ATTRIBUTES

    # saved, as an attribute, only where it was given
    rotation: list[int] | None = None

    def __init__(
        self,
        weight_format: str | None = "int8",
        group_size: int | None = None,
        activation_group: int | None = None,
        method: str = "auto",
        gguf: str | os.PathLike[str] | None = None,
        linear: str | None = "none",
        rotation: Rotation | Sequence[int] | int | None = None,
        expert_memory: ExpertMemory | str | int | None = None,
        *,
        gpu_experts: int | float | str | None = None,
        placement: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        load_gpu_experts: bool = True,
        gpu_update: str | None = None,
        max_deferred_experts: int = 0,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        if others and "layout_version" not in others:  # which every packed directory has
            raise TypeError(
                f"KtkConfig has no option {', '.join(sorted(others))}: it takes weight_format, "
                "group_size, activation_group, method, gguf, linear, rotation, expert_memory, "
                "gpu_experts, placement, device, load_gpu_experts, gpu_update and "
                "max_deferred_experts"
            )
        turns = None if rotation is None else Rotation.of(rotation)
        if weight_format is not None:  # for its checks; 128 is a multiple of every group
            MoESpec(
                1,
                128,
                128,
                weight_format=weight_format,
                group_size=group_size,
                activation_group=activation_group,
                rotation=turns,
            )
        backends.check_method(method, weight_format if gguf is None else None)
        linear = "none" if linear is None else linear
        check_linear(linear)
        memory = ExpertMemory.of(expert_memory)
        asked = GpuExperts.asked(gpu_experts, placement, device, load_gpu_experts, gpu_update)
        if type(max_deferred_experts) is not int or max_deferred_experts < 0:
            raise ValueError(
                f"max_deferred_experts={max_deferred_experts!r}: must be an int, at least 0"
            )
        self.request = Request(expert_memory=memory, gpu=asked, most_deferred=max_deferred_experts)
        # plug-ins have no row in transformers' enum
        self.quant_method = "ktk"
        self.weight_format = weight_format
        self.group_size = group_size
        self.activation_group = activation_group
        self.method = method
        self.gguf = None if gguf is None else str(user_path(gguf))
        self.linear = linear
        if turns is not None:
            self.rotation = list(turns)
        for name, value in others.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *options: Any, **named: Any) -> Any:
        """What transformers makes of a config.json; keeps the request of a ``SavedConfig``."""
        if isinstance(config_dict, SavedConfig):
            return cls(**config_dict).asking(config_dict.request)
        return super().from_dict(config_dict, *options, **named)

    @property
    def turns(self) -> Rotation | None:
        """``rotation``, as a MoESpec takes it."""
        return None if self.rotation is None else Rotation.of(self.rotation)

    def state_rotation(self, found: set[Rotation]) -> None:
        """What is saved of layers with these rotations: nothing of none, null of several."""
        if found == {NO_ROTATION}:
            self.__dict__.pop("rotation", None)
        else:
            self.rotation = list(*found) if len(found) == 1 else None

    def asking(self, request: Request) -> KtkConfig:
        """The same for a call that asks for something besides."""
        made = copy.copy(self)
        made.request = request
        return made


class KtkHfQuantizer(hf.HfQuantizer):
    """Hangs packed experts on a model while from_pretrained loads the rest."""

    requires_calibration = False

    quantization_config: KtkConfig

    def __init__(self, quantization_config: KtkConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.source: ExpertsSource | None = (
            None  # of experts that are not in the model's own float tensors
        )
        self.unread: set[str] = set()  # names of experts' parameters, if a source has them
        self.dtypes: dict[str, torch.dtype] = {}  # of the tensors of a packed directory's model
        self.packers: dict[str, ModulePacker] = {}  # by module, while float experts are read
        self.error: Exception | None = None  # transformers swallows what is raised in its loop
        self.placement: Placement | None = None  # of experts that a device runs
        self.save_directory: Path | None = None  # of the save_pretrained() call in progress

    @property
    def _method(self) -> str:
        return self.quantization_config.request.method or self.quantization_config.method

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the experts train; the packed weights do not."""
        return True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """What save_pretrained calls before it writes the rest: the moment to write the experts."""
        if self.save_directory is not None and not hf.saves_adapters_only(model):
            write_experts(model, self.save_directory)
        return None, {}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Without the experts' converters nothing looks for float experts, which come from
        elsewhere.

        model : not given by transformers 5.20.
        """
        return [
            conversion
            for conversion in weight_conversions
            if not any(name.rpartition(".")[2] in self.unread for name in hf.targets_of(conversion))
        ]

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """On the device that a device_map gives a parameter:
        those of experts take nothing there.
        """
        is_expert = self.param_needs_quantization(model, param_name)
        return 0 if is_expert else float(super().param_element_size(model, param_name, param))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return module in self.packers and name in weight_names(model.get_submodule(module))

    def get_quantize_ops(self) -> hf.ConversionOps:
        return _PackParameter(self)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if config.request.only_text:
            leave_out_towers(model)
        modules: dict[str, Any] = dict(find_experts(model))
        log_left_eager(model)
        self.source = self._open(checkpoint_files)
        if config.request.expert_memory is not None and (
            self.source is None or self.source.open_reader is None
        ):
            raise ValueError(
                "expert_memory: these experts are packed while they are loaded, all of them: give "
                "a directory that `ktk convert` wrote, or a GGUF file"
            )
        if self.pre_quantized:
            self.dtypes = hf.dtypes(model)
        if self.source is not None:
            _check_layers(model, modules, self.source)
            for module in modules.values():
                self.unread.update(weight_names(module))
                drop_weights(module)
                hf.mark_initialised(module)
            if self.source.is_beside:  # the directory's own experts stay unread: that is no mistake
                hf.ignore_unread(model, {rf"(^|\.){re.escape(name)}\." for name in modules})
        elif modules:
            for name, module in modules.items():
                try:
                    spec, _ = module_spec(
                        module,
                        config.weight_format,
                        config.group_size,
                        config.activation_group,
                        config.turns,
                    )
                    backends.select(self._method, spec)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"{name}: {error}") from None
                self.packers[name] = ModulePacker(module, spec)
        elif not left_eager(model) and config.linear == "none":
            raise ValueError(
                f"{type(model).__name__} has no experts that ktk can run: load it without "
                "quantization_config"
            )
        if config.request.gpu is not None:
            self._place(model, modules, config.request.gpu)
        select_ktk(model, modules.values())

    def _place(self, model: Any, modules: dict[str, Any], asked: GpuExperts) -> None:
        """Everything that keeps experts from a device, before any is read."""
        if not modules:
            raise ValueError(f"{type(model).__name__} has no experts for gpu_experts")
        for name, module in modules.items():
            if recognise(module) is None:
                raise ValueError(
                    f"{name}: its activation is its own, which runs on the CPU alone: leave "
                    "gpu_experts out"
                )
        specs = {layer_of(name): packer.spec for name, packer in self.packers.items()}
        specs = specs if self.source is None else self.source.specs
        self.placement = Placement(asked, model, specs, model.dtype)

    def _open(self, checkpoint_files: list[str] | None) -> ExpertsSource | None:
        """Where packed or quantised experts lie; None if the checkpoint's float ones are to be
        packed.
        """
        if (given := self.quantization_config.request.source) is not None:
            return given
        if self.pre_quantized:
            if not checkpoint_files:
                raise CheckpointError(
                    "a packed ktk model loads from its directory: no state_dict can be given "
                    "instead"
                )
            return packed_directory(Path(checkpoint_files[0]).parent)
        if self.quantization_config.gguf is None:
            return None
        gguf = self.quantization_config.gguf
        return gguf_source(gguf, open_experts(Path(gguf)), is_beside=True)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        hf.restore_dtypes(model, self.dtypes)
        config = self.quantization_config
        modules = dict(find_experts(model))
        if (memory := config.request.expert_memory) is not None and self.source is not None:
            stream(model, modules, self.source, memory, self._method, placement=self.placement)
            modules.clear()
        for name, module in modules.items():
            if self.source is not None:
                self._attach_read(layer_of(name), module, self.source)
                continue
            try:
                packed = self.packers.pop(name).packed()
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
            drop_weights(module)
            self._attach(layer_of(name), module, packed)
        if config.request.most_deferred:
            defer_experts(model, config.request.most_deferred)
        config.linear, config.request = config.request.linear or config.linear, Request()
        if config.linear != "none":
            run_linears(model, config.linear)
            fuse_decoder_layers(model)
        model.save_pretrained = SavePretrained(model)

    def _attach_read(self, layer: int, module: Any, source: ExpertsSource) -> None:
        """Hang a layer's experts of the source on a module."""
        left = None if self.placement is None else self.placement.left_to_cpu(layer)
        if left is None or source.read_some is None:
            self._attach(layer, module, source.read(layer))
            return
        assert self.placement is not None
        held = source.read_some(layer, self.placement.held(layer))
        self._attach(layer, module, source.read_some(layer, left), held)

    def _attach(
        self, layer: int, module: Any, packed: StoredExperts, held: StoredExperts | None = None
    ) -> None:
        """held : what only the device has, of those that are not ``packed``."""
        placement = self.placement
        if placement is None:
            attach(module, packed, self._method)
            return
        attach(
            module,
            packed,
            self._method,
            operator=lambda experts: placement.operator(layer, experts, held, self._method),
        )


class _PackParameter(hf.ConversionOps):
    """Takes a parameter of float experts, as the model would have it, packs it,
    and leaves an empty one.
    """

    def __init__(self, quantizer: KtkHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        left: dict[str, torch.Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight: torch.Tensor = value[0] if isinstance(value, list) else value
            del value
            module, _, parameter = name.rpartition(".")
            packer = self.quantizer.packers.get(module)
            if packer is None or parameter not in packer.missing:
                left[name] = weight
                continue
            if self.quantizer.error is None:
                try:
                    packer.add(parameter, weight)
                except Exception as error:
                    self.quantizer.error = CheckpointError(f"{module}: {error}")
            left[name] = torch.empty(0, dtype=weight.dtype)
        return left

    @property
    def reverse_op(self) -> hf.ConversionOps:
        raise NotImplementedError("packed experts do not become float tensors again")


def _check_layers(model: Any, modules: dict[str, Any], source: ExpertsSource) -> None:
    """CheckpointError unless source and model have experts in the same layers and of the same
    shapes.
    """
    for name, module in modules.items():
        layer = layer_of(name)
        if layer not in source.specs:
            raise CheckpointError(
                f"{source.where}: no packed experts for {name}; it has layers "
                f"{sorted(source.specs)}"
            )
        _check_shapes(name, module, source.specs[layer])
    unused = sorted(set(source.specs) - {layer_of(name) for name in modules})
    if unused:
        raise CheckpointError(
            f"{source.where}: packed experts of layers {unused} have no module in "
            f"{type(model).__name__}"
        )


def _check_shapes(name: str, module: Any, spec: MoESpec) -> None:
    """CheckpointError unless the packed spec is that of the module,
    whose parameters are still there (on meta).
    """
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
            f"{name}: the packed experts have ({fields}) = {given}, the model's config says "
            f"{wanted}"
        )


def log_left_eager(model: torch.nn.Module) -> None:
    found = left_eager(model)
    if found:
        logger.warning(
            "%s: experts stay as transformers runs them: %s",
            type(model).__name__,
            "; ".join(
                f"{kind} is not decorated with use_experts_implementation: {reason}"
                for kind, reason in found.items()
            ),
        )


hf.register_quantization_config("ktk")(KtkConfig)
hf.register_quantizer("ktk")(KtkHfQuantizer)
