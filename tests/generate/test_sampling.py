"""Which tokens sampling leaves: those that transformers' own processors leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ktk.generate.sampling import (
    DRAW_BLOCK,
    Sampler,
    Sampling,
    drawn,
    of_largest,
    of_likeliest,
    places_of_largest,
)

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
    left = of_largest(weights_of(scores), top_k)
    assert left.nonzero()[0].tolist() == want.isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("top_p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_likeliest(name: str, top_p: float) -> None:
    scores = SCORES[name]
    want = TopPLogitsWarper(top_p)(IDS, scores[None].clone())[0]
    left = of_likeliest(weights_of(scores), top_p)
    kept = scores[torch.from_numpy(left > 0)].sort().values  # of equals, any may stay
    assert torch.equal(kept, want[want.isfinite()].sort().values)


def test_a_nucleus_among_many_is_that_of_all() -> None:
    """Nearly alike, so that few steps find too few of them; and very unlike."""
    for size in (0.01, 3.0, 40.0):
        scores = torch.randn(5000, generator=torch.Generator().manual_seed(9)) * size
        want = TopPLogitsWarper(0.95)(IDS, scores[None].double())[0].isfinite()
        left = of_likeliest(weights_of(scores), 0.95)
        assert left.nonzero()[0].tolist() == want.nonzero()[:, 0].tolist()


def test_a_draw_is_where_the_sum_passes_its_share() -> None:
    """Over blocks and what is left behind them; never a token of weight 0."""
    rng = np.random.default_rng(4)
    for count in (1, 5, DRAW_BLOCK, 3 * DRAW_BLOCK, 3 * DRAW_BLOCK + 77):
        weights = rng.random(count).astype(np.float32) * (rng.random(count) < 0.3)
        weights[rng.integers(count)] = 1
        ends = weights.cumsum(dtype=np.float64) / weights.sum(dtype=np.float64)
        for share in [0.0, np.nextafter(1.0, 0.0), *rng.random(50)]:
            place = drawn(weights, share)
            assert weights[place] > 0
            assert (ends[place - 1] if place else 0) - 1e-6 <= share <= ends[place] + 1e-6


def weights_of(scores: torch.Tensor) -> np.ndarray:
    weights: np.ndarray = (scores - scores.max()).exp().numpy()
    return weights


def first_draws(scores: torch.Tensor, count: int = 400, **how: object) -> set[int]:
    """Tokens of so many samplers' first draws."""
    return {Sampler(Sampling(seed=seed, **how)).choose(scores) for seed in range(count)}  # type: ignore[arg-type]


@pytest.mark.parametrize("min_p", [0.2, 0.7, 1.0])
def test_min_p_leaves_tokens_by_the_likeliest(min_p: float) -> None:
    scores = torch.tensor([0.0, 1.0, -0.5, 1.0, 0.4, -3.0])
    left = MinPLogitsWarper(min_p)(IDS, scores[None].clone())[0].isfinite()
    assert first_draws(scores, min_p=min_p) == set(left.nonzero()[:, 0].tolist())


def test_repetition_penalises_tokens_of_prompt_and_answer() -> None:
    scores = SCORES["random"]
    prompt = [3, 3, int(scores.argmax()), int(scores.argmin())]
    sampler = Sampler(Sampling(0.0, repetition_penalty=1.5), prompt)
    process = RepetitionPenaltyLogitsProcessor(1.5)
    for _ in range(5):
        ids = torch.tensor([[*prompt, *(token.id for token in sampler.tokens)]])
        want = int(process(ids, scores[None].clone())[0].argmax())
        assert sampler.choose(scores) == want
    assert len({token.id for token in sampler.tokens}) > 1


def test_presence_and_frequency_are_taken_from_tokens_of_the_answer_alone() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    scores = torch.tensor([3.0, 2.9, 2.0, 0.0])
    sampler = Sampler(Sampling(0.0, presence_penalty=0.5, frequency_penalty=0.3), [0, 0, 0])
    want, counts = [], torch.zeros(4)
    for _ in range(8):
        chosen = int((scores - 0.3 * counts - 0.5 * (counts > 0)).argmax())
        counts[chosen] += 1
        want.append(chosen)
    assert [sampler.choose(scores) for _ in range(8)] == want
    assert want[:2] == [0, 1] and 2 in want
    encouraged = Sampler(Sampling(0.0, presence_penalty=-2.0))
    encouraged.choose(torch.tensor([0.0, 0.1]))
    assert encouraged.choose(torch.tensor([1.0, 0.0])) == 1


def test_a_bias_is_added_and_log_probabilities_stay_the_models() -> None:
    scores = SCORES["random"]
    sampler = Sampler(Sampling(0.0, num_logprobs=1, logit_bias=((7, 100.0), (9, -100.0))))
    assert sampler.choose(scores) == 7
    assert sampler.tokens[0].logprob == pytest.approx(float(scores.log_softmax(-1)[7]))
    banned = int(scores.argmax())
    assert Sampler(Sampling(0.0, logit_bias=((banned, -100.0),))).choose(scores) != banned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, -50.0], ids=["around 0", "all negative"])
def test_the_places_of_the_largest_are_numpys(dtype: torch.dtype, shift: float) -> None:
    random = torch.randn(5, 300, generator=torch.Generator().manual_seed(7)) * 3 + shift
    rows = torch.cat([random, torch.zeros(1, 300), -random[:1].abs()]).to(dtype)
    rows[5, :4] = -0.0  # as large as 0: the first of them is meant
    rows[0, [9, 200]] = rows[0].max()  # a tie
    assert places_of_largest(rows) == rows.float().numpy().argmax(1).tolist()
    assert places_of_largest(rows[:5]) == rows[:5].float().numpy().argmax(1).tolist()
    assert places_of_largest(rows[:5].abs()) == rows[:5].abs().float().numpy().argmax(1).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"num_logprobs": 0},
        {"logit_bias": ((3, 1.0),)},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_largest_alone_decides_only_where_nothing_else_is_asked_for(
    changes: dict[str, Any],
) -> None:
    assert Sampler(Sampling(0.0)).takes_largest
    sampler = Sampler(Sampling(**{"temperature": 0.0, **changes}))
    assert not sampler.takes_largest
    sampler.choose(SCORES["random"])
    assert sampler.takes_largest == ("min_tokens" in changes)
