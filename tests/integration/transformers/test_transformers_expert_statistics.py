"""Counting a model's experts while it runs: what its routers chose, in every way to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from ktk.integration.transformers import fuse_decoder_layers, linear, replace_linears, use_ktk
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.decoder_layers import native_calls
from ktk.integration.transformers.expert_statistics import ExpertStatistics
from ktk.integration.transformers.experts import listener_of
from ktk.integration.transformers.router_trace import record_text
from ktk.placement.masks.files import DIRECTORY, read_statistics
from make.cases import assert_exact
from make.transformers_cases import FAMILIES, experts_of, make_model

TOKEN_IDS, PROMPT = [5, 9, 200, 31, 7, 7, 90], 4


def packed(family: str) -> Any:
    model = make_model(family)
    use_ktk(model, "int8")
    return model


def decode(model: Any, token_ids: list[int] = TOKEN_IDS) -> None:
    """A prompt in one pass, then the other tokens one by one."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=model.config), torch.tensor([token_ids])
    with torch.inference_mode():
        model(input_ids=ids[:, :PROMPT], use_cache=True, **{hf.CACHE: cache})
        for at in range(PROMPT, len(token_ids)):
            model(input_ids=ids[:, at : at + 1], use_cache=True, **{hf.CACHE: cache})


def counted(trace: Any, statistics: ExpertStatistics) -> np.ndarray:
    """What a trace of the same text says."""
    grid = statistics.recorder.grid
    counts = np.zeros(grid.shape, np.int64)
    for layer, ids in zip(trace.layers, trace.expert_ids, strict=True):
        np.add.at(counts[grid.moe_layers[layer]], ids[ids >= 0], 1)
    return counts


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_counts_are_those_of_a_trace(family: str) -> None:
    model = packed(family)
    want = record_text(model, TOKEN_IDS, PROMPT)
    statistics = ExpertStatistics(model)
    statistics.start()
    decode(model)
    statistics.stop()
    assert statistics.recorder.num_passes == 1 + len(TOKEN_IDS) - PROMPT
    assert_exact(counted(want, statistics), statistics.recorder.counts())


@pytest.mark.parametrize("mode", ["stat", "per_token"])
def test_tokens_in_native_calls_are_counted_too(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 1)
    plain, fused = packed("qwen3_moe"), packed("qwen3_moe")
    for model in (plain, fused):
        replace_linears(model, "int8")
    fuse_decoder_layers(fused)
    of_plain, of_fused = ExpertStatistics(plain, mode), ExpertStatistics(fused, mode)
    for model, statistics in ((plain, of_plain), (fused, of_fused)):
        statistics.start()
        decode(model)
    assert native_calls(fused) == 2 * (len(TOKEN_IDS) - PROMPT)
    # Not the probes, on which each layer was tried before the first of them.
    assert_exact(of_plain.recorder.counts(), of_fused.recorder.counts())
    assert (
        of_fused.recorder.counts().sum()
        == 2 * len(TOKEN_IDS) * FAMILIES["qwen3_moe"].num_experts_per_tok
    )
    files = [of_plain.dump(tmp_path / "plain"), of_fused.dump(tmp_path / "fused")]
    assert_exact(read_statistics(files[0]), read_statistics(files[1]))
    if mode == "per_token":
        records = [torch.load(f, weights_only=True)["records"] for f in files]
        for one, other in zip(*records, strict=True):
            assert torch.equal(one["topk_ids_of_layer"], other["topk_ids_of_layer"])
    of_fused.stop()
    before = of_fused.recorder.chosen.copy()
    decode(fused)
    assert_exact(before, of_fused.recorder.chosen)


def test_results_are_the_same_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("qwen3_moe")
    ids = torch.tensor([TOKEN_IDS])
    statistics = ExpertStatistics(model)
    with torch.inference_mode():
        want = model(ids).logits
        statistics.start()
        got = model(ids).logits
        statistics.stop()
        model(ids)
    assert torch.equal(want, got)
    assert statistics.recorder.num_passes == 1
    assert all(listener_of(module) is None for module in experts_of(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_pass_that_fails_or_had_begun_is_not_counted() -> None:
    model = packed("qwen3_moe")
    ids = torch.tensor([TOKEN_IDS])
    statistics = ExpertStatistics(model)
    last = experts_of(model)[-1]

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with torch.inference_mode():
        statistics.start()
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            model(ids)
        hook.remove()
        model(ids)
        assert statistics.recorder.num_passes == 1
        tokens = statistics.recorder.counts().sum()
        start = last.register_forward_pre_hook(lambda *_: statistics.start())
        statistics.stop()
        model(ids)  # begins to record in its middle
        start.remove()
        assert statistics.recorder.num_passes == 0
        model(ids)
    assert statistics.recorder.counts().sum() == tokens


def test_dumps_go_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "new" / "folder"))
    model = packed("deepseek_v3")
    statistics = ExpertStatistics(model)
    with pytest.raises(ValueError, match="nothing was recorded"):
        statistics.dump()
    statistics.start()
    decode(model)
    want = statistics.recorder.counts()
    path = statistics.dump()
    assert path.parent == tmp_path / "new" / "folder"
    assert path.name.startswith("expert_distribution_recorder_")
    assert_exact(want.astype(np.float64), read_statistics(path))
    assert want[0].sum() == 0 or 0 in statistics.recorder.grid.moe_layers


def test_a_model_without_ktk_is_refused() -> None:
    with pytest.raises(ValueError, match="0 of 2 experts modules run on ktk"):
        ExpertStatistics(make_model("qwen3_moe"))
