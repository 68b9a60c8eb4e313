"""The engine of ktk's own decoder layers: its tokens are those of generate(), their bits the same
in every batch, after every past and for want of pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("prometheus_client")

import torch
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM

from ktk.generate import trial
from ktk.generate.batching import BatchingEngine
from ktk.generate.describe import describe_model
from ktk.generate.engine import Engine, Limits, ServerBusy
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling, Token
from ktk.generate.session import Session
from ktk.integration.transformers import fuse_decoder_layers
from ktk.integration.transformers.batches import CannotBatch
from ktk.integration.transformers.decoder_layers import native_calls
from ktk.integration.transformers.native_batch import NativeModel
from ktk.integration.transformers.native_sequence import open_sequence
from ktk.integration.transformers.sequence import CachedSequence
from ktk.kv.pages import PAGE
from ktk.server.kv_metrics import KvCollector
from make.fused_layers import FUSED, WINDOW, make, small_matrices_too
from make.serving import make_model

__all__ = ["small_matrices_too"]  # a fixture for every test

LIMITS = Limits(context=320, running=4, batch_tokens=96, cache_bytes=64 << 20)
PROMPTS = [[3 + (7 * i + 5 * j) % 57 for j in range(n)] for i, n in enumerate((2, 65, 90, 230))]
NEW = 12
GREEDY = Sampling(0.0, num_logprobs=0)


class Numbers:
    """A tokenizer that is not asked for text."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte % 57 for byte in text.encode()]}


def tiny(kind: str, **changes: Any) -> OpenModel:
    model = make(kind, max_position_embeddings=512, **changes)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    fuse_decoder_layers(model)
    return OpenModel(model, Numbers(), SimpleNamespace(path="tiny", context=320))  # type: ignore[arg-type]


async def answer(engine: Engine, prompt: list[int], count: int) -> list[Token]:
    parts = engine.generate(prompt, GREEDY, count)
    return [token async for tokens in parts for token in tokens]


async def together(engine: Engine, prompts: list[list[int]], count: int) -> list[list[Token]]:
    return list(await asyncio.gather(*(answer(engine, prompt, count) for prompt in prompts)))


@pytest.mark.parametrize("kind", FUSED)
def test_a_batch_gives_the_tokens_of_generate(kind: str) -> None:
    """Prompts longer than any window, cut into what is left of passes."""
    opened = tiny(kind)
    model = opened.model
    want = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    engine = trial.start_engine(opened, LIMITS)
    try:
        assert isinstance(engine, NativeEngine), engine.why_not_native
        assert engine.why_alone is engine.why_not_native is None
        before = native_calls(model)
        got = asyncio.run(together(engine, PROMPTS, NEW))
        assert [[token.id for token in tokens] for tokens in got] == want
        rows = sum(len(prompt) + NEW - 1 for prompt in PROMPTS)
        assert native_calls(model) - before <= rows * model.config.num_hidden_layers
        assert native_calls(model) - before > 0.5 * rows * model.config.num_hidden_layers
        assert engine.largest_batch > 1
    finally:
        engine.stop()
    again = model.generate(
        torch.tensor([PROMPTS[2]]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert again[0, len(PROMPTS[2]) :].tolist() == want[2]  # the engine leaves it as it was


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    folder = tmp_path_factory.mktemp("native") / "tiny-moe"
    opened = open_model(make_model(folder, is_native=True))
    Session(opened.model, opened.tokenizer).generate([5, 6], Sampling(0.0), 3)  # layers are tried
    return opened


def engine_of(opened: OpenModel, pages: int = 64, **limits: Any) -> NativeEngine:
    model = NativeModel(opened.model, kv_dtype=limits.get("kv_dtype"))
    page = PAGE * model.token_bytes
    model.close()
    given = {"context": 640, "running": 16, "batch_tokens": 96, "cache_bytes": pages * page}
    engine = NativeEngine(opened, Limits(**(given | limits)))
    assert engine.cache_pages == (pages, pages) and engine.cache_bytes == pages * page
    engine.start()
    return engine


@pytest.fixture
def engine(served: OpenModel) -> Iterator[NativeEngine]:
    engine = engine_of(served)
    yield engine
    engine.stop()


def alone(opened: OpenModel, prompt: list[int], count: int, **limits: Any) -> list[Token]:
    """In an engine that has never seen another."""
    engine = engine_of(opened, **limits)
    try:
        return asyncio.run(answer(engine, prompt, count))
    finally:
        engine.stop()


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[3 + (7 * i + 5 * j) % 290 for j in range(n)] for i, n in enumerate(lengths)]


def test_answers_have_the_bits_that_they_have_alone(
    served: OpenModel, engine: NativeEngine
) -> None:
    """Log probabilities too; twice, the second time from pages that were kept."""
    prompts = prompts_of(1, 2, 63, 64, 65, 97, 128, 129, 200)
    want = [alone(served, prompt, 9) for prompt in prompts]
    assert asyncio.run(together(engine, prompts, 9)) == want
    assert asyncio.run(together(engine, prompts[::-1], 9)) == want[::-1]


def test_a_conversation_that_goes_on_is_answered_as_a_new_one(
    served: OpenModel, engine: NativeEngine
) -> None:
    """From the pages of its prompt and of its answer."""
    (prompt,) = prompts_of(100)
    made = asyncio.run(answer(engine, prompt, 60))
    longer = [*prompt, *(token.id for token in made), 7, 8, 9]
    pool = engine._schedule.pool
    pages, _ = pool.match(longer)
    pool.give_back(pages)
    assert len(pages) == 159 // PAGE
    assert asyncio.run(answer(engine, longer, 12)) == alone(served, longer, 12)


def test_answers_put_off_for_want_of_pages_go_on_with_the_same_bits(
    served: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven pages for six sequences of three."""
    engine = engine_of(served, 11)
    put_off = []
    own = engine._schedule._put_off
    monkeypatch.setattr(engine._schedule, "_put_off", lambda s: (put_off.append(s), own(s)))
    prompts = prompts_of(60, 61, 62, 63, 64, 65)
    try:
        got = asyncio.run(together(engine, prompts, 100))
        assert put_off
        assert engine.cache_pages == (11, 11)
    finally:
        engine.stop()
    assert got == [alone(served, prompt, 100) for prompt in prompts]


def test_sixteen_answers_in_a_pool_too_small_swap_their_pages(served: OpenModel) -> None:
    """Sixteen of two and three pages in eleven; as many again have no room to swap to."""
    prompts = prompts_of(*range(50, 66))
    want = [alone(served, prompt, 70) for prompt in prompts]
    for swap_pages in (40, 3):
        engine = engine_of(served, 11)
        swap = engine._schedule.swap
        swap.limit = swap_pages * engine._schedule.pool.page_bytes
        try:
            assert asyncio.run(together(engine, prompts, 70)) == want
            assert engine.cache_pages == (11, 11) and swap.num_bytes == 0
            assert 0 < swap.pages_in <= swap.pages_out
            registry = CollectorRegistry()
            KvCollector(engine, registry)
            counted = [
                registry.get_sample_value("ktk_kv_preemptions_total", {"pages": became})
                for became in ("swapped", "recomputed")
            ]
            assert counted == [swap.swapped_out, swap.recomputed]
            assert (swap.swapped_out > 0, swap.recomputed > 0) == (True, swap_pages == 3)
        finally:
            engine.stop()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp32"])
def test_in_every_dtype_of_keys_an_answer_has_the_bits_it_has_alone(
    served: OpenModel, kv_dtype: str
) -> None:
    """In a pool that is too small, so that pages go and come back; answers are long enough to meet
    on a busy machine.
    """
    prompts = prompts_of(60, 61, 62, 63)
    engine = engine_of(served, 6, kv_dtype=kv_dtype, swap_bytes=64 << 20, context=320)
    try:
        got = asyncio.run(together(engine, prompts, 48))
        assert engine.swap is not None and engine.swap.pages_in > 0
    finally:
        engine.stop()
    assert got == [alone(served, prompt, 48, kv_dtype=kv_dtype) for prompt in prompts]
    own = [alone(served, prompt, 48) for prompt in prompts]
    assert got != own
    found = describe_model(served.description.path, context=640, kv_dtype=kv_dtype)
    model = NativeModel(served.model, kv_dtype=kv_dtype)
    model.close()
    assert found.kv_bytes == 640 * model.token_bytes


def test_another_dtype_is_refused_where_torch_runs_the_layers() -> None:
    opened = tiny("qwen3_moe", packs_linears=False)
    with pytest.raises(ValueError, match="--kv-dtype int8 is for .*q_proj is a Linear that torch"):
        trial.start_engine(opened, replace(LIMITS, kv_dtype="int8"))
    with pytest.raises(ValueError, match="--kv-dtype int8 is for"):
        open_sequence(opened.model, "int8")
    own = {torch.float32: "fp32", torch.bfloat16: "bf16"}[opened.model.dtype]
    assert isinstance(open_sequence(opened.model, own), CachedSequence)
    with pytest.raises(ValueError, match="kv_dtype='int4': must be one of bf16, fp16, int8, fp32"):
        describe_model("no/such/model", kv_dtype="int4")


def test_who_leaves_is_taken_out_at_once(engine: NativeEngine, served: OpenModel) -> None:
    async def leave() -> list[Token]:
        stays = asyncio.ensure_future(answer(engine, prompts_of(70)[0], 30))
        for prompt in prompts_of(*range(30, 60)):
            leaves = engine.generate(prompt, GREEDY, 10**6)
            await anext(leaves)
            await leaves.aclose()
        begun = asyncio.ensure_future(answer(engine, [5] * 300, 10))
        await asyncio.sleep(0)
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
        made = await stays
        for _ in range(500):
            if engine.running == 0:
                break
            await asyncio.sleep(0.01)
        return made

    assert asyncio.run(leave()) == alone(served, prompts_of(70)[0], 30)
    assert engine.running == engine.unfinished == 0
    assert engine.cache_pages == (64, 64)


def test_a_pass_that_fails_ends_its_requests_and_no_later_one(
    served: OpenModel, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._native, "forward", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="division by zero"):
            asyncio.run(answer(engine, [5, 6], 3))
    assert engine.running == 0 and engine.cache_pages == (64, 64)
    assert asyncio.run(answer(engine, [5, 6], 3)) == alone(served, [5, 6], 3)


def test_requests_that_run_when_it_stops_fail_and_later_ones_are_refused(
    served: OpenModel,
) -> None:
    engine = engine_of(served)

    async def stop() -> None:
        parts = engine.generate([5, 6], GREEDY, 10**6)
        await anext(parts)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(RuntimeError, match="shutting down"):
            async for _ in parts:
                pass
        with pytest.raises(ServerBusy):
            await answer(engine, [5], 1)

    asyncio.run(stop())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"packs_linears": False}, "q_proj is a Linear that torch runs"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its angles depend on the longest sequence",
        ),
    ],
    ids=["torch's linear layers", "dynamic angles"],
)
def test_what_is_not_run_natively_is_batched_by_transformers(
    changes: dict[str, Any], says: str
) -> None:
    engine = trial.start_engine(tiny("qwen3_moe", **changes), LIMITS)
    try:
        assert isinstance(engine, BatchingEngine)
        assert says in str(engine.why_not_native)
    finally:
        engine.stop()


def test_windows_are_those_of_the_models_cache() -> None:
    opened = tiny("gpt_oss")
    opened.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, pad_token_id=0)
    model = NativeModel(opened.model)
    model.close()
    kinds = opened.model.config.layer_types
    assert "sliding_attention" in kinds and "full_attention" in kinds
    want = [WINDOW if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.spec.attention.window for layer in model.layers] == want
    opened.model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(CannotBatch, match="layers of chunked_attention"):
        NativeModel(opened.model)


def test_a_model_is_tried_before_it_is_run(served: OpenModel) -> None:
    with pytest.raises(CannotBatch, match="no token was decoded yet"):
        NativeModel(tiny("qwen3_moe").model)
    plain = AutoModelForCausalLM.from_config(tiny("qwen3_moe").model.config)
    with pytest.raises(CannotBatch):
        NativeModel(plain)
