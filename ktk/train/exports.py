"""Adapters in the layouts that others load.

- peft: of its ``target_parameters``, for a float model: gate and up are one parameter there, so the
  rank is twice the adapters'; A is (experts * rank, in_features) and B (out_features, rank *
  experts), the expert running fastest.
- vllm (0.32): of most models a tensor for each expert and projection, named as the checkpoint's
  weights; of those whose experts it loads stacked, peft's layout.
- sglang (0.5.23): a tensor for each expert and projection.

Sources: peft's ParamWrapper; vLLM's lora/model_manager.py and lora_model.py; SGLang's
srt/lora/lora.py and mem_pool.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ktk.checkpoint.packed import replacing, write_all
from ktk.errors import CheckpointError
from ktk.integration.transformers.experts import find_experts
from ktk.integration.transformers.model_config import model_config
from ktk.integration.transformers.multimodal import auto_class
from ktk.models.arch import BY_MODEL_TYPE
from ktk.models.arch.names import BLOCK_SPARSE_MOE
from ktk.paths import user_path
from ktk.train.adapter import Adapter
from ktk.train.files import CONFIG, PREFIX, WEIGHTS

LAYOUTS = ("peft", "vllm", "sglang")
# Model types whose classes say is_3d_moe_weight in vLLM 0.32.
VLLM_STACKED = (
    "gpt_oss",
    "interns1_pro",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)
# Projections of a per-expert tensor unless the model's own checkpoints call them otherwise.
_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class _Module:
    """How transformers' experts module holds its weights. is_interleaved : gate and up rows
    alternate.
    """

    num_experts: int
    has_gate: bool
    is_interleaved: bool


def export(
    adapter: Adapter,
    to: str,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the adapter as one of LAYOUTS has it.

    base : the model's directory, of which config.json is read; None: the adapter's own.
    Returns the directory. Raises ValueError, CheckpointError before anything is written.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to={to!r}: must be one of {LAYOUTS}")
    found = base_path(adapter, base)
    config = model_config(found)
    modules = _modules(config, adapter, found)
    model_type = config.get_text_config(decoder=True).model_type
    is_stacked = to == "peft" or (to == "vllm" and model_type in VLLM_STACKED)
    if is_stacked:
        tensors, said = _stacked(adapter, modules)
    else:
        names = _names(model_type) if to == "vllm" else ("mlp", _PARTS)
        tensors, said = _per_expert(adapter, modules, *names)
    for module, (a, b) in adapter.linears.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b
    said["base_model_name_or_path"] = str(found)
    path = user_path(directory)
    path.mkdir(parents=True, exist_ok=True)
    data = save({n: t.contiguous() for n, t in tensors.items()}, {"format": "pt"})
    for name, content in ((WEIGHTS, data), (CONFIG, json.dumps(said, indent=2).encode())):
        with replacing(path / name) as file:
            write_all(file, content)
    return path


def base_path(adapter: Adapter, base: str | os.PathLike[str] | None) -> Path:
    """The directory of the model; CheckpointError if there is none with a config.json."""
    said = base or adapter.base
    if said is None or not (user_path(said) / "config.json").is_file():
        raise CheckpointError(
            f"{adapter.path}: its model, {said}, is no directory with a config.json here: give it "
            "with --base"
        )
    return user_path(said)


def _modules(config: Any, adapter: Adapter, base: Path) -> dict[str, _Module]:
    """The experts modules that the adapter has, as transformers would build them."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    found: dict[str, Any] = dict(find_experts(model))
    modules = {}
    for name, matrices in adapter.experts.items():
        if (module := found.get(name)) is None:
            raise CheckpointError(f"{adapter.path}: {base} has no experts {name}")
        count = module.down_proj.shape[0]
        if any(len(matrix) != count for matrix in matrices.values()):
            raise CheckpointError(f"{adapter.path}: {name} has {count} experts in {base}")
        modules[name] = _Module(count, module.has_gate, not module.is_concatenated)
    return modules


def _stacked(
    adapter: Adapter, modules: dict[str, _Module]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """peft's layout: the first parameter's wrapper lies within the second's.

    All parameters have the largest rank, filled up with zeros: peft warns of a pattern that names
    a parameter that it ignores it, though it does not. Linear layers keep theirs by patterns.
    """
    parts = {name: dict(_parameters(adapter.experts[name], m)) for name, m in modules.items()}
    ranks = [a.shape[1] for own in parts.values() for a, _ in own.values()]
    rank = max(ranks, default=adapter.rank)
    tensors, parameters = {}, set()
    for name, own in parts.items():
        for at, (parameter, (a, b)) in enumerate(own.items()):
            more = rank - a.shape[1]
            a = torch.nn.functional.pad(a, (0, 0, 0, more))  # (experts, rank, in)
            b = torch.nn.functional.pad(b, (0, more))  # (experts, out, rank)
            inside = ".base_layer" * (len(own) - 1 - at)
            tensors[f"{PREFIX}{name}{inside}.lora_A.weight"] = a.reshape(-1, a.shape[2])
            flat = b.permute(1, 2, 0).reshape(b.shape[1], -1)
            tensors[f"{PREFIX}{name}{inside}.lora_B.weight"] = flat
            parameters.add(f"{'.'.join(name.split('.')[-2:])}.{parameter}")
    said = _said(adapter)
    said["r"], said["lora_alpha"] = rank, adapter.scaling * rank
    said["target_parameters"] = sorted(parameters, key=lambda n: (not n.endswith("up_proj"), n))
    said["target_modules"] = _suffixes(adapter)
    if rank != adapter.rank:
        said["rank_pattern"] = dict.fromkeys(_suffixes(adapter), adapter.rank)
        alpha = adapter.scaling * adapter.rank
        said["alpha_pattern"] = dict.fromkeys(_suffixes(adapter), alpha)
    return tensors, said


def _parameters(
    matrices: dict[str, torch.Tensor], module: _Module
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Name, A (experts, rank, in) and B (experts, out, rank) of each parameter with an adapter."""
    if not module.has_gate and "up_a" in matrices:
        yield "up_proj", (matrices["up_a"], matrices["up_b"])
    elif "up_a" in matrices or "gate_a" in matrices:
        present = [name for name in ("gate", "up") if f"{name}_a" in matrices]
        a = torch.cat([matrices[f"{name}_a"] for name in present], 1)  # (experts, ranks, H)
        like = matrices[f"{present[0]}_b"]
        experts, rows, rank = like.shape
        b = like.new_zeros(experts, 2, rows, a.shape[1])  # gate's rows, then up's
        for at, name in enumerate(present):
            half = ("gate", "up").index(name)
            b[:, half, :, at * rank : (at + 1) * rank] = matrices[f"{name}_b"]
        if module.is_interleaved:
            b = b.transpose(1, 2)
        yield "gate_up_proj", (a, b.reshape(experts, 2 * rows, -1))
    if "down_a" in matrices:
        yield "down_proj", (matrices["down_a"], matrices["down_b"])


def _names(model_type: str) -> tuple[str, dict[str, str]]:
    """The module before ".experts", and the projections, as the model's checkpoints name them."""
    row = BY_MODEL_TYPE.get(model_type)
    if row is not None and BLOCK_SPARSE_MOE in row.families:
        return "block_sparse_moe", {k: v for k, v in BLOCK_SPARSE_MOE.parts.items() if v}
    return "mlp", _PARTS


def _per_expert(
    adapter: Adapter, modules: dict[str, _Module], parent: str, parts: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Two matrices for each expert and projection; zeros where a projection has no adapter, which
    both loaders want to be there.
    """
    tensors = {}
    targets = set()
    for name, module in modules.items():
        own = adapter.experts[name]
        placed = name.replace(".mlp.experts", f".{parent}.experts")
        for projection, called in parts.items():
            if projection == "gate" and not module.has_gate:
                continue
            a, b = _or_zeros(own, projection)
            for expert in range(module.num_experts):
                stem = f"{PREFIX}{placed}.{expert}.{called}"
                tensors[f"{stem}.lora_A.weight"] = a[expert].clone()
                tensors[f"{stem}.lora_B.weight"] = b[expert].clone()
            targets.add(called)
    said = _said(adapter)
    said["target_modules"] = sorted({*_suffixes(adapter), *targets})
    return tensors, said


def _or_zeros(
    matrices: dict[str, torch.Tensor], projection: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if f"{projection}_a" in matrices:
        return matrices[f"{projection}_a"], matrices[f"{projection}_b"]
    is_down = projection == "down"
    others = [name.removesuffix("_a") for name in matrices if name.endswith("_a")]
    alike = [other for other in others if (other == "down") == is_down]
    a, b = (matrices[f"{(alike or others)[0]}_{letter}"] for letter in "ab")
    if alike:
        return torch.zeros_like(a), torch.zeros_like(b)
    experts, rank, columns = a.shape  # down's columns are gate's rows, and its rows their columns
    return a.new_zeros(experts, rank, b.shape[1]), a.new_zeros(experts, columns, rank)


def _suffixes(adapter: Adapter) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in adapter.linears})


def _said(adapter: Adapter) -> dict[str, Any]:
    """A config of plain LoRA; dropout is training's."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.scaling * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
