"""Models with packed experts: packed in place (``use_ktk``) or while ``from_pretrained`` reads a
float checkpoint, loaded from what ``ktk convert`` or ``save_pretrained`` wrote, from a checkpoint
quantised otherwise, or from a GGUF file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ktk import backends
from ktk.errors import CheckpointError
from ktk.experts.rotation import Rotation
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    drop_weights,
    find_experts,
    handle_of,
    left_eager,
    select_ktk,
)
from ktk.integration.transformers.model_config import model_config
from ktk.integration.transformers.multimodal import auto_class, quantised_class
from ktk.integration.transformers.packing import module_spec, pack_module
from ktk.integration.transformers.quantizer import (
    KtkConfig,
    KtkHfQuantizer,
    Request,
    SavedConfig,
    log_left_eager,
)
from ktk.integration.transformers.saving import SavePretrained
from ktk.integration.transformers.sources import quantised_checkpoint
from ktk.paths import user_path
from ktk.placement.residency.expert_memory import ExpertMemory


@dataclass(frozen=True)
class PackedModule:
    """One experts module as it runs now. bytes: of its packed experts. gpu_experts: how many of
    them are on ``device``.
    """

    name: str
    kernel: str
    bits_per_weight: float
    bytes: int
    fused_activation: bool
    gpu_experts: int = 0
    device: str = "cpu"

    @classmethod
    def of(cls, name: str, handle: ExpertsHandle) -> PackedModule:
        moe, spec, hybrid = handle.moe, handle.moe.spec, handle.hybrid
        return cls(
            name,
            moe.kernel,
            moe.bits_per_weight,
            round(moe.bits_per_weight * spec.num_weights * spec.num_experts / 8),
            handle.activation is not None,
            *(() if hybrid is None else (hybrid.num_on_device, str(hybrid.device))),
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
    *,
    rotation: Rotation | int | None = None,
) -> list[PackedModule]:
    """Pack every experts module of a float model in place, freeing its float weights layer by
    layer.

    weight_format : a name of ``ktk.experts.formats.PANELS``; None takes the exact one for the
        weights' dtype.
    group_size, activation_group, rotation, method, num_threads : as in ``ktk.MoE.from_weights``.
    Returns one row per module. Raises ValueError if there is nothing to pack or a module is packed
    already, BackendError if nothing runs it; both before anything is changed.
    """
    modules = list(find_experts(model))
    log_left_eager(model)
    if not modules and not left_eager(model):
        raise ValueError(
            f"{type(model).__name__} has no experts that ktk can run: it needs modules decorated "
            "with transformers' use_experts_implementation"
        )
    for name, module in modules:
        handle = handle_of(module)
        if handle is not None and handle.sources is None:
            raise ValueError(
                f"{name} runs {handle.moe.kernel} already: load the float model again to pack it "
                "otherwise"
            )
        try:
            spec, _ = module_spec(module, weight_format, group_size, activation_group, rotation)
            backends.select(method, spec)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    report = []
    for name, module in modules:
        handle = pack_module(
            module, weight_format, group_size, activation_group, method, num_threads, rotation
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


def load_model(
    path: str | os.PathLike[str],
    method: str = "auto",
    dtype: Any = None,
    *,
    gguf: str | os.PathLike[str] | None = None,
    quantization_config: KtkConfig | None = None,
    only_text: bool = False,
    expert_memory: ExpertMemory | str | int | None = None,
    **kwargs: Any,
) -> Any:
    """A causal language model from a directory, packed, float or quantised, its experts run by ktk.

    Float experts are packed exactly while they are read, quantised ones as exactly as can be: int4
    (GPTQ, compressed-tensors) with its own codes and groups, MXFP4 with its own blocks, fp8 as
    int8. ``quantization_config`` asks for something else; of a packed directory's only method,
    linear and a device's experts count. The other layers of a quantised checkpoint are
    dequantised.
    method : as in ``ktk.MoE``. dtype : of everything but the experts; None keeps the checkpoint's.
    gguf : a GGUF model's file, any part of a split one, or their directory: its experts run, from
        the mapped file, in place of those of ``path``, which must be an ordinary directory; they
        are not read.
    only_text : leave out the towers of a model that also sees or hears.
    expert_memory : of a packed directory or ``gguf``: experts are read when tokens need them, and
        no more than fit into this are in memory, with the same results; "8GiB" of memory, "25%" of
        all experts, a number of them, or an ``ExpertMemory`` with a policy; None: all.
    kwargs : for ``from_pretrained``. Raises CheckpointError, BackendError, ValueError.
    """

    if not (path := user_path(path)).is_dir():
        raise CheckpointError(f"{path}: must be a directory with a config.json")
    backends.check_method(method)
    memory = ExpertMemory.of(expert_memory)
    if memory is None and quantization_config is not None:
        memory = quantization_config.request.expert_memory
    config = model_config(path)
    auto = auto_class(config)
    given = _quant_method(config)
    if gguf is not None:
        if given is not None:
            raise CheckpointError(
                f"{path}: its experts are packed or quantised already: leave gguf out, or name "
                "the directory they came from"
            )
        said = Request() if quantization_config is None else quantization_config.request
        kwargs["quantization_config"] = KtkConfig(method=method, gguf=gguf).asking(
            replace(said, only_text=only_text, expert_memory=memory)
        )
        return auto.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    if quantization_config is not None and method.lower() == "auto":
        method = quantization_config.method
    wanted = quantization_config or KtkConfig(None)
    request = Request(
        None if method.lower() == "auto" else method,
        None if wanted.linear == "none" else wanted.linear,
        only_text=only_text,
        expert_memory=memory,
        gpu=wanted.request.gpu,
        most_deferred=wanted.request.most_deferred,
    )
    if given == "ktk":
        return _load_packed(path, auto, dtype, request, kwargs)
    if given is not None:
        return _load_quantised(path, config, dtype, wanted, request, kwargs)
    kwargs["quantization_config"] = wanted.asking(request)
    return auto.from_pretrained(path, dtype=dtype or "auto", **kwargs)


def _quant_method(config: Any) -> str | None:
    """What a model's config says its weights are quantised with, or None."""
    said = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if said is None:
        return None
    return str(said.get("quant_method")) if isinstance(said, dict) else str(said)


def _load_packed(
    path: Path, auto: Any, dtype: Any, request: Request, kwargs: dict[str, Any]
) -> Any:
    """What ``ktk convert`` or save_pretrained wrote.

    Of a directory's own KtkConfig from_pretrained takes no other, so it is told here.
    """
    trusted = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    config, others = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    for part in (config, config.get_text_config(decoder=True)):
        said = getattr(part, "quantization_config", None)
        if isinstance(said, dict):
            part.quantization_config = SavedConfig(said, request)
    return auto.from_pretrained(path, config=config, dtype=dtype or "auto", **trusted, **others)


def _load_quantised(
    path: Path,
    config: Any,
    dtype: Any,
    wanted: KtkConfig,
    request: Request,
    kwargs: dict[str, Any],
) -> Any:
    """A checkpoint quantised by others: experts by ktk's reader,
    the rest dequantised tensor by tensor.
    """
    method = request.method or wanted.method
    own_class, config = quantised_class(path, config)
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.bfloat16
    with quantised_checkpoint(
        path,
        wanted.weight_format,
        wanted.group_size,
        wanted.activation_group,
        wanted.turns,
        method,
    ) as (source, tensors):
        spec = next(iter(source.specs.values()))
        kwargs["quantization_config"] = KtkConfig(
            spec.weight_format if spec.is_packed else None,
            spec.group_size,
            spec.activation_group,
            wanted.method,
            linear=wanted.linear,
            rotation=spec.turns if spec.turns.width else None,
        ).asking(replace(request, source=source))
        if "generation_config" not in kwargs and (path / "generation_config.json").is_file():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(path)
        model = own_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, **kwargs
        )
    found = model[0] if isinstance(model, tuple) else model
    found.config.name_or_path = found.name_or_path = str(path)
    return model
