"""``Router``: how logits choose experts, and its NumPy reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SCORES = ("softmax", "sigmoid")
MAX_GROUPS = 256


@dataclass(frozen=True, eq=False)
class Router:
    """Scores of all experts, plus the correction for the choice alone; the best groups; of their
    experts the best.

    score : "softmax" or "sigmoid" of the logits. correction : float32 (num_experts,) or None.
    num_groups : equal groups of neighbouring experts, of which the top_groups with the largest sum
    of their best_of_group best stay in the choice.
    Weights are the chosen experts' scores, over their sum if is_normalised, times scale. Raises
    ValueError.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    is_normalised: bool = False
    scale: float = 1.0
    correction: np.ndarray | None = None
    num_groups: int = 1
    top_groups: int = 1
    best_of_group: int = 1

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r}: must be one of {', '.join(SCORES)}")
        if not 1 <= self.num_groups <= MAX_GROUPS or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups}: must divide {self.num_experts} experts, at most "
                f"{MAX_GROUPS}"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups}: must be 1..{self.num_groups}")
        left = self.num_experts // self.num_groups * self.top_groups
        if not 1 <= self.top_k <= left:
            raise ValueError(
                f"top_k={self.top_k}: must be 1..{left}, the experts of the groups chosen"
            )
        if self.best_of_group < 1:
            raise ValueError(f"best_of_group={self.best_of_group}: must be at least 1")
        if self.correction is not None:
            flat = np.ascontiguousarray(self.correction, np.float32)
            if flat.shape != (self.num_experts,):
                raise ValueError(
                    f"correction has shape {flat.shape}: must be ({self.num_experts},)"
                )
            object.__setattr__(self, "correction", flat)


def route(router: Router, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (tokens, num_experts) to int64 ids and float32 weights, (tokens, top_k),
    best first; of equals the first.
    """
    x = logits.astype(np.float64)
    if router.score == "sigmoid":
        scores = 1 / (1 + np.exp(-x))
    else:
        scores = np.exp(x - x.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    choice = scores if router.correction is None else scores + router.correction
    if router.top_groups < router.num_groups:
        grouped = choice.reshape(len(x), router.num_groups, -1)
        best = np.sort(grouped, axis=2)[:, :, ::-1][:, :, : router.best_of_group].sum(2)
        chosen = np.argsort(-best, axis=1, kind="stable")[:, : router.top_groups]
        is_left = np.zeros(best.shape, bool)
        np.put_along_axis(is_left, chosen, True, axis=1)
        choice = np.where(is_left[:, :, None], grouped, -np.inf).reshape(choice.shape)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : router.top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if router.is_normalised:
        weights = weights / weights.sum(1, keepdims=True)
    return ids.astype(np.int64), (weights * router.scale).astype(np.float32)
