"""The tensors of a model from a GGUF file's: which come from which,
dequantised in chunks and laid into their places.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ktk.checkpoint.gguf import GgufCheckpoint, GgufTensor
from ktk.errors import CheckpointError
from ktk.integration.transformers import names as hf
from ktk.machine.cpu import default_threads
from ktk.models.prediction import gguf_predicts
from ktk.models.whole.rope import Fields
from ktk.models.whole.rows import Tensor, WholeModel

# Dequantised at a time: 1 MB as float32, which NumPy's temporaries pass through the caches with.
# One call for a tensor of 4096 x 4096: 110 (Q5_K) to 280 (Q4_0) million weights a second; in chunks
# of this size 290 to 1170.
CHUNK_WEIGHTS = 1 << 18
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "lm_head.weight"  # in the file, in the model


@dataclass(frozen=True)
class Plan:
    """One tensor of the model: the file's ones, and how they become it."""

    row: Tensor
    pieces: tuple[str, ...]
    target: torch.Tensor  # on meta

    @property
    def num_weights(self) -> int:
        return self.target.numel()


def plan_tensors(
    checkpoint: GgufCheckpoint,
    row: WholeModel,
    num_layers: int,
    model: Any,
    used: set[str],
) -> dict[str, Plan]:
    """Module tensor -> what it comes from; every tensor of model and file accounted for,
    or CheckpointError.
    """
    targets = {
        name: tensor for name, tensor in model.state_dict().items() if name not in tied(model)
    }
    plans: dict[str, Plan] = {}
    known = {*used, ROPE_FACTORS}
    optional = set()
    for tensor, layer in row.layer_tensors(num_layers):
        name = tensor.hf.format(n=layer)
        pieces = tuple(piece.format(n=layer) for piece in tensor.pieces)
        if tensor.is_optional:
            optional.add(name)
        if name in targets and all(piece in checkpoint.tensors for piece in pieces):
            known.update(pieces)
            plans.setdefault(name, Plan(tensor, pieces, targets[name]))
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
            f"{checkpoint.path}: {len(unused)} tensors have no place in {type(model).__name__}: "
            f"{_some(unused)}"
        )
    return plans


def tied(model: Any) -> set[str]:
    """Names of tensors that are others of the model."""
    if not model.config.tie_word_embeddings:
        return set()
    return {HEAD}


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def fill(
    checkpoint: GgufCheckpoint,
    plans: dict[str, Plan],
    model: Any,
    fields: Fields,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Dequantise everything, several tensors at a time, the largest first."""
    kept = hf.kept_in_float32(model)
    total, done = sum(plan.num_weights for plan in plans.values()), 0

    def read(item: tuple[str, Plan]) -> tuple[str, torch.Tensor]:
        name, plan = item
        is_kept = any(part in name for part in kept)
        dtype = torch.float32 if is_kept else plan.target.dtype
        return name, read_tensor(checkpoint, plan, dtype, fields)

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


def read_tensor(
    checkpoint: GgufCheckpoint, plan: Plan, dtype: torch.dtype, fields: Fields
) -> torch.Tensor:
    """One module tensor, of a new memory."""
    shape = plan.target.shape
    if plan.row.join is None:
        tensor = checkpoint.info(plan.pieces[0])
        if tuple(s for s in tensor.shape if s > 1) != tuple(s for s in shape if s > 1):
            raise misshapen(tensor, plan, tensor.shape)
        return _dequantised(checkpoint, tensor, dtype).reshape(shape)
    joined = joined_blocks(
        checkpoint, plan, [checkpoint.read(piece) for piece in plan.pieces], fields
    )
    if joined.shape != tuple(shape):
        raise misshapen(checkpoint.info(plan.pieces[0]), plan, joined.shape)
    return torch.from_numpy(np.ascontiguousarray(joined)).to(dtype)


def joined_blocks(
    checkpoint: GgufCheckpoint, plan: Plan, arrays: list[np.ndarray], fields: Fields
) -> np.ndarray:
    assert plan.row.join is not None
    try:
        return plan.row.join(arrays, fields)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{checkpoint.path}: {' and '.join(plan.pieces)}: {error}") from None


def misshapen(tensor: GgufTensor, plan: Plan, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} (byte {tensor.begin}) gives {tuple(shape)}, the "
        f"metadata says {tuple(plan.target.shape)}"
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
