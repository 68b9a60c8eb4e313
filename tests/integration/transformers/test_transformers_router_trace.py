"""Recording where a model's tokens go: the router's own choice, and no other result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from ktk.integration.transformers import (
    fuse_decoder_layers,
    linear,
    replace_linears,
    router_trace,
    use_ktk,
)
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.router_trace import record_text, recording
from ktk.placement.residency.trace import Trace
from make.cases import assert_exact
from make.transformers_cases import FAMILIES, experts_of, make_model

TOKEN_IDS, PROMPT = [5, 9, 200, 31, 7, 7, 90], 4


def given_to(model: torch.nn.Module) -> list[list[np.ndarray]]:
    """The ids that each experts module is called with from now on."""
    found: list[list[np.ndarray]] = []
    for module in experts_of(model):
        calls: list[np.ndarray] = []
        found.append(calls)

        def see(_: Any, arguments: tuple[Any, ...], calls: list[np.ndarray] = calls) -> None:
            calls.append(arguments[1].numpy().copy())

        module.register_forward_pre_hook(see)
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_trace, "PIECE", 5)


def record(model: torch.nn.Module) -> Trace:
    return record_text(model, TOKEN_IDS, PROMPT, "a test")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_trace_is_what_the_experts_modules_were_called_with(family: str) -> None:
    model = make_model(family)
    use_ktk(model, "int8")
    given = given_to(model)
    trace = record(model)
    assert trace.num_layers == len(given) > 0
    assert trace.num_experts == getattr(
        FAMILIES[family], "n_routed_experts", getattr(FAMILIES[family], "num_local_experts", 8)
    )
    for layer, calls in enumerate(given):
        assert [len(ids) for ids in calls] == [5, 2]
        rows = trace.layers == layer
        assert_exact(np.concatenate(calls).astype(np.int32), trace.expert_ids[rows])
        assert trace.tokens[rows].tolist() == list(range(len(TOKEN_IDS)))
    # A token goes through all layers before the next call begins.
    steps = 1 + len(TOKEN_IDS) - PROMPT
    calls_in_order = [call.layer for call in trace.each_call()]
    assert calls_in_order == list(range(trace.num_layers)) * steps
    assert (trace.weights > 0).all()


def test_a_trace_is_that_of_tokens_one_by_one() -> None:
    """As ids and calls; the logits that they come from have other roundings."""
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    want = record(model)
    with torch.inference_mode(), recording(model) as recorder:
        made = model(torch.tensor([TOKEN_IDS[:PROMPT]]), use_cache=True)
        for token in TOKEN_IDS[PROMPT:]:
            cache = {hf.CACHE: made.past_key_values}
            made = model(torch.tensor([[token]]), use_cache=True, **cache)
    got = recorder.trace()
    for name in ("layers", "calls", "tokens", "expert_ids"):
        assert_exact(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.weights, want.weights, atol=1e-3)


def test_recording_leaves_results_and_model_as_they_were() -> None:
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    ids = torch.tensor([TOKEN_IDS])
    with torch.inference_mode():
        want = model(ids).logits
        with recording(model) as recorder:
            got = model(ids).logits
        after = model(ids).logits
    assert torch.equal(want, got)
    assert torch.equal(want, after)
    assert len(recorder.trace().layers) == 2 * len(TOKEN_IDS)
    assert recorder.expert_bytes >= 3 * 64 * 48


def test_what_cannot_be_recorded_is_refused() -> None:
    model = make_model("qwen3_moe")
    with pytest.raises(ValueError, match="0 of 2 experts modules run on ktk"):
        record(model)
    use_ktk(model, "int8")
    for prompt in (0, 8):
        with pytest.raises(ValueError, match=r"must be 1\.\.7"):
            record_text(model, TOKEN_IDS, prompt)
    with recording(model) as recorder, pytest.raises(ValueError, match="nothing was recorded"):
        recorder.trace()


def test_tokens_that_go_past_the_experts_modules_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 1)
    monkeypatch.setattr(router_trace, "PIECE", 1)
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    replace_linears(model, "int8")
    fuse_decoder_layers(model)
    with pytest.raises(ValueError, match="load the model with load_model"):
        record(model)
