"""Which tokens sampling leaves: those that transformers' own processors leave, ties and all."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ktk.generate.sampling import of_largest, of_likeliest

SCORES = {
    "random": torch.randn(500, generator=torch.Generator().manual_seed(3)) * 4,
    "ties": torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(4)).float(),
    "ends ruled out": torch.randn(64, generator=torch.Generator().manual_seed(5)).index_fill(
        0, torch.tensor([3, 7]), float("-inf")
    ),
}
IDS = torch.zeros(1, 1, dtype=torch.long)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("top_k", [1, 2, 40, 63, 1000])
def test_the_largest(name: str, top_k: int) -> None:
    scores = SCORES[name]
    want = TopKLogitsWarper(top_k)(IDS, scores[None].clone())[0]
    assert torch.equal(of_largest(scores, top_k), want)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("top_p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_likeliest(name: str, top_p: float) -> None:
    scores = SCORES[name]
    want = TopPLogitsWarper(top_p)(IDS, scores[None].clone())[0]
    assert torch.equal(of_likeliest(scores, top_p), want)
