"""A model's pass without the model's own forward: an embedding, its decoder layers in one native
call, a norm, a head.

That a model is so plain is tried on numbers: its own forward runs once, with random rows in place
of what its layers make, and comes to the same bits. It then runs no more but for the angles of
positions, 512 at a time, which every layer is given as before. What it costs beside the layers is
masks that nobody reads, angles computed anew and a hundred calls of Python: on SmolLM2 as a mixture
1.6 ms a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.decoder_layers import FusedForward, turns_of
from ktk.integration.transformers.native_call import DTYPES
from ktk.ops.decoder import DecoderLayer, PageTables, run_layers

BLOCK = 512  # positions whose angles are computed at once
PLACES = [0, 1, 2, 5, 64, 100, 255, BLOCK - 1]  # that are tried


class _Seen:
    """A pass whose layers compute nothing: what each is given, and random rows that it gives."""

    def __init__(self) -> None:
        self.given: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}
        self.turns: dict[int, torch.Tensor | None] = {}
        self._random = torch.Generator().manual_seed(5)
        self._known: list[tuple[Any, int, torch.Tensor | None]] = []

    def run(self, layer: FusedForward, x: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        self.given[layer.index] = x.clone()
        self.turns[layer.index] = self._turns_of(named.get(hf.POSITIONS), layer.rotary_dim)
        self.made[layer.index] = torch.randn(x.shape, generator=self._random).to(x.dtype)
        return self.made[layer.index]

    def _turns_of(self, positions: Any, rotary_dim: int) -> torch.Tensor | None:
        """The same tensor for the same positions."""
        for known, dim, turns in self._known:
            if known is positions and dim == rotary_dim:
                return turns
        turns = None if positions is None else turns_of(positions, rotary_dim)
        self._known.append((positions, rotary_dim, turns))
        return turns


class PlainPass:
    """Passes of a model for which ``of`` has found that they are so."""

    def __init__(
        self, model: Any, fused: Sequence[FusedForward], layers: Sequence[DecoderLayer], norm: Any
    ) -> None:
        self._model, self._fused, self._layers, self._norm = model, fused, layers, norm
        self._embedding, self._head = model.get_input_embeddings(), hf.head_of(model)
        self._kinds: list[int] = []  # of each layer, an index of turns
        self._turns: list[torch.Tensor] = []  # float32 (2, positions, rotary_dim / 2)

    @classmethod
    def of(
        cls, model: Any, fused: Sequence[FusedForward], layers: Sequence[DecoderLayer]
    ) -> PlainPass | None:
        """None for a model that is not plain. layers : what runs each of ``fused``."""
        if any(layer.is_streamed for layer in layers):
            return None
        tokens = [(7 * i + 3) % model.get_input_embeddings().weight.shape[0] for i in PLACES]
        seen, calls = _Seen(), list[tuple[Any, torch.Tensor, torch.Tensor]]()

        def keep(module: Any, given: Any, made: Any) -> None:
            if given and isinstance(given[0], torch.Tensor) and isinstance(made, torch.Tensor):
                calls.append((module, given[0], made))

        hooks = [module.register_forward_hook(keep) for module in model.modules()]
        try:
            out = _run(model, fused, seen, tokens, PLACES, range(len(PLACES)))
        finally:
            for hook in hooks:
                hook.remove()
        order = list(range(len(fused)))
        is_chain = list(seen.given) == order and all(
            torch.equal(seen.given[i + 1], seen.made[i]) for i in order[:-1]
        )
        last = seen.made.get(order[-1])
        into_head = [given for module, given, _ in calls if module is hf.head_of(model)]
        if not is_chain or len(into_head) != 1:
            return None
        norms = [m for m, x, made in calls if x is last and torch.equal(made, into_head[0])]
        if len(norms) != 1:
            return None
        found = cls(model, fused, layers, norms[0])
        rows = found._embedding(torch.tensor([tokens]))
        logits, _ = found._outputs(seen.made[order[-1]])
        is_same = torch.equal(rows, seen.given[0]) and rows.dtype in DTYPES
        if not is_same or not torch.equal(logits, out.logits[0]) or not found._extend():
            return None
        for index, turns in seen.turns.items():
            if turns is None or not torch.equal(turns, found._turns_at(index, PLACES)):
                return None
        return found

    @property
    def takes(self) -> bool:
        """Whether nobody wants to know what the model's own forward calls."""
        return all(layer.note is None for layer in self._fused)

    def forward(
        self,
        tokens: Sequence[int],
        sequence: Sequence[int],
        position: Sequence[int],
        tables: Sequence[PageTables],
        wanted: Sequence[int],
        meanwhile: Callable[[], None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``NativeModel.forward``, hidden states always."""
        rows = self.rows(tokens, sequence, position, tables, meanwhile)
        is_all = len(wanted) == len(tokens)
        return self._outputs(rows[None] if is_all else rows[None, list(wanted)])

    def rows(
        self,
        tokens: Sequence[int],
        sequence: Sequence[int],
        position: Sequence[int],
        tables: Sequence[PageTables],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """What the last layer makes of each row: (rows, hidden_size)."""
        for layer in self._fused:
            layer.calls += len(tokens)
        ids, places = np.array(tokens, np.int64), np.array(position, np.int64)
        rows = self._embedding(torch.from_numpy(ids))  # (rows, hidden_size)
        while max(position) >= self._turns[0].shape[1]:
            self._extend()
        turns = [of.numpy().take(places, 1) for of in self._turns]  # (2, rows, rotary_dim / 2)
        both = [(own.ctypes.data, own.ctypes.data + own.nbytes // 2) for own in turns]
        meanwhile()
        run_layers(
            self._layers,
            DTYPES[rows.dtype],
            rows.data_ptr(),
            [both[kind] for kind in self._kinds],
            tables,
            np.array(sequence, np.int32),
            places,
        )
        return rows

    def logits(self, row: torch.Tensor) -> torch.Tensor:
        """Of one row (hidden_size,) by itself: (vocab_size,), with the bits of a pass of one."""
        return self._outputs(row[None, None])[0][0]

    def _outputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (1, count, hidden_size) of the last layer -> logits, hidden states."""
        hidden = self._norm(rows)
        return self._head(hidden)[0], hidden[0]

    def _turns_at(self, layer: int, places: Sequence[int]) -> torch.Tensor:
        return self._turns[self._kinds[layer]][:, list(places)]

    def _extend(self) -> bool:
        """The angles of the next positions; False if some layer is given none."""
        first = self._turns[0].shape[1] if self._turns else 0
        seen, places = _Seen(), range(first, first + BLOCK)
        _run(self._model, self._fused, seen, [0] * BLOCK, places, [0])
        kinds: list[torch.Tensor] = []
        of_layers = []
        for layer in self._fused:
            turns = seen.turns[layer.index]
            if turns is None or turns.shape[1] != BLOCK:
                return False
            place = next((i for i, known in enumerate(kinds) if known is turns), len(kinds))
            kinds[place:] = kinds[place:] or [turns]
            of_layers.append(place)
        if self._turns:
            kinds = [torch.cat(both, 1) for both in zip(self._turns, kinds, strict=True)]
        self._kinds, self._turns = of_layers, kinds
        return True


def _run(
    model: Any,
    fused: Sequence[FusedForward],
    seen: _Seen,
    tokens: Sequence[int],
    places: Sequence[int],
    wanted: Sequence[int],
) -> Any:
    for layer in fused:
        layer.rows = seen
    try:
        return model(**hf.row_inputs(tokens, places), **hf.logits_of(model, wanted))
    finally:
        for layer in fused:
            layer.rows = None
