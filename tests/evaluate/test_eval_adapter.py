"""``evaluate`` with an adapter: beside the reference's weights it is what merging makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")
from ktk.evaluate.quantiser import PaddedMoE, Quantiser
from ktk.evaluate.run import evaluate
from ktk.evaluate.variants import Variant
from ktk.train.adapter import read_adapter
from ktk.train.merging import merge
from make.adapters import make_adapter


def test_every_row_has_the_adapter(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "Could not find a config file")
        directory, _ = make_adapter(tmp_path, "qwen3_moe", ("experts", "attention"))
        base = tmp_path / "base"
        merged = merge(read_adapter(directory), base, tmp_path / "merged")
        windows = torch.randint(3, 250, (1, 64), generator=torch.Generator().manual_seed(0))
        ids, variants = windows.tolist(), [Variant.parse("int8")]
        beside, int8 = evaluate(base, ids, variants, adapter=directory)
        (within,) = evaluate(merged, ids, [])
        (plain,) = evaluate(base, ids, [])
    expected = within.distance.perplexity
    assert beside.distance.perplexity == pytest.approx(expected, rel=1e-4)
    assert abs(plain.distance.perplexity / expected - 1) > 0.01
    assert int8.kernel.endswith("int8") and 0 < int8.distance.kl < 0.05


def test_experts_filled_up_to_blocks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Quantiser.moe
    monkeypatch.setattr(Quantiser, "moe", lambda *given: PaddedMoE(own(*given), 64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        directory, _ = make_adapter(tmp_path, "qwen3_moe", ("experts",))
    rows = evaluate(tmp_path / "base", [[3, 4, 5]], [Variant.parse("int8")], adapter=directory)
    with pytest.raises(ValueError, match="fills rows up to whole blocks"):
        list(rows)
