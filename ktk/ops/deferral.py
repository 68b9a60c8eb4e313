"""Deferred experts: which a token leaves to the next layer, and how their sums get there."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from ktk import fork
from ktk.machine import queue as fifo


class Deferred(NamedTuple):
    """A pass's deferred sums, float32 (tokens, hidden_size), on their way.

    meant_for : layer_idx, tokens and hidden_size of the one submit that takes them.
    """

    meant_for: tuple[int, int, int]
    ticket: fifo.Ticket


class Sequence(threading.local):
    """Deferred experts of the calling thread's last submit: a thread is a sequence of layers."""

    deferred: Deferred | None = None


sequence = Sequence()


@fork.in_child
def _forget_deferred() -> None:
    """The thread that would compute it is not there."""
    sequence.deferred = None


def split(ids: np.ndarray, scores: np.ndarray, protected_k: int) -> tuple[np.ndarray, np.ndarray]:
    """See ``ktk.integration.kt_kernel.selection``; equal scores protect the earlier slot."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, : max(protected_k, 0)]
    now = np.isin(ids, np.take_along_axis(ids, best, axis=1))  # (num_tokens, top_k)
    return np.where(now, ids, -1), np.where(now, -1, ids)
