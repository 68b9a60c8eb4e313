"""The mask with which a step is expected to be shortest, given what experts cost (``costs``).

A layer whose m most costly experts are on the GPU, and whose CPU side still is the slower one, has
no better m: no other m take as much off the CPU. Where the GPU would be the slower side, the m
must balance both. Taking the most costly that still fit comes near. If that is not near enough,
there is a search: experts in turn, each on the GPU or not, and of those choices that agree in
number only ones that no other betters on both sides. Then layers share the room: F(n) = min over m
of F of the layers before, with n - m, + the layer with m.

A search that grows beyond ``most_choices`` keeps the best of each small range of GPU time. Its
result is then no longer proven; ``Placement.bound`` says what no mask can be below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktk.placement.masks.costs import Costs, Demand, step_seconds

_WEIGHTS = np.linspace(0, 1, 33)  # of the CPU side in bounds, beside those of the experts


@dataclass(frozen=True)
class Placement:
    """masks : bool (layers, num_experts). seconds : of a step with them. bound : seconds that no
    masks with as many experts on the GPU are below.
    """

    masks: np.ndarray
    seconds: float
    bound: float


def optimal_masks(
    demand: Demand,
    costs: Costs,
    number: int,
    tolerance: float = 1e-3,
    most_choices: int = 2000,
) -> Placement:
    """The masks of least ``step_seconds`` with at most ``number`` experts on the GPU.

    tolerance : a step that is known to be so near the least time, relatively, is good enough; 0
    searches on until it is the least. ValueError if number or tolerance is negative.
    """
    if number < 0 or tolerance < 0:
        raise ValueError(f"number={number}, tolerance={tolerance}: must not be negative")
    cpu, gpu = demand.cpu_seconds(costs), demand.gpu_seconds(costs)
    most = min(number, cpu.shape[1])
    layers = [_Layer(*row, costs.transfer, most) for row in zip(cpu, gpu, strict=True)]
    shares, seconds = _shared([layer.seconds for layer in layers], number)
    _, bound = _shared([layer.bounds for layer in layers], number)
    if seconds > bound * (1 + tolerance):
        for layer in layers:
            layer.search(most_choices)
        shares, seconds = _shared([layer.seconds for layer in layers], number)
        _, bound = _shared([layer.bounds for layer in layers], number)
    masks = np.stack([layer.masks[m] for layer, m in zip(layers, shares, strict=True)])
    return Placement(masks, step_seconds(demand, masks, costs), bound + costs.rest)


def _shared(tables: list[np.ndarray], number: int) -> tuple[list[int], float]:
    """How many experts each layer gets, and the sum of their seconds.

    tables : of each layer (most + 1,), its seconds with so many at most.
    """
    room = min(number, sum(len(table) - 1 for table in tables))
    best = np.zeros(room + 1)
    choices = []
    for table in tables:
        total, choice = np.full(room + 1, np.inf), np.zeros(room + 1, np.int64)
        for m in range(min(len(table) - 1, room) + 1):
            with_m = best[: room + 1 - m] + table[m]
            better = np.flatnonzero(with_m < total[m:]) + m
            total[better], choice[better] = with_m[better - m], m
        best = total
        choices.append(choice)
    left, shares = room, []
    for choice in reversed(choices):
        shares.append(int(choice[left]))
        left -= shares[-1]
    return shares[::-1], float(best[room])


class _Layer:
    """cpu, gpu : seconds of each expert there.

    seconds, bounds : float64 (most + 1,), with so many experts on the GPU at most, what was found,
    and what cannot be bettered. masks : bool (most + 1, num_experts), of seconds.
    """

    def __init__(self, cpu: np.ndarray, gpu: np.ndarray, transfer: float, most: int) -> None:
        self.cpu, self.gpu, self.transfer, self.most = cpu, gpu, transfer, most
        self.order = np.lexsort((gpu, -cpu))
        self._take_largest()
        self._bound()
        self._fill()

    def _cpu_left(self, taken: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Seconds of the CPU side when experts of ``taken`` seconds are on the GPU."""
        left = np.maximum(self.cpu.sum() - taken, 0.0) + self.transfer
        return np.where(count == len(self.cpu), 0.0, left)

    def _take_largest(self) -> None:
        """The m most costly for the CPU, or fewer of them."""
        counts = np.arange(self.most + 1)
        largest = self.order[: self.most]
        taken = np.concatenate([[0.0], np.cumsum(self.cpu[largest])])
        made = np.concatenate([[0.0], np.cumsum(self.gpu[largest])])
        self._left = self._cpu_left(taken, counts)
        seconds = np.maximum(self._left, made)
        self.seconds = np.minimum.accumulate(seconds)
        self.masks = np.zeros((self.most + 1, len(self.cpu)), np.bool_)
        best = 0
        for m in range(self.most + 1):
            best = m if seconds[m] < seconds[best] else best
            self.masks[m, self.order[:best]] = True

    def _bound(self) -> None:
        """A weighted mean of both sides is below the slower one, for any weight; and the least mean
        is easy: each expert counts by itself. Nor is the CPU side ever below ``_left``.
        """
        self.bounds = np.minimum.accumulate(self._left)
        room = np.arange(self.most + 1)
        total, best = self.cpu.sum() + self.transfer, np.zeros(self.most + 1)
        # The least mean bends where an expert weighs the same on both sides.
        bends = self.gpu / np.where(self.cpu + self.gpu > 0, self.cpu + self.gpu, 1.0)
        for weight in np.unique(np.concatenate([_WEIGHTS, bends.round(9)])):
            gain = np.minimum(np.sort((1 - weight) * self.gpu - weight * self.cpu), 0.0)
            least = weight * total + np.concatenate([[0.0], np.cumsum(gain)])[room]
            best = np.maximum(best, least)
        if self.most == len(self.cpu):  # all on the GPU: no transfer, so not of this sum
            best[-1] = min(best[-1], self.gpu.sum())
        self.bounds = np.minimum(np.maximum(self.bounds, best), self.seconds)

    def _fill(self) -> None:
        """The most costly that leave the GPU as fast as the bound, for each m."""
        room = np.arange(self.most + 1)
        count, made = np.zeros_like(room), np.zeros(len(room))
        chosen = np.zeros_like(self.masks)
        for expert in self.order:
            fits = (count < room) & (made + self.gpu[expert] <= self.bounds * (1 + 1e-9))
            count += fits
            made += np.where(fits, self.gpu[expert], 0.0)
            chosen[fits, expert] = True
        self._take_better(count, chosen @ self.cpu, made, chosen)

    def _take_better(
        self, count: np.ndarray, taken: np.ndarray, made: np.ndarray, chosen: np.ndarray
    ) -> None:
        """Choices, of so many experts and seconds, where they are better than what was found."""
        seconds = np.maximum(self._cpu_left(taken, count), made)
        for place in np.argsort(seconds, kind="stable"):
            better = seconds[place] < self.seconds
            better[: count[place]] = False
            self.seconds[better] = seconds[place]
            self.masks[better] = chosen[place]

    def search(self, most_choices: int) -> None:
        """The choices that are left, all that can be better if they are not too many."""
        if np.array_equal(self.seconds, self.bounds):
            return
        experts = len(self.cpu)
        count = np.zeros(1, np.int64)
        taken, made = np.zeros(1), np.zeros(1)
        chosen = np.zeros((1, experts), np.bool_)
        is_proven = True
        for i, expert in enumerate(self.order):
            others = np.concatenate([[0.0], np.cumsum(self.cpu[self.order[i + 1 :]])])
            with_it = chosen.copy()
            with_it[:, expert] = True
            count = np.concatenate([count, count + 1])
            taken = np.concatenate([taken, taken + self.cpu[expert]])
            made = np.concatenate([made, made + self.gpu[expert]])
            chosen = np.concatenate([chosen, with_it])
            kept = np.flatnonzero(count <= min(self.most, experts - 1))
            # What the CPU still has if all room left goes to the largest that come.
            more = np.minimum(self.most - count[kept], len(others) - 1)
            least = self._cpu_left(taken[kept] + others[more], np.zeros(1, np.int64))
            limit = self.seconds[count[kept]]
            kept = kept[(made[kept] < limit) & (least < limit)]
            kept = kept[_unbettered(count[kept], taken[kept], made[kept])]
            if len(kept) > most_choices:
                is_proven = False
                kept = kept[_spread(count[kept], taken[kept], made[kept], most_choices)]
            count, taken, made, chosen = count[kept], taken[kept], made[kept], chosen[kept]
        self._take_better(count, taken, made, chosen)
        if is_proven:
            self.bounds = self.seconds.copy()


def _unbettered(count: np.ndarray, taken: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Indices of choices such that none of equal count takes as much off the CPU for less GPU
    time.
    """
    order = np.lexsort((-taken, made, count))
    found, last, most = [], -1, -1.0
    for place in order.tolist():
        if count[place] != last:
            last, most = int(count[place]), -1.0
        if taken[place] > most:
            most = float(taken[place])
            found.append(place)
    return np.array(found, np.int64)


def _spread(
    count: np.ndarray, taken: np.ndarray, made: np.ndarray, most_choices: int
) -> np.ndarray:
    """Indices: of each count and range of GPU time the choice that takes most off the CPU."""
    counts = np.unique(count)
    ranges = max(1, most_choices // len(counts))
    width = (made.max() - made.min()) / ranges or 1.0
    cell = np.minimum(((made - made.min()) / width).astype(np.int64), ranges - 1)
    key = count * ranges + cell
    order = np.lexsort((-taken, key))
    first = np.concatenate([[True], np.diff(key[order]) > 0])
    return order[first]
