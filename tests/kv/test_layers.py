"""``GrowingRows``: the rows that were cached stay, wherever the view of them was cut;
few copies, none of it written to before.
"""

from __future__ import annotations

import pytest
import torch

from ktk.kv.layers import LEAST_ROWS, GrowingRows


def test_rows_stay_and_seldom_move() -> None:
    rows, places = GrowingRows(), set()
    cached = torch.tensor([])
    for value in range(1000):
        view = rows.with_room(cached, torch.empty(1, 2, 1, 4), 1)
        view[:, :, -1:] = value
        places.add(view.data_ptr())
        cached = view
    assert torch.equal(cached[0, 1, :, 3], torch.arange(1000.0))
    assert len(places) < 6


@pytest.mark.parametrize("cut", [slice(3, None), slice(0, 4), slice(2, 5)])
def test_a_view_may_be_cut_at_both_ends(cut: slice) -> None:
    rows, like = GrowingRows(), torch.empty(2, 3, 1, 4)
    view = rows.with_room(torch.tensor([]), like, 6)
    view.copy_(torch.arange(6.0)[:, None].expand(2, 3, 6, 4))
    kept = view[:, :, cut]
    grown = rows.with_room(kept, like, 2)
    assert torch.equal(grown[:, :, :-2], kept)
    assert grown.data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("cached", [torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 8)[..., ::2]])
def test_foreign_rows_are_copied(cached: torch.Tensor) -> None:
    rows, like = GrowingRows(), torch.empty(1, 2, 1, 4)
    rows.with_room(torch.tensor([]), like, 1)
    grown = rows.with_room(cached, like, LEAST_ROWS)
    assert grown.shape == (1, 2, 5 + LEAST_ROWS, 4)
    assert torch.equal(grown[:, :, :5], cached)
