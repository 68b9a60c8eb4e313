"""Decoding attention with grouped rows: the same as transformers' SDPA, within rounding,
whatever else a model does by the name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Limits
from ktk.generate.open import OpenModel
from ktk.integration.transformers import attention, use_attention
from ktk.integration.transformers.attention import one_row
from ktk.integration.transformers.attention_names import decides_by_name
from ktk.integration.transformers.batches import CannotBatch
from ktk.integration.transformers.multimodal import auto_class, leave_out_towers
from ktk.integration.transformers.paged_attention import NAME as SERVED
from ktk.integration.transformers.paged_attention import paged_attention
from make.families import NOT_BUILT, causal_families, small_config
from make.serving import make_model
from make.transformers_cases import SEED

LONG, NEW = 40, 6  # tokens: longer than any window, index or chunk below
SHORT = {"sliding_window": 16, "attention_chunk_size": 16, "index_topk": 8}
EYES = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
# Of two layers one must cache keys.
HYBRID = {
    kind: {"layer_types": ["linear_attention", "full_attention"]}
    for kind in ("bailing_hybrid", "kimi_linear", "qwen3_5_moe_text", "qwen3_next")
}
# Whose attention is sparse by an index, and only under the names its code knows.
INDEXED = {
    "axk2",
    "deepseek_v32",
    "dots3_note_text",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl_text",
    "mistral_large4",
}
WRAPPED = "mistral_large4"  # no class of its language model alone makes text
FAMILIES = [*causal_families(), WRAPPED]


@pytest.mark.parametrize(("heads", "kv_heads", "keys"), [(8, 2, 33), (4, 4, 1), (6, 1, 200)])
def test_one_row_is_softmax_of_products(heads: int, kv_heads: int, keys: int) -> None:
    g = torch.Generator().manual_seed(heads)
    q = torch.randn(2, heads, 1, 16, generator=g)
    k, v = (torch.randn(2, kv_heads, keys, 16, generator=g) for _ in range(2))
    want = torch.empty_like(q)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        p = torch.softmax((q[:, h] @ k[:, kv].transpose(1, 2)).double() * 0.3, -1)
        want[:, h] = (p @ v[:, kv].double()).float()
    assert torch.allclose(one_row(q, k, v, 0.3), want, atol=1e-5)


def test_generation_is_that_of_sdpa_with_padding_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    make_model(tmp_path / "m")
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="sdpa")

    def said() -> list[list[list[int]]]:
        options = {"max_new_tokens": 12, "do_sample": False}
        return [model.generate(ids, attention_mask=m, **options).tolist() for m in (None, mask)]

    want = said()
    assert use_attention(model)
    assert model.config._attn_implementation == "sdpa"
    assert said() == want


def make_family(kind: str) -> Any:
    if kind in NOT_BUILT:
        pytest.skip(NOT_BUILT[kind])
    config = small_config(f"{kind}_text" if kind == WRAPPED else kind)
    for name, value in {**SHORT, **HYBRID.get(kind, {})}.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if kind == WRAPPED:
        config = CONFIG_MAPPING[kind](text_config=config.to_dict(), vision_config=EYES)
    torch.manual_seed(SEED)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    leave_out_towers(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    return model


def long_logits(model: Any) -> torch.Tensor:
    """float32 (NEW, vocabulary): of greedy tokens behind a long prompt."""
    ids = torch.randint(3, 64, (1, LONG), generator=torch.Generator().manual_seed(SEED))
    said = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return torch.cat(said.logits).float()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_computes_the_same_in_a_context_longer_than_its_windows_and_index(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_family(kind)
    try:
        want = long_logits(model)
    except (ValueError, IndexError) as error:
        pytest.skip(f"transformers does not generate with it: {error}")
    rows = []
    monkeypatch.setattr(attention, "one_row", lambda *a: (rows.append(1), one_row(*a))[1])
    is_used = use_attention(model)
    got = long_logits(model)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert is_used or not rows


@pytest.mark.parametrize("kind", ["deepseek_v32", WRAPPED])
def test_the_index_of_sparse_attention_is_seen_by_these_contexts(kind: str) -> None:
    """Else the test above would show nothing."""
    model = make_family(kind)
    sparse = long_logits(model)
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 10**6
    assert (long_logits(model) - sparse).abs().max() > 1e-2 * sparse.abs().max()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_families_that_decide_by_the_name_are_told_from_the_others(kind: str) -> None:
    model = make_family(kind)
    own = model.config._attn_implementation
    found = decides_by_name(model, own, SERVED)
    if kind in INDEXED:
        assert found is not None
        assert found.endswith("Attention")
    elif kind != "gemma4_text":  # which leaves out rows of its last layers, or not
        assert found is None


def test_code_that_cannot_be_read_counts_as_deciding() -> None:
    namespace: dict[str, Any] = {"torch": torch, "__name__": "made_at_run_time"}
    exec("class Mine(torch.nn.Module):\n    pass", namespace)
    assert decides_by_name(namespace["Mine"](), "sdpa", SERVED) == "Mine"


def test_a_server_does_not_batch_what_decides_by_the_name() -> None:
    description = SimpleNamespace(max_context=64, context=64)
    opened = OpenModel(make_family("deepseek_v32"), SimpleNamespace(eos_token_id=None), description)  # type: ignore[arg-type]
    with pytest.raises(CannotBatch, match="DeepseekV32Attention computes by its attention"):
        BatchingEngine(opened, Limits(context=64, running=1, batch_tokens=64, cache_bytes=1 << 20))


def test_served_attention_refuses_arguments_that_it_does_not_know() -> None:
    rows = torch.zeros(1, 1, 1, 16)
    with pytest.raises(ValueError, match="attention has indices"):
        paged_attention(torch.nn.Module(), rows, rows, rows, None, indices=torch.zeros(1))
    with pytest.raises(ValueError, match="sees what is to come"):
        paged_attention(torch.nn.Module(), rows, rows, rows, None, is_causal=False)
