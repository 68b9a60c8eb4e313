"""``Slots`` whose experts native calls bring, too, without Python (``_cy/kernels/arrivals.c``).

What those did is written down later, in its order, and they are offered slots before they need
them. An expert that is offered to leave is in memory until a call takes its slot; a call that uses
it keeps it. So native calls wait for no policy, and who leaves is who it chose a little before.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ktk._cy import native_module
from ktk.placement.residency.shared_lock import SharedLock
from ktk.placement.residency.slots import Slots
from ktk.placement.residency.states import ExpertState, SlotState

MOST_OFFERED = 48  # slots; a token of 12 layers misses up to 30 experts with a quarter in memory
OFFERED_SHARE = 8  # one slot of so many is offered: who is has left the policy's order


class NativeSlots(Slots):
    """``Slots`` whose experts native calls bring, too, once ``bring_natively`` allows it."""

    _on_looks_ahead: list[Callable[[bool], None]]
    _failed: list[int]  # whose native read failed; Python is to read them
    _unwanted: list[int]  # lost, and their last reader has gone

    def bring_natively(
        self, experts: Sequence[Any], on_looks_ahead: Sequence[Callable[[bool], None]] = ()
    ) -> None:
        """Let decoder layers bring experts without Python, where that can be: the reader's files
        are read past the page cache, and the policy needs no more than who was used.

        experts : of each layer the native experts that run them, alone. Before any call.
        on_looks_ahead : told whether reading ahead pays, as native calls cannot ask.
        """
        files, module = self.reader.files(), native_module()
        listened = all(store.num_listeners == 1 for store in self._stores)
        if files is None or not listened or self.wants_scores or not self._pools.is_one:
            return
        if module is None or not all(isinstance(own, module.Experts) for own in experts):
            return
        arrivals = module.Arrivals(
            len(self._stores), self.num_experts, self._memory, self._num_readers
        )
        for layer, (own, (fd, first)) in enumerate(zip(experts, files, strict=True)):
            store = self._stores[layer]
            arrivals.follow(layer, own, store.offsets, fd, first, store.span_bytes)
        for key, standing in enumerate(self._standing):
            arrivals.standing[key] = standing
        self._on_looks_ahead, self._failed, self._unwanted = list(on_looks_ahead), [], []
        self._standing, self.arrivals = arrivals.standing, arrivals
        lock: Any = SharedLock(arrivals, self._settle)
        self._changed = threading.Condition(lock)
        self._start_native()
        weakref.finalize(self, arrivals.stop)
        arrivals.turn(True)

    def close(self) -> None:
        if self.arrivals is not None:
            self.arrivals.stop()
        super().close()

    def pause(self) -> None:
        if self.arrivals is not None:
            with self._changed:
                self.arrivals.turn(False)
        super().pause()

    def resume(self) -> None:
        if self.arrivals is not None:
            self.arrivals.turn(True)
        super().resume()

    def keep_books(self) -> None:
        """By a thread of its own: write down what native calls did, and offer slots to them."""
        with self._changed:
            if self._is_paused:
                return
            self._offer()
            failed, self._failed = self._failed, []
        for key in failed:
            layer = key // self.num_experts
            span = self._memory[self._slot_of[key], : self._stores[layer].span_bytes]
            self._reads.want(functools.partial(self._load, key, span))
        self._forget_useless()

    def _start_threads(self) -> None:
        super()._start_threads()
        if self.arrivals is not None:
            self._start_native()

    def _start_native(self) -> None:
        self.arrivals.start()
        arguments = self.arrivals, weakref.ref(self)
        name = "ktk-expert-books"
        threading.Thread(target=_keep_books, args=arguments, name=name, daemon=True).start()

    def _hurry(self, key: int) -> None:
        if self.arrivals is not None:
            with self._changed:
                self.arrivals.hurry(key)
        super()._hurry(key)

    def _arrived(self, key: int, num_bytes: int) -> None:
        super()._arrived(key, num_bytes)
        if self.arrivals is not None:
            self.arrivals.checked[key] = 1  # the reader has looked at it, now or before

    def _settle(self) -> None:
        """Each time the lock has been taken: write down what native calls did."""
        events = self.arrivals.events()
        if not events:
            return
        for what, words in events:
            getattr(self, f"_was_{what}")(*words)
        for key in self._unwanted:
            layer, expert = divmod(key, self.num_experts)
            self._stores[layer].place(expert, None, is_unused=True)
            self._dropped(key)
        self._unwanted.clear()
        looks_ahead = self.looks_ahead
        for turn in self._on_looks_ahead:
            turn(looks_ahead)
        self._changed.notify_all()

    # --- offers ---

    def _offer(self) -> None:
        """Slots for native calls, before they need them."""
        many = min(MOST_OFFERED, -(-self.capacity // OFFERED_SHARE))
        for _ in range(many - self.arrivals.num_offered):
            if self._free:
                self.arrivals.offer(-1, self._free.pop())
                continue
            try:
                key = self._pools.retire(lambda key: not self._is_idle(key))
            except LookupError:
                return
            self._idle[key // self.num_experts] -= 1
            self._offered.add(key)
            self.arrivals.offer(key, self._slot_of[key])

    def _keep(self, keys: Iterable[int]) -> None:
        """A call uses them: they are offered no more."""
        for key in self._offered.intersection(keys):
            self.arrivals.keep(key)
            self._was_saved(key)

    def _take_back(self) -> int | None:
        key, slot = self.arrivals.take()
        if key < 0:
            self._free.append(slot)
            return None
        self._end_offer(key)
        return int(key)

    def _end_offer(self, key: int) -> None:
        self._offered.discard(key)
        self._idle[key // self.num_experts] += self._is_idle(key)

    # --- events ---

    def _was_brought(self, layer: int, *given: int) -> None:
        keys = list(given)
        cold = sum(self._experts[key] is ExpertState.COLD for key in keys)
        coming = sum(self._experts[key] is ExpertState.PREFETCHING for key in keys)
        self._count(layer, keys, cold, coming)
        if not self._is_whole:
            self._pools.begin(layer, keys, None)
            here = [key for key in keys if self._experts[key] is not ExpertState.COLD]
            self._pools.hit_all(layer, here)
        self._add_readers(keys, 1)

    def _was_released(self, *keys: int) -> None:
        self._add_readers(list(keys), -1)
        if self._lost:
            self._unwanted += [k for k in keys if k in self._lost and not self._readers[k]]

    def _was_came(self, key: int) -> None:
        self._arrived(key, self._stores[key // self.num_experts].span_bytes)

    def _was_failed(self, key: int) -> None:
        self._failed.append(key)
        self._standing[key] = self.arrivals.OTHERS

    def _was_claimed(self, key: int, slot: int, victim: int) -> None:
        if victim >= 0:
            self._end_offer(victim)
            del self._slot_of[victim]
            self._step(victim, ExpertState.DEMOTING)
            self._step(victim, ExpertState.COLD)
            self._foretold.discard(victim)
            self._counters.evictions += 1
            self._note_place(victim, None)
        self._pools.enter(key)
        self._slot_of[key] = slot
        self._step_slot(slot, SlotState.LOADING)
        self._step(key, ExpertState.PREFETCHING)
        self._standing[key] = self.arrivals.OURS
        self._in_flight += 1
        self._note_place(key, slot)

    def _was_foretold(self, key: int, slot: int, victim: int) -> None:
        self._was_claimed(key, slot, victim)
        self._counters.prefetches += 1
        self._foretold.add(key)

    def _was_saved(self, key: int) -> None:
        self._end_offer(key)
        self._pools.enter(key)

    def _was_cancelled(self, key: int, slot: int) -> None:
        self._lost[key] = None
        self._dropped(key)
        self._free.remove(slot)  # it is offered
        self._counters.cancelled += 1
        self._note_place(key, None)

    def _note_place(self, key: int, slot: int | None) -> None:
        layer, expert = divmod(key, self.num_experts)
        store = self._stores[layer]
        store.follow(expert, None if slot is None else self._memory[slot, : store.span_bytes])


def _keep_books(arrivals: Any, of: weakref.ref[NativeSlots]) -> None:
    """Until nobody has the slots any more."""
    while arrivals.wait():
        slots = of()
        if slots is None:
            return
        slots.keep_books()
        del slots
