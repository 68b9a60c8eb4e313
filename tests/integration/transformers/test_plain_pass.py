"""A pass without the model's own forward has the bits of one with it, and is taken only where the
model does nothing else around its layers.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
import torch

from ktk.errors import BackendError
from ktk.integration.transformers import fuse_decoder_layers
from ktk.integration.transformers.native_batch import NativeModel
from ktk.integration.transformers.plain_pass import BLOCK, PlainPass
from ktk.kv.pool import PagePool
from make.fused_layers import make, small_matrices_too

__all__ = ["small_matrices_too"]  # a fixture for every test

PASSES = (  # tokens, sequence, position, wanted
    ([3, 4, 5, 6, 7], [0, 0, 1, 0, 1], [0, 1, 0, 2, 1], [3, 4]),
    ([8, 9], [1, 0], [2, 3], [0, 1]),
    ([1] * 60, [0] * 60, list(range(4, 64)), [59]),
)


def tried(kind: str, **changes: Any) -> Any:
    model = make(kind, max_position_embeddings=2 * BLOCK, **changes)
    fuse_decoder_layers(model)
    model.generation_config.eos_token_id = None
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, pad_token_id=0)
    return model


def plain(native: NativeModel) -> PlainPass | None:
    return PlainPass.of(native.model, native.fused, native.layers)


def passes(native: NativeModel) -> list[torch.Tensor]:
    pool = PagePool(4, native.shapes, native.dtype)
    tables = [pool.tables([pool.take() or 0]) for _ in range(2)]
    made = []
    for tokens, sequence, position, wanted in PASSES:
        made += native.forward(tokens, sequence, position, tables, wanted, wants_hidden=True)
    return made


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v2", "ernie4_5_moe"])
def test_it_has_the_bits_of_the_models_own_forward(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tried(kind)
    native = NativeModel(model)
    with torch.inference_mode():
        assert plain(native) is not None
    got = passes(native)
    native.close()
    monkeypatch.setattr(PlainPass, "of", lambda *_: None)
    own = NativeModel(model)
    want = passes(own)
    own.close()
    assert all(map(torch.equal, got, want))
    assert any(of.abs().max() > 0 for of in want)


@pytest.fixture(scope="module")
def model() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        small_matrices_too.__wrapped__(patch)  # type: ignore[attr-defined]
        return tried("qwen3_moe")


def test_positions_beyond_a_block_get_the_angles_of_the_models_own(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for of in (PlainPass.of, lambda *_: None):
        monkeypatch.setattr(PlainPass, "of", of)
        native = NativeModel(model)
        pool = PagePool(12, native.shapes, native.dtype)
        tables = [pool.tables([pool.take() or 0 for _ in range(12)])]
        for first in (0, 300):
            count = 300
            places = list(range(first, first + count))
            out, _ = native.forward([7] * count, [0] * count, places, tables, [count - 1])
        made.append(out)
        native.close()
    assert BLOCK < 600
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("granitemoe", {"embedding_multiplier": 2.0}),
        ("granitemoe", {"logits_scaling": 2.0}),
    ],
)
def test_a_model_that_multiplies_is_not_plain(kind: str, changes: dict[str, Any]) -> None:
    native = NativeModel(tried(kind, **changes))
    native.close()
    with torch.inference_mode():
        assert plain(native) is None


@pytest.mark.parametrize("where", ["embedding", "between", "norm", "head"])
def test_a_model_with_something_between_its_modules_is_not_plain(model: Any, where: str) -> None:
    native = NativeModel(model)
    native.close()
    body = model.model
    modules = {
        "embedding": body.layers[0],
        "between": body.layers[1],
        "norm": body.norm,
        "head": model.lm_head,
    }
    hook = modules[where].register_forward_pre_hook(lambda _, given: (given[0] * 1.5, *given[1:]))
    try:
        with torch.inference_mode():
            assert plain(native) is None
    finally:
        hook.remove()


def test_a_changed_layer_is_refused(model: Any) -> None:
    native = NativeModel(model)
    native.check_unchanged()
    attention = model.model.layers[1].self_attn
    own = attention.q_proj
    attention.q_proj = torch.nn.Sequential(own)
    try:
        with pytest.raises(BackendError, match="open the model anew"):
            native.check_unchanged()
    finally:
        attention.q_proj = own
        native.close()
