"""How far a model's next-token distributions are from another's: KL divergence, top-1 agreement."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ROWS = 64  # positions whose float64 distributions are in memory at once


@torch.no_grad()
def window_logits(model: Any, window: list[int]) -> torch.Tensor:
    """float32 (tokens, vocabulary)."""
    logits: torch.Tensor = model(torch.tensor([window]), use_cache=False).logits[0]
    return logits.float()


@dataclass(frozen=True)
class Distance:
    """Of a model's next-token distributions from the reference's.

    kl, kl_p99 : Kullback-Leibler divergence per token in nats, the mean and the 99th percentile.
    top1 : share of tokens, 0..1, where both have the same likeliest one. perplexity : of the text;
        NaN where windows have one token only.
    """

    kl: float
    kl_p99: float
    top1: float
    perplexity: float
    num_tokens: int


def distance(model: Any, windows: list[list[int]], reference: Sequence[torch.Tensor]) -> Distance:
    """Compare with the reference's logits, float32 (tokens, vocabulary) for each window."""
    divergences: list[torch.Tensor] = []
    same, loss, predicted = 0, 0.0, 0
    for window, logits in zip(windows, reference, strict=True):
        got = window_logits(model, window)
        after = torch.tensor(window[1:])
        for start in range(0, len(window), _ROWS):
            rows = slice(start, start + _ROWS)
            p = torch.log_softmax(logits[rows].double(), dim=-1)  # (rows, vocabulary)
            q = torch.log_softmax(got[rows].double(), dim=-1)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            targets = after[rows]
            loss -= float(q[: len(targets)].gather(1, targets[:, None]).sum())
            predicted += len(targets)
            q.sub_(p).mul_(p.exp())
            divergences.append(-q.sum(-1))
    kl = torch.cat(divergences)
    return Distance(
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1=same / len(kl),
        perplexity=math.exp(loss / predicted) if predicted else math.nan,
        num_tokens=len(kl),
    )


class StoredLogits(Sequence[torch.Tensor]):
    """The reference's logits in a temporary file, deleted by ``close``:
    memory holds one window at a time.
    """

    def __init__(self, model: Any, windows: list[list[int]]) -> None:
        self._lengths = [len(window) for window in windows]
        self._folder = tempfile.TemporaryDirectory(prefix="ktk-eval-")
        self._path = Path(self._folder.name) / "logits"
        with open(self._path, "wb") as file:
            for window in windows:
                logits = window_logits(model, window)
                self.vocabulary = logits.shape[1]
                logits.numpy().tofile(file)

    def close(self) -> None:
        self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        rows = self._lengths[index]  # IndexError ends an iteration
        offset = 4 * self.vocabulary * sum(self._lengths[:index])
        values = np.fromfile(self._path, np.float32, rows * self.vocabulary, offset=offset)
        return torch.from_numpy(values.reshape(rows, self.vocabulary))
