"""Training gives the same bits for any number of threads, whoever calls it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
from ktk._cy import native_module
from make.forked import forked
from make.training_bits import run


@pytest.mark.skipif(native_module() is None, reason="the compiled extension is not built")
def test_a_step_through_the_wrapper_and_through_transformers_has_the_same_bits(tmp_path):
    found = []
    for threads in ("1", "3"):
        path = tmp_path / threads
        with forked(run, str(path), environment={"KTK_NUM_THREADS": threads}) as child:
            assert child.wait() == 0, child.err
        found.append(torch.load(path))
        assert found[-1].pop("threads") == int(threads)
    one, three = found
    assert one.keys() == three.keys()
    for name, want in one.items():
        assert want.isfinite().all(), name
        assert torch.equal(want, three[name]), name
