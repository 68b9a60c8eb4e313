"""Sums of outputs computed elsewhere: compiled, and one fused multiply-add at a time."""

from __future__ import annotations

import numpy as np
import pytest

from ktk._cy import native_module
from ktk.backends.base import Runner
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.ops.moe import MoE
from make.cases import assert_exact, pack_all, random_experts

pytestmark = pytest.mark.skipif(
    native_module() is None or cpu.best_isa() is None, reason="no compiled kernels run here"
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("hidden", [16, 100, 512, 1040])
def test_sums_of_rows_are_those_of_single_steps(hidden: int, dtype: type) -> None:
    spec = MoESpec(1, hidden, 16, "bf16")
    runner = MoE(pack_all(spec, random_experts(spec, 0))).runner
    rng = np.random.default_rng(hidden)
    y = rng.standard_normal((50, -(-hidden // 16) * 16)).astype(np.float32)
    y[3], y[4, 5] = -0.0, np.inf
    for tokens, top_k in ((0, 2), (1, 1), (17, 8), (33, 3)):
        place = rng.integers(-1, 50, (tokens, top_k)).astype(np.int32)
        weights = rng.standard_normal((tokens, top_k)).astype(np.float32)
        for add in (None, rng.standard_normal((tokens, hidden)).astype(np.float32)):
            want, got = (np.full((tokens, hidden), 7, dtype) for _ in range(2))
            with np.errstate(all="ignore"):
                Runner.combine(runner, y, place, weights, add, want)
            runner.combine(y, place, weights, add, got)
            if dtype is np.uint16:  # NaN's bits are not compared
                want, got = (x.astype(np.uint32) << 16 for x in (want, got))
                want, got = want.view(np.float32), got.view(np.float32)
            assert_exact(want, got)


def test_without_any_output_sums_are_what_is_added() -> None:
    spec = MoESpec(1, 32, 16, "bf16")
    runner = MoE(pack_all(spec, random_experts(spec, 0))).runner
    nowhere, weights = np.full((2, 3), -1, np.int32), np.ones((2, 3), np.float32)
    add = np.arange(64, dtype=np.float32).reshape(2, 32)
    for combine in (runner.combine, lambda *given: Runner.combine(runner, *given)):
        out = np.full((2, 32), np.nan, np.float32)
        combine(np.empty((0, 32), np.float32), nowhere, weights, add, out)
        assert_exact(add, out)
