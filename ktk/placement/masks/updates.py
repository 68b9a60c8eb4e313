"""Which experts of a layer a device should hold next, from what its tokens ask for.

``PrefillUpdate`` is SGLang's --kt-enable-dynamic-expert-update: a long prompt puts its own most
used experts on the device. ``OnlineUpdate`` goes with the text: counts that fade, few swaps a call,
and only such as are worth it. A layer has its own; the number of its experts there stays.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from ktk.fork import Lock
from ktk.placement.masks.strategies import first_of_most

DEFAULT_THRESHOLD = 512  # tokens of a prompt that is worth a recount


class Update(Protocol):
    def wanted(self, topk_ids: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
        """The mask to swap to after a call, None to leave things as they are.

        topk_ids : int64 (num_tokens, top_k) of the call; what is no expert's number is left out.
        mask : bool (num_experts,), of now.
        """


class PrefillUpdate:
    """The experts that a prompt of ``threshold`` tokens or more uses most, of equals the first.

    ValueError for a threshold below 1.
    """

    def __init__(self, threshold: int = DEFAULT_THRESHOLD) -> None:
        if threshold < 1:
            raise ValueError(f"threshold={threshold}: must be at least 1 token")
        self.threshold = threshold

    def wanted(self, topk_ids: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
        if len(topk_ids) < self.threshold:
            return None
        return first_of_most(_counts(topk_ids, len(mask)), int(mask.sum()))


class OnlineUpdate:
    """After each call, the experts on the CPU that fading counts rank above some on the device.

    Parameters
    ----------
    half_life : float
        Calls of the layer after which a use counts half.
    budget : int
        Swaps after a call, at most.
    hysteresis : float
        Another expert comes for one there if its count is more than 1 + hysteresis times that one's
        and one use above it: so two of equal use do not take turns.

    Raises ValueError if one is out of range. Safe to use from several threads.
    """

    def __init__(self, half_life: float = 256.0, budget: int = 1, hysteresis: float = 0.25) -> None:
        if not (math.isfinite(half_life) and half_life > 0):
            raise ValueError(f"half_life={half_life}: must be above 0 calls")
        if budget < 1:
            raise ValueError(f"budget={budget}: must be at least 1 swap")
        if not (math.isfinite(hysteresis) and hysteresis >= 0):
            raise ValueError(f"hysteresis={hysteresis}: must be at least 0")
        self.half_life, self.budget, self.hysteresis = half_life, budget, hysteresis
        self._decay = 0.5 ** (1.0 / half_life)
        self._lock = Lock()
        self._counts: np.ndarray | None = None

    def wanted(self, topk_ids: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
        found = self.after(_counts(topk_ids, len(mask))[None], mask[None])[0]
        return None if np.array_equal(found, mask) else found

    def after(self, counts: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """The masks after a call of each of several layers, of the same ones each time.

        counts : (layers, num_experts), of the calls. masks : bool (layers, num_experts), of now.
        """
        with self._lock:
            before = 0.0 if self._counts is None else self._counts * self._decay
            self._counts = total = before + counts
        leaving = np.argsort(np.where(masks, total, np.inf), axis=1, kind="stable")
        entering = np.argsort(np.where(masks, np.inf, -total), axis=1, kind="stable")
        leaving, entering = leaving[:, : self.budget], entering[:, : self.budget]
        # The i-th hottest of the CPU for the i-th coldest of the device.
        rows = np.arange(len(masks))[:, None]
        cold, hot = total[rows, leaving], total[rows, entering]
        is_pair = masks[rows, leaving] & ~masks[rows, entering]
        is_worth = is_pair & (hot > np.maximum(cold * (1 + self.hysteresis), cold + 1))
        found = masks.copy()
        at = np.nonzero(is_worth)
        found[at[0], leaving[at]] = False
        found[at[0], entering[at]] = True
        return found


def update_of(text: str) -> PrefillUpdate | OnlineUpdate:
    """A new one, from "prefill", "prefill:1024" (tokens) or "online". ValueError for other text."""
    name, _, number = text.partition(":")
    if name == "prefill" and (not number or number.isdecimal()):
        return PrefillUpdate(int(number)) if number else PrefillUpdate()
    if text == "online":
        return OnlineUpdate()
    raise ValueError(
        f"update {text!r}: must be prefill, prefill:1024 (tokens of a prompt, at least) or online"
    )


def _counts(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """int64 (num_experts,): tokens that go to each."""
    valid = topk_ids[(topk_ids >= 0) & (topk_ids < num_experts)]
    return np.bincount(valid, minlength=num_experts)
