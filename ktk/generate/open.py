"""A model by its path, whatever it is, opened with its tokenizer and everything that makes it
fast here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktk.errors import CheckpointError
from ktk.generate.describe import ModelDescription, describe_model
from ktk.integration.transformers.attention import use_attention
from ktk.integration.transformers.decoder_layers import fuse_decoder_layers
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.gguf_tokenizer import load_gguf_tokenizer
from ktk.integration.transformers.linear import run_linears
from ktk.integration.transformers.loading import load_model
from ktk.integration.transformers.quantizer import KtkConfig
from ktk.integration.transformers.streaming import expert_slots
from ktk.integration.transformers.tokens import load_tokenizer
from ktk.paths import user_path
from ktk.placement.masks.request import HybridRequest
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.report import ResidencyReport
from ktk.train.attach import attach_adapter


@dataclass(frozen=True)
class OpenModel:
    """A model ready to generate.

    model : a transformers causal language model in evaluation mode. adapter : the directory of what
    was added to its weights.
    """

    model: Any
    tokenizer: Any
    description: ModelDescription
    adapter: Path | None = None

    def residency(self) -> ResidencyReport | None:
        """Which experts are in memory now, and what reading the others took; None: all are."""
        slots = expert_slots(self.model)
        return None if slots is None else slots.report()

    @property
    def name(self) -> str:
        """The last part of the path, without .gguf."""
        path = Path(self.description.path).resolve()
        return path.stem if path.suffix == ".gguf" else path.name


def open_model(
    path: str | os.PathLike[str],
    method: str = "auto",
    weight_format: str | None = None,
    linear: str = "file",
    dtype: str | None = None,
    *,
    context: int | None = None,
    force: bool = False,
    expert_memory: ExpertMemory | None = None,
    hybrid: HybridRequest | None = None,
    adapter: str | os.PathLike[str] | None = None,
    kv_dtype: str | None = None,
) -> OpenModel:
    """Load a model and its tokenizer, unless memory says that it cannot work.

    path, method, weight_format, dtype, context, kv_dtype : as in ``describe_model``. linear : of
    the dense linear layers, as in ``ktk.integration.choices``: "int8" or "int4" packs them; "file"
    runs them as they are, a GGUF file's blocks or bf16 and fp16 weights; "none" leaves them to
    torch.
    force : load it even if it does not fit. expert_memory : of a packed directory or a
    GGUF file: experts are read when tokens need them, and no more than fit into this are in memory;
    None: all are loaded, or mapped. hybrid : experts of a directory that a device runs, and those
    that are deferred. adapter : a directory that ``ktk train`` wrote, whose adapters go beside the
    experts' weights and into attention's; ``ktk.train.attach`` says which models cannot have it.
    Raises CheckpointError, BackendError, ValueError; MemoryError, with the figures, if it does not
    fit.
    """
    description = describe_model(
        path, method, weight_format, dtype, context, linear, expert_memory, kv_dtype
    )
    path = user_path(path)
    if hybrid is not None and description.kind == "gguf":
        raise ValueError(
            f"{path}: --gpu-experts, --placement and --max-deferred-experts are for directories: "
            "ktk convert makes one of a Hugging Face directory"
        )
    if description.reason is not None:
        raise CheckpointError(f"{path}: {description.reason}")
    refusal = description.memory_refusal()
    if refusal is not None and not force:
        raise MemoryError(refusal)
    if description.kind == "gguf":
        model, tokenizer = _open_gguf(path, method, description.dtype, linear, expert_memory)
    else:
        model, tokenizer = _open_directory(description, path, method, dtype, expert_memory, hybrid)
    if adapter is not None:
        attach_adapter(model, adapter)
    if description.kind != "gguf":
        run_linears(model, linear)
    use_attention(model)
    fuse_decoder_layers(model)
    tuned = None if adapter is None else user_path(adapter)
    return OpenModel(model.eval(), tokenizer, description, tuned)


def _open_gguf(
    path: str | os.PathLike[str],
    method: str,
    dtype: str,
    linear: str,
    expert_memory: ExpertMemory | None,
) -> tuple[Any, Any]:
    model = load_gguf_model(
        path, method=method, dtype=dtype, linear=linear, expert_memory=expert_memory
    )
    return model, load_gguf_tokenizer(path)


def _open_directory(
    description: ModelDescription,
    path: str | os.PathLike[str],
    method: str,
    dtype: str | None,
    expert_memory: ExpertMemory | None,
    hybrid: HybridRequest | None,
) -> tuple[Any, Any]:
    options: dict[str, Any] = {"expert_memory": expert_memory}
    weight_format = description.weight_format if description.kind == "float" else None
    if weight_format is not None or hybrid is not None:
        asked = {} if hybrid is None else hybrid.options()
        options["quantization_config"] = KtkConfig(weight_format, method=method, **asked)
    tokenizer = load_tokenizer(path)  # before the model, which may take minutes
    own_dtype = None if dtype is None else getattr(torch, dtype)
    model = load_model(path, method, own_dtype, only_text=True, **options)
    return model, tokenizer
