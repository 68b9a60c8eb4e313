"""A layer's experts spread over processes: each has some of them, tokens go to where theirs are.

A round: each token's hidden state goes once to every rank that has experts of it, that rank's
experts run, and each pair's output comes back as float32, to be summed where the token is, slot
by slot, as one process sums them. So results have the bits of one process with all experts,
whatever lies where.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ktk.backends import Operands
from ktk.checkpoint.packed import read_layer
from ktk.errors import BackendError, EngineError
from ktk.experts.formats.floats import to_f32
from ktk.experts.layout import PANEL, round_up
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.ops.exchange import Exchange
from ktk.ops.inputs import as_add, as_hidden, as_mask, as_routing, new_like
from ktk.ops.moe import MoE
from ktk.placement.store import ExpertStore

TOKENS_PER_ROUND = 1024  # 0.25 GiB of float32 outputs, of 8 experts and 8192 columns
_MORE, _FAILED = 1, 2


def shares(num_experts: int, ranks: int) -> list[list[int]]:
    """Experts of each rank: neighbours, as equally many as can be."""
    return [part.tolist() for part in np.array_split(np.arange(num_experts), ranks)]


@contextmanager
def _telling_all(exchange: Exchange) -> Iterator[None]:
    """What one rank raises here, the others learn in ``_agree``."""
    try:
        yield
    except Exception:
        exchange.numbers(np.tile(np.array([_FAILED, 0], np.int64), (exchange.ranks, 1)))
        raise


def _agree(exchange: Exchange, spec: MoESpec) -> None:
    """EngineError unless all ranks came so far, with the same spec."""
    own = zlib.crc32(repr(spec).encode())
    came = exchange.numbers(np.tile(np.array([0, own], np.int64), (exchange.ranks, 1)))
    for rank, (failed, other) in enumerate(came.tolist()):
        if failed:
            raise EngineError(f"rank {rank} could not load its experts: see its own error")
        if other != own:
            raise EngineError(f"rank {rank} has another layer than rank {exchange.rank}: {spec}")


class _Pairs(NamedTuple):
    """A rank's pairs of token and expert. rows : of the tokens that go along, of each pair."""

    tokens: np.ndarray
    rows: np.ndarray
    experts: np.ndarray


class ParallelMoE:
    """One layer's experts over the ranks of an ``Exchange``; ``forward`` is a collective call.

    Parameters
    ----------
    experts : StoredExperts or ExpertStore
        Those that this rank has; the others absent. An expert may be on several ranks: tokens take
        their own rank's, else that of the next rank that has it.
    exchange : Exchange
        The same of every rank, for all layers.
    method, num_threads : as ``MoE`` takes them.
    tokens_per_round : int
        Tokens of a rank that are under way at a time.

    Making one is a collective call, too. Raises BackendError naming experts that no rank has,
    EngineError where another rank cannot load its experts or has another layer, and as ``MoE``.
    """

    def __init__(
        self,
        experts: StoredExperts | ExpertStore,
        exchange: Exchange,
        *,
        method: str = "auto",
        num_threads: int | None = None,
        tokens_per_round: int = TOKENS_PER_ROUND,
    ) -> None:
        with _telling_all(exchange):
            if tokens_per_round < 1:
                raise ValueError(f"tokens_per_round={tokens_per_round}: must be at least 1")
            self.moe = MoE(experts, method=method, num_threads=num_threads)
        self.exchange, self.tokens_per_round = exchange, tokens_per_round
        self.spec = self.moe.spec
        _agree(exchange, self.spec)
        self._experts = experts
        self._width = round_up(self.spec.hidden_size, PANEL)
        self.refresh()

    @classmethod
    def load(cls, path: Any, layer: int, exchange: Exchange, **options: Any) -> ParallelMoE:
        """One layer of a packed directory, of which each rank reads its ``shares``.

        options : as the constructor takes them. Raises CheckpointError too.
        """
        with _telling_all(exchange):
            count = read_layer(path, layer, experts=[0]).spec.num_experts
            own = shares(count, exchange.ranks)[exchange.rank]
            if not own:
                raise ValueError(
                    f"{count} experts do not go over {exchange.ranks} ranks: use fewer"
                )
            experts = read_layer(path, layer, experts=own)
        return cls(experts, exchange, **options)

    def refresh(self) -> None:
        """Learn anew where experts are; a collective call, after experts have moved.

        Raises BackendError naming experts that no rank has.
        """
        count, ranks = self.spec.num_experts, self.exchange.ranks
        own = np.tile(self._present().astype(np.int64), (ranks, 1))
        present = self.exchange.numbers(own) > 0  # (ranks, num_experts)
        missing = np.flatnonzero(~present.any(axis=0))
        if len(missing):
            named = ", ".join(map(str, missing))
            raise BackendError(f"experts {named} of {count} are on none of {ranks} ranks")
        nearest = np.roll(present, -self.exchange.rank, axis=0).argmax(axis=0)
        self._owner = (nearest + self.exchange.rank) % ranks

    def _present(self) -> np.ndarray:
        if isinstance(self._experts, ExpertStore):
            return self._experts.present
        order = self._experts.order
        return np.ones(self.spec.num_experts, np.bool_) if order is None else order >= 0

    def forward(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        skip: Any = None,
        add: Any = None,
    ) -> Any:
        """As ``MoE.forward``, of this rank's own tokens; every rank calls it, without tokens too.

        Raises as ``MoE.forward``; EngineError on all other ranks if one refuses its input or
        cannot run its experts, and where a rank is lost (``Exchange``).
        """
        try:
            hidden = as_hidden(hidden_states, self.spec.hidden_size)
            ids, weights = as_routing(topk_ids, topk_weights, len(hidden))
            mask = as_mask(skip, self.spec.num_experts)
            partial = as_add(add, hidden.shape)
        except Exception:
            self._tell_failure()
            raise
        result, out = new_like(hidden_states, hidden.shape)
        live = (ids >= 0) & (ids < self.spec.num_experts)
        if mask is not None:
            live &= ~mask[np.where(live, ids, 0)]
        first, more = 0, True
        while more:
            rows = slice(first, first + self.tokens_per_round)
            first += self.tokens_per_round
            plus = None if partial is None else partial[rows]
            given = hidden[rows], ids[rows], weights[rows], live[rows]
            more = self._round(*given, plus, out[rows], first < len(hidden))
        return result

    __call__ = forward

    def _tell_failure(self) -> None:
        told = np.zeros((self.exchange.ranks, 3), np.int64)
        told[:, 2] = _FAILED
        self.exchange.numbers(told)

    def _round(
        self,
        hidden: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        live: np.ndarray,
        add: np.ndarray | None,
        out: np.ndarray,
        has_more: bool,
    ) -> bool:
        """Whether any rank has tokens left."""
        token, slot = np.nonzero(live)
        expert = ids[token, slot]
        owner = self._owner[expert]
        order = np.argsort(owner, kind="stable")
        to_ranks = [self._pairs(token[of], expert[of]) for of in self._by_rank(order, owner)]
        told = [(len(p.tokens), len(p.rows), _MORE * has_more) for p in to_ranks]
        came = self.exchange.numbers(np.array(told, np.int64))
        failed = np.flatnonzero(came[:, 2] & _FAILED)
        if len(failed):
            raise EngineError(
                f"rank {failed[0]} could not take part in this call: see its own error"
            )
        outputs = self._outputs(hidden, to_ranks, came)
        place = np.full(ids.shape, -1, np.int32)
        place[token[order], slot[order]] = np.arange(len(order), dtype=np.int32)
        self.moe.runner.combine(outputs, place, np.ascontiguousarray(weights), add, out)
        return bool((came[:, 2] & _MORE).any())

    def _by_rank(self, order: np.ndarray, owner: np.ndarray) -> list[np.ndarray]:
        """Of pairs in this order those of each rank."""
        ends = np.searchsorted(owner[order], np.arange(1, self.exchange.ranks))
        return np.split(order, ends)

    def _pairs(self, token: np.ndarray, expert: np.ndarray) -> _Pairs:
        tokens, rows = np.unique(token, return_inverse=True)
        return _Pairs(tokens, rows.astype(np.int32), expert.astype(np.int32))

    def _outputs(self, hidden: np.ndarray, to_ranks: list[_Pairs], came: np.ndarray) -> np.ndarray:
        """float32 (pairs, padded hidden_size), this rank's pairs in the order of ``to_ranks``."""
        row_bytes = hidden.itemsize * self.spec.hidden_size
        sent = [self._message(hidden, pairs) for pairs in to_ranks]
        sizes = [int(n * row_bytes + 8 * pairs) for n, pairs, _ in came]
        taken = self.exchange.swap(sent, sizes)
        error: Exception | None = None
        try:
            made = self._run(taken, came, hidden.dtype)
        except Exception as raised:  # the others wait for an answer
            error, made = (
                raised,
                [np.zeros((pairs, self._width), np.float32) for pairs in came[:, 1]],
            )
        # Before each rank's outputs: whether they are some.
        head = np.array([error is not None], np.float32).view(np.uint8)
        answers = [np.concatenate([head, rows.view(np.uint8).reshape(-1)]) for rows in made]
        wanted = [4 + 4 * self._width * len(pairs.rows) for pairs in to_ranks]
        answered = self.exchange.swap(answers, wanted)
        if error is not None:
            raise error
        failed = [rank for rank, answer in enumerate(answered) if answer[:4].view(np.float32)[0]]
        if failed:
            raise EngineError(f"rank {failed[0]} could not run its experts: see its own error")
        rows = np.concatenate([answer[4:] for answer in answered])
        return rows.view(np.float32).reshape(-1, self._width)

    def _message(self, hidden: np.ndarray, pairs: _Pairs) -> np.ndarray:
        """uint8: tokens' hidden states, then rows and experts of the pairs."""
        fields = (hidden[pairs.tokens], pairs.rows, pairs.experts)
        return np.concatenate([np.ascontiguousarray(f).view(np.uint8).reshape(-1) for f in fields])

    def _run(self, taken: list[np.ndarray], came: np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
        """Outputs of every rank's pairs, float32 (pairs, padded hidden_size); all in one call, so
        that an expert is read once.
        """
        width = self.spec.hidden_size
        hidden, experts = [], []
        for message, (tokens, pairs, _) in zip(taken, came, strict=True):
            end = int(tokens) * width * dtype.itemsize
            rows, of = message[end:].view(np.int32).reshape(2, int(pairs))
            states = np.ascontiguousarray(message[:end]).view(dtype).reshape(int(tokens), width)
            hidden.append(to_f32(states)[rows])
            experts.append(of)
        x, chosen = np.concatenate(hidden), np.concatenate(experts).astype(np.int64)[:, None]
        y = np.zeros((len(x), self._width), np.float32)
        out = y if self._width == width else np.empty((len(x), width), np.float32)
        self.moe.run(Operands(x, chosen, np.ones(chosen.shape, np.float32), None, out))
        y[:, :width] = out
        return np.split(y, np.cumsum(came[:, 1])[:-1])
