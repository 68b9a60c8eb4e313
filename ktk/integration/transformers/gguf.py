"""Whole models from GGUF files: transformers' own modules, experts and large linear layers the
file's blocks, run where they are mapped.

The modules are made on the meta device; every other tensor is dequantised in chunks that stay in
the CPU's caches and laid into its place (``ktk.models.whole`` says which is which), so that a model
costs its weights in ``dtype`` and nothing beside. transformers' own GGUF loader dequantises the
experts too, knows few architectures, and not how wide experts are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.integration.choices import PACKED_LINEAR, check_linear
from ktk.integration.transformers.experts import drop_weights, find_experts
from ktk.integration.transformers.gguf_linears import LinearPlan, linear_of_blocks, take_linears
from ktk.integration.transformers.gguf_tensors import ROPE_FACTORS, fill, plan_tensors
from ktk.integration.transformers.gguf_tokenizer import gguf_ends, load_gguf_tokenizer
from ktk.integration.transformers.linear import replace_linears
from ktk.integration.transformers.packing import attach
from ktk.integration.transformers.quantizer import KtkConfig, KtkHfQuantizer
from ktk.integration.transformers.saving import SavePretrained
from ktk.integration.transformers.sources import gguf_source, layer_of
from ktk.integration.transformers.streaming import stream
from ktk.machine.cpu import default_threads
from ktk.models.arch import whole_model
from ktk.models.find import find_gguf_experts
from ktk.models.whole.source import Source
from ktk.ops.requantise import packed_format
from ktk.paths import user_path
from ktk.placement.blocks import repack as repack_blocks
from ktk.placement.residency.expert_memory import ExpertMemory


def load_gguf_model(
    path: str | os.PathLike[str],
    method: str = "auto",
    dtype: Any = None,
    repack: bool | None = None,
    *,
    linear: str = "file",
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    expert_memory: ExpertMemory | str | int | None = None,
) -> Any:
    """A causal language model from a GGUF file alone, its experts and large linear layers run by
    ktk from the mapped file.

    path : a .gguf file, any part of a split one, or a directory of one model.
    method, num_threads : of the experts, as ``ktk.MoE`` takes them. repack : True copies their
    blocks into memory in the order kernels read them; otherwise KTK_REPACK decides.
    linear : of the dense linear layers (attention projections, shared experts, dense layers,
    lm_head). "file": as the file's blocks, where ``file_linears`` finds some; "int8", "int4":
    dequantised, and packed by ``replace_linears``; "none": dequantised, and run by torch, which
    gradients (else parameters are frozen) and ``save_pretrained`` need. Without the compiled
    extension all are "none", with a warning.
    dtype : of everything else, which is dequantised: a torch dtype or its name; None: bfloat16.
    progress : called with (weights laid in place, all of them). expert_memory : experts are read
    from the file when tokens need them, past the page cache, and no more than fit into this are in
    memory, as of ``load_model``; None: they run where the file is mapped.
    Raises CheckpointError for an architecture without a row in ``ktk.models.whole``, and for
    tensors that are missing, left over, or of other shapes than the metadata says; BackendError if
    nothing runs the experts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = user_path(path)
    backends.check_method(method)
    check_linear(linear)
    dtype = _dtype(dtype)
    memory = ExpertMemory.of(expert_memory)
    if memory is not None and repack:
        raise ValueError("repack copies all experts into memory: leave it or expert_memory out")
    experts = find_gguf_experts(GgufCheckpoint.open(path))
    row = whole_model(experts.architecture, str(path))
    fields = row.fields(Source(experts))
    try:
        config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever the classes make of it
        raise CheckpointError(
            f"{path}: transformers makes no {fields['model_type']} of what the metadata says: "
            f"{error}"
        ) from None
    modules = dict(find_experts(model))
    used: set[str] = set()
    for name, module in modules.items():
        _check_experts(path, name, module, experts.spec(layer_of(name)))
        drop_weights(module)
        used |= experts.tensor_names(layer_of(name))
    plans = plan_tensors(experts.checkpoint, row, config.num_hidden_layers, model, used)
    linears: dict[str, LinearPlan] = {}
    if linear == "file":
        linears = take_linears(experts.checkpoint, row, model, plans)
    fill(experts.checkpoint, plans, model, fields, progress)
    model.tie_weights()
    for name, plan in linears.items():
        model.set_submodule(name, linear_of_blocks(experts.checkpoint, plan, fields, num_threads))
    if linears or (linear in PACKED_LINEAR and replace_linears(model, linear)):
        model.requires_grad_(False)  # nothing would get through: so calls need no torch.no_grad()
    _make_rotary(experts.checkpoint, model)
    if memory is not None:
        stream(model, modules, gguf_source(path, experts), memory, method, num_threads)
        modules.clear()
    for name, module in modules.items():
        blocks = experts.experts(layer_of(name))
        if repack and packed_format(method, blocks) is None:
            blocks = repack_blocks(blocks, num_threads or default_threads())
        attach(module, blocks, method, num_threads)
    model.set_experts_implementation("ktk")
    ends = [i for i in gguf_ends(experts.checkpoint) if i < config.vocab_size]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    model.hf_quantizer = KtkHfQuantizer(KtkConfig(method=method, gguf=path), pre_quantized=False)
    model.save_pretrained = SavePretrained(model)
    model.config._name_or_path = os.fspath(path)
    return model.eval()


def _dtype(given: Any) -> torch.dtype:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if found is None or given == "auto":
        return torch.bfloat16
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype={given!r}: must be bfloat16, float16 or float32")
    result: torch.dtype = found
    return result


def _check_experts(path: Any, name: str, module: Any, spec: Any) -> None:
    """CheckpointError unless the module that the config made has the shape of the file's
    experts.
    """
    down = module.down_proj.shape
    given = (spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.has_bias)
    wide, narrow = (2, 1) if module.is_transposed else (1, 2)
    wanted = (down[0], down[wide], down[narrow], module.has_bias)
    if given != wanted:
        raise CheckpointError(
            f"{path}: {name}: the file's experts have (num_experts, hidden_size, "
            f"intermediate_size, has_bias) = {given}, {type(module).__name__} {tuple(wanted)}"
        )


def _make_rotary(checkpoint: GgufCheckpoint, model: Any) -> None:
    """Compute what the modules compute when they are made,
    which on the meta device came to nothing.
    """
    factors = checkpoint.read(ROPE_FACTORS) if ROPE_FACTORS in checkpoint.tensors else None
    for name, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if not hasattr(module, "inv_freq"):
            raise TypeError(f"{name} ({type(module).__name__}) has buffers that no file holds")
        made = type(module)(model.config)
        if factors is not None:
            if factors.shape != made.inv_freq.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {ROPE_FACTORS} has shape {factors.shape}: must be "
                    f"{tuple(made.inv_freq.shape)}"
                )
            made.inv_freq /= torch.from_numpy(factors)
            made.original_inv_freq = made.inv_freq
        model.set_submodule(name, made)


__all__ = ["load_gguf_model", "load_gguf_tokenizer"]
