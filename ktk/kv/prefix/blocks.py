"""Blocks that callers hand over: one page of one layer's keys or values, as any array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ktk.kv.prefix.config import PageLayout

LayerData = Sequence[Sequence[Any]]  # [layer][page] -> a block


def bytes_of(block: Any, num_bytes: int, what: str) -> np.ndarray:
    """A view of a block's memory, uint8 (num_bytes,).

    block : a NumPy array or a torch tensor on the CPU, C-contiguous, of any dtype and shape. Raises
    ValueError, naming ``what``, if it is another, or of another size.
    """
    if isinstance(block, torch.Tensor):
        if block.device.type != "cpu" or not block.is_contiguous():
            raise ValueError(f"{what}: on {block.device} or with gaps: must be contiguous, on cpu")
        view = block.detach().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(block, np.ndarray) and block.flags.c_contiguous:
        view = block.reshape(-1).view(np.uint8)
    else:
        raise ValueError(f"{what}: {type(block).__name__}: must be a C-contiguous array or tensor")
    if view.size != num_bytes:
        raise ValueError(f"{what}: {view.size} bytes: must be {num_bytes}")
    return view


def checked(
    layout: PageLayout, k_cache: LayerData, v_cache: LayerData, pages: int
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """[page][layer] -> views of its keys and of its values, uint8 (bytes,).

    v_cache : may be empty where values have no width. Raises ValueError.
    """
    layers = layout.info.shape.num_layers
    sizes = dict(zip((True, False), layout.part_bytes, strict=True))
    for name, cache, is_key in (("k_cache", k_cache, True), ("v_cache", v_cache, False)):
        if not sizes[is_key]:
            continue
        if len(cache) != layers or any(len(blocks) < pages for blocks in cache):
            raise ValueError(f"{name}: must have {layers} layers of at least {pages} pages each")
    nothing = np.empty(0, np.uint8)

    def view(cache: LayerData, is_key: bool, layer: int, page: int) -> np.ndarray:
        if not sizes[is_key]:
            return nothing
        what = f"{'k' if is_key else 'v'}_cache[{layer}][{page}]"
        return bytes_of(cache[layer][page], sizes[is_key], what)

    return [
        [(view(k_cache, True, i, page), view(v_cache, False, i, page)) for i in range(layers)]
        for page in range(pages)
    ]
