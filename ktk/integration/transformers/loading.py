"""Models with packed experts: packed in place (``use_ktk``) or while ``from_pretrained`` reads a float checkpoint, loaded
from what ``ktk convert`` or ``save_pretrained`` wrote, from a checkpoint quantised otherwise, or from a GGUF file."""

from __future__ import annotations

import contextvars
import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ktk import backends
from ktk.errors import CheckpointError
from ktk.experts.spec import MoESpec
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    drop_weights,
    find_experts,
    handle_of,
    left_eager,
    select_ktk,
    weight_names,
)
from ktk.integration.transformers.model_config import model_config
from ktk.integration.transformers.multimodal import auto_class, leave_out_towers, model_class
from ktk.integration.transformers.packing import (
    ModulePacker,
    attach,
    module_spec,
    pack_module,
)
from ktk.integration.transformers.saving import SavePretrained, write_experts
from ktk.integration.transformers.sources import (
    ExpertsSource,
    layer_of,
    packed_directory,
    quantised_checkpoint,
)
from ktk.log import logger
from ktk.ops.gguf_model import open_experts
from ktk.paths import user_path

# Of the load_model() call in progress; from_pretrained has no way to pass them.
_method: contextvars.ContextVar[str | None] = contextvars.ContextVar("ktk_method", default=None)
_linear: contextvars.ContextVar[str | None] = contextvars.ContextVar("ktk_linear", default=None)
_source: contextvars.ContextVar[ExpertsSource | None] = contextvars.ContextVar(
    "ktk_source", default=None
)
LINEAR_FORMATS = ("int8", "int4")


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

    weight_format : a name of ``ktk.experts.formats.PANELS``; None takes the exact one for the weights' dtype.
    group_size, activation_group, method, num_threads : as in ``ktk.MoE.from_weights``.
    Returns one row per module. Raises ValueError if there is nothing to pack or a module is packed already,
    BackendError if nothing runs it; both before anything is changed.
    """
    modules = list(find_experts(model))
    _log_left_eager(model)
    if not modules and not left_eager(model):
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
    select_ktk(model, [module for _, module in modules])
    if (
        modules
        and getattr(model, "hf_quantizer", None) is None
        and hasattr(model, "save_pretrained")
    ):
        owner: Any = model
        owner.hf_quantizer = KtkHfQuantizer(KtkConfig(), pre_quantized=False)
        owner.save_pretrained = SavePretrained(model)
    return report


def _log_left_eager(model: torch.nn.Module) -> None:
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


class KtkConfig(hf.QuantizationConfigMixin):
    """``quantization_config`` of a packed directory; given to from_pretrained, packs a float model on load.

    weight_format, group_size, activation_group, method : as in ``use_ktk``. A packed directory's own values
    win over given ones; its method is KTK_BACKEND, ``load_model(method=...)`` or "method" in its config.json.
    gguf : as in ``load_model``; weight_format and the groups do not count then.
    linear : "int8" or "int4" also packs the dense linear layers; None leaves them to torch.
    Raises ValueError for a weight_format, method or linear that is unknown and for groups that the format has not, TypeError
    for other options.
    """

    def __init__(
        self,
        weight_format: str | None = "int8",
        group_size: int | None = None,
        activation_group: int | None = None,
        method: str = "auto",
        gguf: str | os.PathLike[str] | None = None,
        linear: str | None = None,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        if others and "layout_version" not in others:  # which every packed directory has
            raise TypeError(
                f"KtkConfig has no option {', '.join(sorted(others))}: it takes weight_format, group_size, "
                f"activation_group, method, gguf and linear"
            )
        if weight_format is not None:  # for its checks; 128 is a multiple of every group
            MoESpec(1, 128, 128, weight_format=weight_format, group_size=group_size, activation_group=activation_group)  # fmt: skip
        backends.check_method(method, weight_format if gguf is None else None)
        if linear not in (None, *LINEAR_FORMATS):
            raise ValueError(
                f"linear={linear!r}: must be one of {', '.join(LINEAR_FORMATS)}, or None"
            )
        self.quant_method = "ktk"  # type: ignore[assignment]  # plug-ins have no row in transformers' enum
        self.weight_format = weight_format
        self.group_size = group_size
        self.activation_group = activation_group
        self.method = method
        self.gguf = None if gguf is None else str(user_path(gguf))
        self.linear = linear
        for name, value in others.items():
            setattr(self, name, value)


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

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the experts train; the packed weights do not."""
        return True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """What save_pretrained calls before it writes the rest: the moment to write the experts."""
        if not hf.saves_adapters_only(model):
            write_experts(model)
        return None, {}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Without the experts' converters nothing looks for float experts, which come from elsewhere.

        model : not given by transformers 5.20.
        """
        return [
            conversion
            for conversion in weight_conversions
            if not any(name.rpartition(".")[2] in self.unread for name in hf.targets_of(conversion))
        ]

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """On the device that a device_map gives a parameter: those of experts take nothing there."""
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
        leave_out_towers(model)
        modules: dict[str, Any] = dict(find_experts(model))
        _log_left_eager(model)
        config = self.quantization_config
        self.source = self._open(checkpoint_files)
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
                        module, config.weight_format, config.group_size, config.activation_group
                    )
                    backends.select(_method.get() or config.method, spec)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"{name}: {error}") from None
                self.packers[name] = ModulePacker(module, spec)
        elif not left_eager(model) and config.linear is None:
            raise ValueError(
                f"{type(model).__name__} has no experts that ktk can run: load it without quantization_config"
            )
        select_ktk(model, modules.values())

    def _open(self, checkpoint_files: list[str] | None) -> ExpertsSource | None:
        """Where packed or quantised experts lie; None if the checkpoint's float ones are to be packed."""
        if (given := _source.get()) is not None:
            return given
        if self.pre_quantized:
            if not checkpoint_files:
                raise CheckpointError(
                    "a packed ktk model loads from its directory: no state_dict can be given instead"
                )
            return packed_directory(Path(checkpoint_files[0]).parent)
        if self.quantization_config.gguf is None:
            return None
        gguf = open_experts(Path(self.quantization_config.gguf))
        specs = {layer: gguf.spec(layer) for layer in gguf.layers}
        return ExpertsSource(self.quantization_config.gguf, specs, gguf.experts, is_beside=True)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        hf.restore_dtypes(model, self.dtypes)
        config = self.quantization_config
        method = _method.get() or config.method
        for name, module in find_experts(model):
            if self.source is not None:
                attach(module, self.source.read(layer_of(name)), method)
                continue
            try:
                packed = self.packers.pop(name).packed()
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
            drop_weights(module)
            attach(module, packed, method)
        config.linear = _linear.get() or config.linear
        if config.linear is not None:
            linear = importlib.import_module("ktk.integration.transformers.linear")
            linear.replace_linears(model, config.linear)
            layers = importlib.import_module("ktk.integration.transformers.decoder_layers")
            layers.fuse_decoder_layers(model)
        model.save_pretrained = SavePretrained(model)


class _PackParameter(hf.ConversionOps):
    """Takes a parameter of float experts, as the model would have it, packs it, and leaves an empty one."""

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
    """CheckpointError unless source and model have experts in the same layers and of the same shapes."""
    for name, module in modules.items():
        layer = layer_of(name)
        if layer not in source.specs:
            raise CheckpointError(
                f"{source.where}: no packed experts for {name}; it has layers {sorted(source.specs)}"
            )
        _check_shapes(name, module, source.specs[layer])
    unused = sorted(set(source.specs) - {layer_of(name) for name in modules})
    if unused:
        raise CheckpointError(
            f"{source.where}: packed experts of layers {unused} have no module in {type(model).__name__}"
        )


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
    quantization_config: KtkConfig | None = None,
    **kwargs: Any,
) -> Any:
    """A causal language model from a directory, packed, float or quantised, its experts run by ktk.

    Float experts are packed exactly while they are read, quantised ones as exactly as can be: int4 (GPTQ,
    compressed-tensors) with its own codes and groups, MXFP4 with its own blocks, fp8 as int8. ``quantization_config``
    asks for something else; of a packed directory's only method and linear count. The other layers of a quantised checkpoint are dequantised.
    method : as in ``ktk.MoE``. dtype : of everything but the experts; None keeps the checkpoint's.
    gguf : a GGUF model's file, any part of a split one, or their directory: its experts run, from the mapped file,
        in place of those of ``path``, which must be an ordinary directory; they are not read.
    kwargs : for ``from_pretrained``. Raises CheckpointError, BackendError, ValueError.
    """

    if not (path := user_path(path)).is_dir():
        raise CheckpointError(f"{path}: must be a directory with a config.json")
    backends.check_method(method)
    config = model_config(path)
    auto = auto_class(config)
    given = _quant_method(config)
    if gguf is not None:
        if given is not None:
            raise CheckpointError(
                f"{path}: its experts are packed or quantised already: leave gguf out, or name the directory they came from"
            )
        kwargs["quantization_config"] = KtkConfig(method=method, gguf=gguf)
        return auto.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    if quantization_config is not None and method.lower() == "auto":
        method = quantization_config.method
    token = _method.set(None if method.lower() == "auto" else method)
    linear = _linear.set(quantization_config.linear if quantization_config else None)
    try:
        if given == "ktk":
            return auto.from_pretrained(path, dtype=dtype or "auto", **kwargs)
        if given is not None:
            return _load_quantised(path, config, dtype, quantization_config, kwargs)
        kwargs["quantization_config"] = quantization_config or KtkConfig(None)
        return auto.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    finally:
        _method.reset(token)
        _linear.reset(linear)


def _quant_method(config: Any) -> str | None:
    """What a model's config says its weights are quantised with, or None."""
    said = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if said is None:
        return None
    return str(said.get("quant_method")) if isinstance(said, dict) else str(said)


def _load_quantised(
    path: Path, config: Any, dtype: Any, wanted: KtkConfig | None, kwargs: dict[str, Any]
) -> Any:
    """A checkpoint quantised by others: experts by ktk's reader, the rest dequantised tensor by tensor."""
    own_class = model_class(type(config))
    if own_class is None:
        raise CheckpointError(
            f"{path}: model_type {config.model_type!r}: transformers has no language model of its own for it, "
            "and a quantised one loads as that only: run `ktk convert` on it and load what that writes"
        )
    ask = wanted or KtkConfig(None)
    method = _method.get() or ask.method
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if own_class.config_class is not type(config):  # the language model alone, of a larger one
        config = config.get_text_config(decoder=True)
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.bfloat16
    with quantised_checkpoint(
        path, ask.weight_format, ask.group_size, ask.activation_group, method
    ) as (source, tensors):
        spec = next(iter(source.specs.values()))
        kwargs["quantization_config"] = KtkConfig(
            spec.weight_format if spec.is_packed else None,
            spec.group_size, spec.activation_group, ask.method, linear=ask.linear,
        )  # fmt: skip
        if "generation_config" not in kwargs and (path / "generation_config.json").is_file():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(path)
        token = _source.set(source)
        try:
            model = own_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, **kwargs
            )
        finally:
            _source.reset(token)
    found = model[0] if isinstance(model, tuple) else model
    found.config.name_or_path = found.name_or_path = str(path)
    return model


hf.register_quantization_config("ktk")(KtkConfig)
hf.register_quantizer("ktk")(KtkHfQuantizer)
