"""Whole models from GGUF files: transformers' own modules, experts and large linear layers the file's blocks, run where they are mapped.

The modules are made on the meta device; every other tensor is dequantised in chunks that stay in the
CPU's caches and laid into its place (``ktk.models.whole`` says which is which), so that a model costs its weights in ``dtype`` and
nothing beside. transformers' own GGUF loader dequantises the experts too, knows few architectures, and not how wide experts are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ktk.ops.linear
from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint, GgufTensor
from ktk.errors import CheckpointError
from ktk.experts.stored import StoredMatrix
from ktk.integration.choices import PACKED_LINEAR, check_linear
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.experts import drop_weights, find_experts
from ktk.integration.transformers.gguf_tokenizer import gguf_ends, load_gguf_tokenizer
from ktk.integration.transformers.linear import KtkLinear, is_dense, replace_linears
from ktk.integration.transformers.packing import attach
from ktk.integration.transformers.quantizer import KtkConfig, KtkHfQuantizer
from ktk.integration.transformers.saving import SavePretrained
from ktk.integration.transformers.sources import layer_of
from ktk.log import logger
from ktk.machine.cpu import default_threads
from ktk.machine.memory import aligned_buffer
from ktk.models.arch import whole_model
from ktk.models.find import find_gguf_experts
from ktk.models.prediction import gguf_predicts
from ktk.models.whole.rope import Fields
from ktk.models.whole.rows import Tensor, WholeModel
from ktk.models.whole.source import Source
from ktk.ops.linear import Linear
from ktk.ops.requantise import packed_format
from ktk.paths import user_path
from ktk.placement.blocks import kernel_types
from ktk.placement.blocks import repack as repack_blocks

# Dequantised at a time: 1 MB as float32, which NumPy's temporaries pass through the caches with. One call for a tensor of
# 4096 x 4096: 110 (Q5_K) to 280 (Q4_0) million weights a second; in chunks of this size 290 to 1170.
CHUNK_WEIGHTS = 1 << 18
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "lm_head.weight"  # in the file, in the model


@dataclass(frozen=True)
class _Plan:
    """One tensor of the model: the file's ones, and how they become it."""

    row: Tensor
    pieces: tuple[str, ...]
    target: torch.Tensor  # on meta

    @property
    def num_weights(self) -> int:
        return self.target.numel()


def load_gguf_model(
    path: str | os.PathLike[str],
    method: str = "auto",
    dtype: Any = None,
    repack: bool | None = None,
    *,
    linear: str = "file",
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """A causal language model from a GGUF file alone, its experts and large linear layers run by ktk from the mapped file.

    path : a .gguf file, any part of a split one, or a directory of one model.
    method, num_threads : of the experts, as ``ktk.MoE`` takes them. repack : True copies their blocks into memory in
    the order kernels read them; otherwise KTK_REPACK decides.
    linear : of the dense linear layers (attention projections, shared experts, dense layers, lm_head). "file": as the file's blocks,
    where ``file_linears`` finds some; "int8", "int4": dequantised, and packed by ``replace_linears``; "none": dequantised, and
    run by torch, which gradients (else parameters are frozen) and ``save_pretrained`` need. Without the compiled extension all are
    "none", with a warning.
    dtype : of everything else, which is dequantised: a torch dtype or its name; None: bfloat16.
    progress : called with (weights laid in place, all of them).
    Raises CheckpointError for an architecture without a row in ``ktk.models.whole``, and for tensors that are missing, left
    over, or of other shapes than the metadata says; BackendError if nothing runs the experts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = user_path(path)
    backends.check_method(method)
    check_linear(linear)
    dtype = _dtype(dtype)
    experts = find_gguf_experts(GgufCheckpoint.open(path))
    row = whole_model(experts.architecture, str(path))
    fields = row.fields(Source(experts))
    try:
        config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever the classes make of it
        raise CheckpointError(
            f"{path}: transformers makes no {fields['model_type']} of what the metadata says: {error}"
        ) from None
    modules = dict(find_experts(model))
    used: set[str] = set()
    for name, module in modules.items():
        _check_experts(path, name, module, experts.spec(layer_of(name)))
        drop_weights(module)
        used |= experts.tensor_names(layer_of(name))
    plans = _plan(experts.checkpoint, row, config.num_hidden_layers, model, used)
    linears: dict[str, _LinearPlan] = {}
    if linear == "file":
        linears = _take_linears(experts.checkpoint, row, model, plans)
    _fill(experts.checkpoint, plans, model, fields, progress)
    model.tie_weights()
    for name, plan in linears.items():
        model.set_submodule(name, _linear(experts.checkpoint, plan, fields, num_threads))
    if linears or (linear in PACKED_LINEAR and replace_linears(model, linear)):
        model.requires_grad_(
            False
        )  # nothing would get through; plain calls need no torch.no_grad()
    _make_rotary(experts.checkpoint, model)
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
    """CheckpointError unless the module that the config made has the shape of the file's experts."""
    down = module.down_proj.shape
    given = (spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.has_bias)
    wide, narrow = (2, 1) if module.is_transposed else (1, 2)
    wanted = (down[0], down[wide], down[narrow], module.has_bias)
    if given != wanted:
        raise CheckpointError(
            f"{path}: {name}: the file's experts have (num_experts, hidden_size, intermediate_size, has_bias) = {given}, "
            f"{type(module).__name__} {tuple(wanted)}"
        )


def _plan(
    checkpoint: GgufCheckpoint,
    row: WholeModel,
    num_layers: int,
    model: Any,
    used: set[str],
) -> dict[str, _Plan]:
    """Module tensor -> what it comes from; every tensor of model and file accounted for, or CheckpointError."""
    targets = {
        name: tensor for name, tensor in model.state_dict().items() if name not in _tied(model)
    }
    plans: dict[str, _Plan] = {}
    known = {*used, ROPE_FACTORS}
    optional = set()
    for tensor, layer in row.layer_tensors(num_layers):
        name = tensor.hf.format(n=layer)
        pieces = tuple(piece.format(n=layer) for piece in tensor.pieces)
        if tensor.is_optional:
            optional.add(name)
        if name in targets and all(piece in checkpoint.tensors for piece in pieces):
            known.update(pieces)
            plans.setdefault(name, _Plan(tensor, pieces, targets[name]))
    missing = [name for name in targets if name not in plans and name not in optional]
    if missing:
        sources = {
            t.hf.format(n=n): " and ".join(piece.format(n=n) for piece in t.pieces)
            for t, n in row.layer_tensors(num_layers)
        }
        named = [sources.get(name, name) for name in missing]
        raise CheckpointError(
            f"{checkpoint.path}: {len(named)} tensors are missing: {_some(named)}"
        )
    unused = [
        name
        for name in checkpoint.tensors
        if name not in known and not gguf_predicts(name, num_layers)
    ]
    if unused:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unused)} tensors have no place in {type(model).__name__}: {_some(unused)}"
        )
    return plans


def _tied(model: Any) -> set[str]:
    """Names of tensors that are others of the model."""
    if not model.config.tie_word_embeddings:
        return set()
    return {HEAD}


def file_linears(
    checkpoint: GgufCheckpoint, row: WholeModel, num_layers: int
) -> dict[str, tuple[Tensor, str]]:
    """Weights of dense linear layers that run as the file's blocks: module tensor -> (row, the file's tensor).

    Those of one tensor of the file, its rows in any order, of a type that kernels read, but F32, of which torch reads half the bytes once
    it is bf16. One row by 4096 x 2048, two Zen 4 cores: BF16 0.56 ms, F16 0.54, torch's bf16 0.83, fp16 0.46 (and 512 rows in 185 ms,
    F16 in 42). Empty where the kernels do not run.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    if ktk.ops.linear.why_not() is not None:
        return found
    seen: set[str] = set()
    for tensor, layer in row.layer_tensors(num_layers):
        name = tensor.hf.format(n=layer)
        pieces = tuple(piece.format(n=layer) for piece in tensor.pieces)
        if name in seen or not all(piece in checkpoint.tensors for piece in pieces):
            continue
        seen.add(name)
        if (
            len(pieces) == 1
            and (tensor.join is None or tensor.moves_rows)
            and pieces[0] != EMBEDDING
        ):
            found[name] = (tensor, pieces[0])
    if HEAD not in seen:  # tied to the embedding
        found[HEAD] = (Tensor(EMBEDDING, HEAD), EMBEDDING)
    return {
        name: (tensor, piece)
        for name, (tensor, piece) in found.items()
        if _runs_as_blocks(name, checkpoint.info(piece))
    }


def _runs_as_blocks(name: str, tensor: GgufTensor) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or len(tensor.shape) != 2 or not is_dense(module, tensor.shape):
        return False
    return tensor.type != "F32" and tensor.type in kernel_types()


@dataclass(frozen=True)
class _LinearPlan:
    """A linear layer of the file's blocks: its weight, perhaps a bias."""

    weight: _Plan
    bias: _Plan | None


def _take_linears(
    checkpoint: GgufCheckpoint, row: WholeModel, model: Any, plans: dict[str, _Plan]
) -> dict[str, _LinearPlan]:
    """The model's linear layers that run as blocks, by name; their tensors are taken out of ``plans``."""
    if reason := ktk.ops.linear.why_not():
        logger.warning("linear layers are dequantised and stay with torch: %s", reason)
    taken = {}
    found = file_linears(checkpoint, row, model.config.num_hidden_layers)
    for name, (tensor, piece) in found.items():
        owner = name.rpartition(".")[0]
        if name not in plans and name not in _tied(model):
            continue
        module = model.get_submodule(owner)
        if type(module) is torch.nn.Linear:
            weight = plans.pop(name, None) or _Plan(tensor, (piece,), module.weight)
            taken[owner] = _LinearPlan(weight, plans.pop(f"{owner}.bias", None))
    return taken


def _linear(
    checkpoint: GgufCheckpoint, plan: _LinearPlan, fields: Fields, num_threads: int | None
) -> KtkLinear:
    """A layer over the mapped blocks; where their rows are in another order, over a copy."""
    weight = plan.weight
    tensor = checkpoint.info(weight.pieces[0])
    if tensor.shape != tuple(weight.target.shape):
        raise _misshapen(tensor, weight, tensor.shape)
    blocks = checkpoint.blocks(tensor.name)  # (rows, row bytes)
    if weight.row.join is None:
        checkpoint.will_need(tensor.name)
    else:
        copy = aligned_buffer(blocks.size).reshape(blocks.shape)
        copy[:] = _joined(checkpoint, weight, [blocks], fields)
        blocks = copy
    bias = None
    if plan.bias is not None:
        bias = _read(checkpoint, plan.bias, torch.float32, fields)
    matrix = StoredMatrix.of_rows(tensor.type, tensor.shape[1], blocks[None])
    return KtkLinear(Linear.of_blocks(matrix, bias, num_threads=num_threads), weight.target.dtype)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _fill(
    checkpoint: GgufCheckpoint,
    plans: dict[str, _Plan],
    model: Any,
    fields: Fields,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Dequantise everything, several tensors at a time, the largest first."""
    kept = hf.kept_in_float32(model)
    total, done = sum(plan.num_weights for plan in plans.values()), 0

    def read(item: tuple[str, _Plan]) -> tuple[str, torch.Tensor]:
        name, plan = item
        is_kept = any(part in name for part in kept)
        dtype = torch.float32 if is_kept else plan.target.dtype
        return name, _read(checkpoint, plan, dtype, fields)

    ordered = sorted(plans.items(), key=lambda item: -item[1].num_weights)
    with ThreadPoolExecutor(default_threads(), thread_name_prefix="ktk-dequantise") as pool:
        for name, tensor in pool.map(read, ordered):
            _place(model, name, tensor)
            done += tensor.numel()
            if progress is not None:
                progress(done, total)
    for name, tensor in model.named_buffers():
        if tensor.is_meta and name in model.state_dict():
            _place(model, name, torch.zeros(tensor.shape, dtype=torch.float32))


def _read(
    checkpoint: GgufCheckpoint, plan: _Plan, dtype: torch.dtype, fields: Fields
) -> torch.Tensor:
    """One module tensor, of a new memory."""
    shape = plan.target.shape
    if plan.row.join is None:
        tensor = checkpoint.info(plan.pieces[0])
        if tuple(s for s in tensor.shape if s > 1) != tuple(s for s in shape if s > 1):
            raise _misshapen(tensor, plan, tensor.shape)
        return _dequantised(checkpoint, tensor, dtype).reshape(shape)
    joined = _joined(checkpoint, plan, [checkpoint.read(piece) for piece in plan.pieces], fields)
    if joined.shape != tuple(shape):
        raise _misshapen(checkpoint.info(plan.pieces[0]), plan, joined.shape)
    return torch.from_numpy(np.ascontiguousarray(joined)).to(dtype)


def _joined(
    checkpoint: GgufCheckpoint, plan: _Plan, arrays: list[np.ndarray], fields: Fields
) -> np.ndarray:
    assert plan.row.join is not None
    try:
        return plan.row.join(arrays, fields)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{checkpoint.path}: {' and '.join(plan.pieces)}: {error}") from None


def _misshapen(tensor: GgufTensor, plan: _Plan, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} (byte {tensor.begin}) gives {tuple(shape)}, the metadata says "
        f"{tuple(plan.target.shape)}"
    )


def _dequantised(
    checkpoint: GgufCheckpoint, tensor: GgufTensor, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(tensor.shape, dtype=dtype)
    if len(tensor.shape) < 2:
        return out.copy_(torch.from_numpy(checkpoint.read(tensor.name)))
    if tensor.type == "BF16" and dtype == torch.bfloat16:
        out.view(torch.uint16).numpy()[:] = checkpoint.blocks(tensor.name).view(np.uint16)
        return out
    rows = tensor.shape[0]
    step = max(1, CHUNK_WEIGHTS * rows // out.numel())
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[start:stop] = torch.from_numpy(checkpoint.read(tensor.name, (start, stop)))
    return out


def _place(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where the model has one on the meta device."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def _make_rotary(checkpoint: GgufCheckpoint, model: Any) -> None:
    """Compute what the modules compute when they are made, which on the meta device came to nothing."""
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
                    f"{checkpoint.path}: {ROPE_FACTORS} has shape {factors.shape}: must be {tuple(made.inv_freq.shape)}"
                )
            made.inv_freq /= torch.from_numpy(factors)
            made.original_inv_freq = made.inv_freq
        model.set_submodule(name, made)


__all__ = ["load_gguf_model", "load_gguf_tokenizer"]
