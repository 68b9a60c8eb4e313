"""Who a device should hold next: prompts' own experts, or with counts that fade."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from ktk.placement.masks.updates import OnlineUpdate, PrefillUpdate, update_of

EXPERTS = 6


def mask_of(*experts: int) -> np.ndarray:
    return np.isin(np.arange(EXPERTS), experts)


def ids_of(*experts: int) -> np.ndarray:
    return np.array(experts, np.int64)[:, None]


def test_a_long_prompt_has_its_own_most_used_and_a_short_one_changes_nothing() -> None:
    update, ids = PrefillUpdate(6), ids_of(4, 4, 4, 2, 2, 0, 1, -1, 99)
    assert update.wanted(ids[:5], mask_of(0, 1)) is None
    assert np.array_equal(update.wanted(ids, mask_of(0, 1)), mask_of(2, 4))
    assert np.array_equal(update.wanted(ids, mask_of(0)), mask_of(4))
    of_equals = update.wanted(ids_of(5, 5, 3, 3, 1, 1), mask_of(0, 2))
    assert np.array_equal(of_equals, mask_of(1, 3))
    assert not update.wanted(ids, mask_of()).any()


def swaps(before: np.ndarray, after: np.ndarray | None) -> int:
    return 0 if after is None else int((after & ~before).sum())


def test_an_online_update_keeps_its_budget_and_the_number_of_experts() -> None:
    rng = np.random.default_rng(0)
    for budget in (1, 2, 9):
        update, mask = OnlineUpdate(4, budget, 0.0), mask_of(0, 1, 2)
        made = 0
        for _ in range(200):
            after = update.wanted(rng.integers(0, EXPERTS, (3, 2)), mask)
            assert swaps(mask, after) <= min(budget, 3)
            made += swaps(mask, after)
            mask = mask if after is None else after
            assert mask.sum() == 3
        assert made > 10


def test_an_online_update_follows_a_text_that_changes() -> None:
    update, mask = OnlineUpdate(8, 1, 0.25), mask_of(0, 1)
    for liked in ((2, 3), (4, 5)):
        for _ in range(40):
            after = update.wanted(np.array([liked]), mask)
            mask = mask if after is None else after
        assert np.array_equal(mask, mask_of(*liked))


def test_experts_of_equal_use_do_not_take_turns() -> None:
    """0 is there, 1 is not, and tokens go to one after the other; without hysteresis and the one
    use above they would change places again and again.
    """
    update, mask, made = OnlineUpdate(64, 1, 0.25), mask_of(0), 0
    for step in range(400):
        after = update.wanted(ids_of(step % 2), mask)
        made += swaps(mask, after)
        mask = mask if after is None else after
    assert made <= 1


def test_full_and_empty_devices_change_nothing() -> None:
    update = OnlineUpdate(8, 2, 0.0)
    for mask in (mask_of(), mask_of(*range(EXPERTS))):
        for _ in range(5):
            assert update.wanted(ids_of(1, 1, 1), mask) is None


def test_several_layers_at_once_are_each_by_itself() -> None:
    rng = np.random.default_rng(2)
    masks = rng.random((4, EXPERTS)) < [[0.0], [0.3], [0.6], [1.0]]
    together, each = OnlineUpdate(4, 2, 0.1), [OnlineUpdate(4, 2, 0.1) for _ in masks]
    apart = masks.copy()
    for _ in range(60):
        ids = rng.integers(0, EXPERTS, (len(masks), 3, 2))
        counts = np.stack([np.bincount(i.reshape(-1), minlength=EXPERTS) for i in ids])
        masks = together.after(counts, masks)
        for layer, update in enumerate(each):
            wanted = update.wanted(ids[layer], apart[layer])
            apart[layer] = apart[layer] if wanted is None else wanted
        assert np.array_equal(masks, apart)


def test_counts_of_several_threads_all_count() -> None:
    update = OnlineUpdate(1e9, 1, 0.0)

    def work() -> None:
        for _ in range(500):
            update.wanted(ids_of(1), mask_of())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert update._counts is not None
    assert round(update._counts[0, 1]) == 2000


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PrefillUpdate(0), "threshold=0: must be at least 1"),
        (lambda: OnlineUpdate(half_life=0), "half_life=0: must be above 0"),
        (lambda: OnlineUpdate(half_life=float("nan")), "half_life=nan"),
        (lambda: OnlineUpdate(budget=0), "budget=0: must be at least 1"),
        (lambda: OnlineUpdate(hysteresis=-1), "hysteresis=-1: must be at least 0"),
        (lambda: update_of("prefill:many"), "update 'prefill:many': must be prefill, prefill:1024"),
        (lambda: update_of("sometimes"), "update 'sometimes'"),
        (lambda: update_of("online:3"), "update 'online:3'"),
        (lambda: update_of("prefill:0"), "threshold=0"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_updates_have_names() -> None:
    found = update_of("prefill:77")
    assert isinstance(found, PrefillUpdate) and found.threshold == 77
    assert isinstance(update_of("prefill"), PrefillUpdate)
    assert isinstance(update_of("online"), OnlineUpdate)
