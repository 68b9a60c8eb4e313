"""Fine-tuning on several ranks, whose experts lie on rank 0."""

from __future__ import annotations

import contextlib

import pytest
import torch

from make.forked import forked
from make.sft_rank import TOKENS, call, layer, run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)


def test_ranks_get_their_rows_and_rank_0_the_mean_of_the_adapters_gradients(tmp_path):
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(forked(run, str(tmp_path), rank)) for rank in range(len(TOKENS))
        ]
        assert [rank.wait() for rank in ranks] == [0] * len(TOKENS), [rank.err for rank in ranks]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(TOKENS))]
    wrapper, buffers = layer()
    together = [torch.cat(parts) for parts in zip(*map(call, range(len(TOKENS))), strict=True)]
    for _ in range(2):
        out = wrapper.forward(*together[:3])
        hidden, weights = wrapper.backward(together[3], optimizer_grad_scale=1 / len(TOKENS))
    assert torch.equal(out, torch.cat([rank["out"] for rank in found]))
    assert torch.equal(2 * hidden[: TOKENS[0]], found[0]["hidden"])  # of both steps
    assert found[2]["hidden"] is None
    assert torch.equal(2 * weights, torch.cat([rank["weights"] for rank in found]))
    for want, got in zip(buffers, found[0]["lora"], strict=True):
        assert want.any()
        assert torch.equal(want, got)
