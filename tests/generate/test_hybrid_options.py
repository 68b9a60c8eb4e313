"""--gpu-experts, --placement, --device and --max-deferred-experts of `ktk run`, `chat`, `serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ktk.generate.engine import Limits
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling
from ktk.generate.session import Session
from ktk.generate.trial import start_engine
from ktk.integration.transformers.loading import packed_modules
from ktk.machine import cpu
from ktk.placement.masks.request import HybridRequest
from make.conversions import tiny_gguf
from make.serving import make_model

NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hybrid") / "tiny-moe")


def text(opened: OpenModel) -> str:
    session = Session.fastest(opened.model, opened.tokenizer)
    return session.generate(session.encode("Why is"), Sampling(0.0), NEW).text


def served(opened: OpenModel) -> str:
    """By the server's engine, two requests at once."""
    engine = start_engine(opened, Limits(context=64, running=2))

    async def answer() -> list[int]:
        ids = opened.tokenizer.encode("Why is", add_special_tokens=False)
        sampling, found = Sampling(0.0), []
        async for tokens in engine.generate(ids, sampling, NEW):
            found += [token.id for token in tokens]
        return found

    async def both() -> list[Any]:
        return await asyncio.gather(answer(), answer())

    try:
        first, second = asyncio.run(both())
    finally:
        engine.stop()
    assert first == second
    return str(opened.tokenizer.decode(first))


def asked(*options: Any) -> HybridRequest:
    found = HybridRequest.of(*options)
    assert found is not None
    return found


def test_numbers_shares_and_bytes_are_told_apart() -> None:
    assert [asked(t, None, None, 0).gpu_experts for t in ("16", "0", "0.4", "40%", "8GiB")] == [
        16,
        0,
        0.4,
        0.4,
        "8GiB",
    ]
    assert asked(None, "masks.pt", "cpu", 2) == HybridRequest(None, "masks.pt", "cpu", 2)
    assert asked(None, None, None, 3) == HybridRequest(max_deferred_experts=3)
    assert HybridRequest.of(None, None, None, 0) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("much", None, None, 0), "--gpu-experts much: must be a number.*as 8GiB"),
        (("1.5", None, None, 0), "--gpu-experts 1.5: a share must be 0 to 1"),
        (("140%", None, None, 0), "a share must be 0 to 1, or 0% to 100%"),
        (("-1", None, None, 0), "a share must be"),
        (("nan", None, None, 0), "a share must be"),
        ((None, None, "cpu", 0), "--device cpu: say which experts"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HybridRequest.of(*options)


@pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
def test_run_and_serve_give_the_text_of_the_cpu_alone(model: Path) -> None:
    want = text(open_model(model, weight_format="fp32"))
    opened = open_model(model, weight_format="fp32", hybrid=asked("50%", "random", "cpu", 0))
    assert sum(module.gpu_experts for module in packed_modules(opened.model)) == 8
    assert text(opened) == served(opened) == want


@pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
def test_deferred_experts_change_the_logits_the_same_way_in_run_and_serve(model: Path) -> None:
    opened, plain = open_model(model, hybrid=asked(None, None, None, 1)), open_model(model)
    ids = torch.tensor([[5]])  # one token: of several each protects some experts
    with torch.inference_mode():
        assert not torch.equal(opened.model(ids).logits, plain.model(ids).logits)
    assert text(opened) == served(opened)


def test_a_gguf_file_takes_none_of_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--gpu-experts.* are for directories"):
        open_model(tiny_gguf(tmp_path / "tiny.gguf"), hybrid=asked(None, None, None, 1))
