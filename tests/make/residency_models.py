"""Residency policies again, small, slow and plainly as their papers put them: lists and histories.

The models choose among keys that are not blocked as if the blocked were not there.
"""

from __future__ import annotations

from collections.abc import Iterable

CALL = tuple[int, list[int], dict[int, float]]  # layer, keys, router's score of each key


def share(capacity: int, part: float) -> int:
    return max(1, round(part * capacity))


class Model:
    """A pool: who is in memory, and the whole history."""

    def __init__(self, capacity: int, num_layers: int, num_experts: int) -> None:
        self.capacity, self.num_layers, self.num_experts = capacity, num_layers, num_experts
        self.resident: set[int] = set()
        self.history: list[CALL] = []
        self.start()

    def start(self) -> None:
        """What the policy keeps."""

    def hit(self, key: int) -> None: ...

    def insert(self, key: int) -> None: ...

    def victim(self, free: set[int]) -> int:
        raise NotImplementedError

    def call(self, layer: int, keys: list[int], scores: dict[int, float]) -> int:
        """Returns the hits."""
        self.history.append((layer, keys, scores))
        present = [key for key in keys if key in self.resident]
        for key in present:
            self.hit(key)
        for key in keys:
            if key in present:
                continue
            if len(self.resident) == self.capacity:
                self.resident.remove(self.victim(self.resident - set(keys)))
            self.insert(key)
            self.resident.add(key)
        return len(present)


class Stamped(Model):
    """Knows when each key was last used."""

    def start(self) -> None:
        self.clock = 0
        self.used: dict[int, int] = {}

    def hit(self, key: int) -> None:
        self.clock += 1
        self.used[key] = self.clock

    insert = hit


class Lru(Stamped):
    def victim(self, free: set[int]) -> int:
        return min(free, key=self.used.__getitem__)


def first(queue: Iterable[int], free: set[int]) -> int | None:
    return next((key for key in queue if key in free), None)


class TwoQueues(Model):
    def start(self) -> None:
        self.a1_in: list[int] = []  # oldest first, as all lists here
        self.a1_out: list[int] = []
        self.am: list[int] = []

    def hit(self, key: int) -> None:
        if key in self.am:
            self.am.remove(key)
            self.am.append(key)

    def insert(self, key: int) -> None:
        if key in self.a1_out:
            self.a1_out.remove(key)
            self.am.append(key)
        else:
            self.a1_in.append(key)

    def victim(self, free: set[int]) -> int:
        from_in, from_main = first(self.a1_in, free), first(self.am, free)
        wants_in = len(self.a1_in) > share(self.capacity, 0.25) or not self.am
        if from_in is not None and (wants_in or from_main is None):
            self.a1_in.remove(from_in)
            self.a1_out = [*self.a1_out, from_in][-share(self.capacity, 0.5) :]
            return from_in
        assert from_main is not None
        self.am.remove(from_main)
        return from_main


class Slru(Model):
    def start(self) -> None:
        self.probation: list[int] = []
        self.protected: list[int] = []
        self.most = share(self.capacity, 0.8)

    def hit(self, key: int) -> None:
        (self.probation if key in self.probation else self.protected).remove(key)
        self.protected.append(key)
        if len(self.protected) > self.most:
            self.probation.append(self.protected.pop(0))

    def insert(self, key: int) -> None:
        self.probation.append(key)

    def peek(self, free: set[int]) -> int | None:
        return first([*self.probation, *self.protected], free)

    def leave(self, key: int) -> None:
        (self.probation if key in self.probation else self.protected).remove(key)

    def victim(self, free: set[int]) -> int:
        key = self.peek(free)
        assert key is not None
        self.leave(key)
        return key


class Sieve(Model):
    def start(self) -> None:
        self.queue: list[int] = []  # tail first
        self.visited: set[int] = set()
        self.hand = 0  # place in the queue

    def hit(self, key: int) -> None:
        self.visited.add(key)

    def insert(self, key: int) -> None:
        self.queue.append(key)

    def victim(self, free: set[int]) -> int:
        while True:
            if self.hand >= len(self.queue):
                self.hand = 0
            key = self.queue[self.hand]
            if key in free and key not in self.visited:
                self.queue.pop(self.hand)
                if self.hand == len(self.queue):  # the head left: begin at the tail
                    self.hand = 0
                return key
            if key in free:
                self.visited.remove(key)
            self.hand += 1
            if self.hand == len(self.queue):
                self.hand = 0


class S3Fifo(Model):
    def start(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.freq: dict[int, int] = {}

    def hit(self, key: int) -> None:
        self.freq[key] = min(3, self.freq[key] + 1)

    def insert(self, key: int) -> None:
        self.freq[key] = 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def victim(self, free: set[int]) -> int:
        while True:
            from_small, from_main = first(self.small, free), first(self.main, free)
            wants_small = len(self.small) >= share(self.capacity, 0.1) or not self.main
            if from_small is not None and (wants_small or from_main is None):
                self.small.remove(from_small)
                if self.freq[from_small] < 2:
                    self.ghosts = [*self.ghosts, from_small][-self.capacity :]
                    return from_small
                self.freq[from_small] = 0
                self.main.append(from_small)
                continue
            assert from_main is not None
            self.main.remove(from_main)
            if self.freq[from_main] == 0:
                return from_main
            self.freq[from_main] -= 1
            self.main.append(from_main)


class WTinyLfu(Model):
    def start(self) -> None:
        self.most_window = share(self.capacity, 0.1)
        self.window: list[int] = []
        self.main = Slru(max(1, self.capacity - self.most_window), 1, 1)
        self.uses: list[int] = []

    def frequency(self, key: int) -> int:
        """Halved after every thousand uses: from the history of all."""
        count = 0
        for index, used in enumerate(self.uses, 1):
            count += used == key
            if index % 1000 == 0:
                count //= 2
        return count

    def hit(self, key: int) -> None:
        self.uses.append(key)
        if key in self.window:
            self.window.remove(key)
            self.window.append(key)
        else:
            self.main.hit(key)

    def insert(self, key: int) -> None:
        self.uses.append(key)
        if len(self.window) >= self.most_window:
            self.main.insert(self.window.pop(0))
        self.window.append(key)

    def victim(self, free: set[int]) -> int:
        candidate, victim = first(self.window, free), self.main.peek(free)
        is_full = len(self.window) >= self.most_window
        if victim is None:
            assert candidate is not None
            self.window.remove(candidate)
            return candidate
        if candidate is None or not is_full:
            self.main.leave(victim)
            return victim
        self.window.remove(candidate)
        if self.frequency(candidate) > self.frequency(victim):
            self.main.leave(victim)
            self.main.insert(candidate)
            return victim
        return candidate


class Baseline(Model):
    alpha = 0.01

    def start(self) -> None:
        self.turn = 0

    def average(self, key: int) -> float:
        calls = [keys for layer, keys, _ in self.history if layer == key // self.num_experts]
        average = 0.0
        for keys in calls:
            average = average * (1 - self.alpha) + (1 - (1 - self.alpha)) * (key in keys)
        return average

    def victim(self, free: set[int]) -> int:
        many = self.num_layers * self.num_experts
        chosen = min(free, key=lambda key: (self.average(key), (key - self.turn) % many))
        self.turn = chosen + 1
        return chosen


class Lrfu(Baseline):
    alpha = 0.2


class LeastStale(Stamped):
    def passes(self) -> list[int]:
        """Of each call."""
        found, now, before = [], 0, -1
        for layer, _, _ in self.history:
            now += layer <= before
            before = layer
            found.append(now)
        return found

    def victim(self, free: set[int]) -> int:
        passes, here = self.passes(), self.history[-1][0]

        def order(key: int) -> tuple[int, int, int]:
            last = max(i for i, (_, keys, _) in enumerate(self.history) if key in keys)
            ahead = (key // self.num_experts - here) % self.num_layers  # calls until its turn
            return passes[last], -ahead, self.used[key]

        return min(free, key=order)


class Heat(Stamped):
    def heats(self) -> dict[tuple[int, int], float]:
        experts, layers = range(self.num_experts), range(self.num_layers)
        average = {(at, e): 0.0 for at in layers for e in experts}
        token, prior = dict(average), dict(average)
        follows = {(at, i, j): 0.0 for at in layers for i in experts for j in experts}
        before: tuple[int, dict[int, float]] | None = None
        for layer, _, by_key in self.history:
            scores = {e: by_key.get(layer * self.num_experts + e, 0.0) for e in experts}
            total = sum(scores.values())
            for e in experts:
                at = layer, e
                token[at] = 0.7 * scores[e] + 0.3 * max(average[at], prior[at])
                average[at] = 0.5 * token[at] + 0.5 * average[at]
                prior[at] *= 0.3
            normal = {e: scores[e] / total if total else 0.0 for e in experts}
            if before is not None and before[0] == layer - 1:
                for i, weight in before[1].items():
                    for j in experts:
                        cell = layer - 1, i, j
                        follows[cell] += 0.5 * weight * (normal[j] - follows[cell])
            before = layer, normal
            if layer + 1 < self.num_layers:
                for j in experts:
                    prior[layer + 1, j] = sum(normal[i] * follows[layer, i, j] for i in experts)
        return {at: max(token[at], prior[at]) for at in token}

    def victim(self, free: set[int]) -> int:
        order, heats = sorted(self.resident, key=self.used.__getitem__), self.heats()

        def score(key: int) -> float:
            return order.index(key) / len(order) + heats[divmod(key, self.num_experts)]

        return min(sorted(free, key=order.index), key=score)


MODELS: dict[str, type[Model]] = {
    "lru": Lru,
    "2q": TwoQueues,
    "slru": Slru,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "w_tinylfu": WTinyLfu,
    "baseline": Baseline,
    "lrfu": Lrfu,
    "least-stale": LeastStale,
    "heat": Heat,
}


def fewest_misses(calls: list[list[int]], capacity: int) -> int:
    """Of any way to choose who leaves: all of them tried."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for keys in calls:
        used, after = frozenset(keys), dict[frozenset[int], int]()
        for state, misses in states.items():
            cost = misses + len(used - state)
            for kept in subsets(state - used, capacity - len(used)):
                result = used | kept
                after[result] = min(cost, after.get(result, cost))
        states = after
    return min(states.values())


def subsets(keys: frozenset[int], most: int) -> list[frozenset[int]]:
    """Who may stay: as many as fit. To keep fewer never helps."""
    if len(keys) <= most:
        return [keys]
    return [part for key in keys for part in subsets(keys - {key}, most)]
