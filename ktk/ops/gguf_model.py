"""GgufModel: the MoE layers of a GGUF model, each made on first use,
the next one read ahead meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.fork import Lock
from ktk.models.find import find_gguf_experts
from ktk.models.gguf.experts import GgufExperts
from ktk.models.gguf.routing import Routing
from ktk.ops.moe import MoE

RESIDENT_FOR = 1.0  # seconds that a layer found in memory is believed to stay there


class GgufModel(Mapping[int, MoE]):
    """The MoE layers of a GGUF model: ``model[layer]`` is ``model.moe(layer)``; ``load_gguf`` makes
    one.

    layers : indices of the MoE layers, ascending. metadata : the file's key-values. routing,
    num_experts_per_tok :
    what a caller's router needs; Llama 4 weighs the experts' input and Gemma 4 scales their output,
    see ``Routing`` and ``output_scale``. Safe to use from several threads.
    """

    def __init__(
        self,
        experts: GgufExperts,
        *,
        method: str = "auto",
        num_threads: int | None = None,
        repack: bool | None = None,
    ) -> None:
        backends.check_method(method)  # refuse now rather than at the first layer
        self._experts = experts
        self._options: dict[str, Any] = {
            "method": method,
            "num_threads": num_threads,
            "repack": repack,
        }
        self._layers: dict[int, MoE] = {}
        self._lock = Lock()
        self._copied: set[int] = set()  # layers whose MoE has weights of its own
        self._seen: dict[int, float] = {}  # layer -> when it was last found in memory
        self._reader: threading.Thread | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return self._experts.layers

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._experts.checkpoint.metadata

    @property
    def routing(self) -> Routing:
        return self._experts.routing

    @property
    def num_experts_per_tok(self) -> int:
        return self._experts.num_experts_per_tok

    def spec(self, layer: int) -> MoESpec:
        """Shape and activation of one layer. Raises CheckpointError."""
        return self._experts.spec(layer)

    def experts(self, layer: int) -> StoredExperts:
        """One layer's blocks, views of the file. Raises CheckpointError."""
        return self._experts.experts(layer)

    def output_scale(self, layer: int) -> np.ndarray | None:
        """float32 (num_experts,) for a caller to multiply topk_weights by (Gemma 4), or None.

        Raises CheckpointError.
        """
        return self._experts.output_scale(layer)

    def moe(self, layer: int) -> MoE:
        """The operator of one layer, made on first use; asks the OS to read the next layer ahead.

        Raises CheckpointError for a layer without experts or of unusable types, BackendError if
        nothing can run it.
        """
        self._experts.spec(layer)
        self._read_ahead(layer)
        with self._lock:
            if layer not in self._layers:
                blocks = self._experts.experts(layer)
                kept = weakref.ref(blocks)
                self._layers[layer] = MoE(blocks, **self._options)
                del blocks
                if kept() is None:  # repacked, or quantised anew: the file is not read again
                    self._copied.add(layer)
            return self._layers[layer]

    def _read_ahead(self, layer: int) -> None:
        """Have the layer that runs after this one read, unless it is in memory;
        the first follows the last.
        """
        following = self.layers[(self.layers.index(layer) + 1) % len(self.layers)]
        now = time.monotonic()
        if following in self._copied:
            return
        if now - self._seen.get(following, -RESIDENT_FOR) < RESIDENT_FOR:
            return
        if self._experts.is_resident(following):
            self._seen[following] = now
        elif self._reader is None or not self._reader.is_alive():
            # Advice alone takes 0.2 ms per MB, which the layer that runs meanwhile should not wait
            # for.
            self._reader = threading.Thread(
                target=self._experts.prefetch, args=(following,), name="ktk-readahead", daemon=True
            )
            self._reader.start()

    def __getitem__(self, layer: int) -> MoE:
        if layer not in self._experts.layers:
            raise KeyError(layer)
        return self.moe(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    # A Mapping's own would make every layer to compare them.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return (
            f"GgufModel({self._experts.architecture}, {len(self)} MoE layers, "
            f"{self._experts.checkpoint.path})"
        )


@lru_cache(maxsize=4)
def _opened(path: str, stamp: tuple[tuple[str, int, int], ...]) -> GgufExperts:
    return find_gguf_experts(GgufCheckpoint.open(path))


def open_experts(path: Path) -> GgufExperts:
    """``find_gguf_experts`` of a path; the same object for every layer that asks while the files
    stay as they are.
    """
    beside = (path.parent if path.is_file() else path).glob("*")
    files = sorted(file for file in beside if file.name.lower().endswith(".gguf"))
    stats = ((str(file), file.stat()) for file in files if file.is_file())
    stamp = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
    return _opened(str(path), stamp)


def load_gguf(
    path: str | os.PathLike[str],
    *,
    method: str = "auto",
    num_threads: int | None = None,
    repack: bool | None = None,
) -> GgufModel:
    """Open the experts of a GGUF model; nothing is read but the header.

    path : a .gguf file, any part of a split one, or a directory of one model. method, num_threads,
    repack : as ``MoE`` takes them; repack None leaves its default. Raises CheckpointError,
        ValueError for an unknown method.
    """
    experts = find_gguf_experts(GgufCheckpoint.open(path))
    return GgufModel(experts, method=method, num_threads=num_threads, repack=repack)
