"""All layers of a model's experts over one pool of slots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from ktk.experts.activation import Activation
from ktk.ops.moe import MoE
from ktk.ops.streamed import StreamedMoE
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.reader import FilesReader
from ktk.placement.residency.shrinking_slots import ShrinkingSlots


class StreamedLayers:
    """A model's experts of which only some are in memory; ``layers[number]`` is a ``StreamedMoE``.

    reader : of them, of the layers with these numbers in this order. activations : by layer, in
    place of the specs' own. top_k : experts that one token uses in a layer. method, num_threads :
    as in ``MoE``. where : what is read, for messages. elsewhere : by layer, bool (num_experts,),
    experts of a device, which do not come into memory at the beginning.
    Raises ValueError if not even one token's experts fit, BackendError if nothing runs them.
    """

    def __init__(
        self,
        reader: FilesReader,
        numbers: Sequence[int],
        memory: ExpertMemory,
        top_k: int,
        *,
        activations: Mapping[int, Activation] | None = None,
        method: str = "auto",
        num_threads: int | None = None,
        where: str | os.PathLike[str] = "the disk",
        elsewhere: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        given = activations or {}
        stores = [reader.store(at, given.get(number)) for at, number in enumerate(numbers)]
        room = memory.room(
            [store.span_bytes for store in stores],
            [store.spec.num_experts for store in stores],
            top_k,
        )
        moes = [MoE(store, method=method, num_threads=num_threads) for store in stores]
        self.memory, self.room = memory, room
        self.slots = ShrinkingSlots(stores, reader, memory.options(room.capacity), top_k)
        named = os.fspath(where)
        self._layers = {
            number: StreamedMoE(moe, self.slots, at, named)
            for at, (number, moe) in enumerate(zip(numbers, moes, strict=True))
        }
        for number, following in pairwise(numbers):
            self._layers[number].following = self._layers[following]
        self.slots.bring_natively(
            [getattr(moe.runner, "experts", None) for moe in moes],
            [moe.foresight.turn for moe in self._layers.values()],
        )
        away = elsewhere or {}
        self.slots.fill([away.get(number) for number in numbers])
        self.slots.watch()

    def __getitem__(self, number: int) -> StreamedMoE:
        return self._layers[number]
