"""A served answer has the same bits whatever else is in the batch, was there before,
or shares the KV cache's pages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Limits
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling, Token
from ktk.integration.transformers.invariance import InvariantModel
from ktk.integration.transformers.paged_attention import BLOCK, Span, paged_attention
from ktk.kv.pages import PAGE
from make import transformers_cases as cases
from make.serving import make_model

pytestmark = pytest.mark.slow

ROWS = (1, 2, 3, 5, 7, 9, 16, 33, 130, 257)


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class SharedGate(torch.nn.Module):
    """As Qwen2's shared expert: one column, so that few rows are less than a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.sigmoid(self.gate(x))


def module_cases() -> dict[str, torch.nn.Module]:
    qwen, deepseek = cases.FAMILIES["qwen3_moe"], cases.FAMILIES["deepseek_v3"]
    config = Qwen2MoeConfig(hidden_size=64, hidden_act="silu")
    return {
        "linear": torch.nn.Linear(64, 96),
        "router": Qwen3MoeTopKRouter(qwen),
        "router that converts": DeepseekV3TopkRouter(deepseek),
        "mlp": Qwen2MoeMLP(config, 150),
        "shared gate": SharedGate(64),
        "gelu": torch.nn.Sequential(torch.nn.GELU(approximate="tanh")),
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", module_cases())
def test_rows_have_the_same_bits_in_any_batch(name: str, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(cases.SEED)
    module = module_cases()[name]
    for weight in module.parameters():
        weight.normal_(0, 0.15)
    module.to(dtype)
    x = torch.randn(600, 64).to(dtype)

    def outputs(rows: torch.Tensor) -> list[torch.Tensor]:
        made = module(rows)
        return [made] if isinstance(made, torch.Tensor) else list(made)

    own = outputs(x)
    invariant = InvariantModel(torch.nn.ModuleList([module]))
    whole = outputs(x)
    for mine, theirs in zip(whole, own, strict=True):
        if mine.is_floating_point():
            assert mine.dtype == theirs.dtype
            assert torch.allclose(
                mine, theirs, rtol=0.02, atol=1e-2 if dtype == torch.bfloat16 else 1e-4
            )
    for count in ROWS:
        for begin in (0, 1, 300):
            for part, all_rows in zip(
                outputs(x[begin : begin + count].clone()), whole, strict=True
            ):
                assert torch.equal(part, all_rows[begin : begin + count]), (count, begin)
    invariant.undo()
    assert "forward" not in vars(module)
    assert all(torch.equal(a, b) for a, b in zip(outputs(x), own, strict=True))


# --- attention ------------------------------------------------------------------------------------

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 16, 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=("plain", "sinks"))
@pytest.mark.parametrize("window", [None, 48, 64, 100])
def test_attention_does_not_depend_on_how_a_sequence_is_cut(
    window: int | None, sinks: bool, dtype: torch.dtype
) -> None:
    """Down to single tokens, and where what was answered is read again;
    against attention written out.
    """
    torch.manual_seed(cases.SEED)
    q = torch.randn(1, HEADS, LENGTH, WIDTH).to(dtype)
    k, v = (torch.randn(1, KV_HEADS, LENGTH, WIDTH).to(dtype) for _ in range(2))
    aux = torch.randn(HEADS).to(dtype) if sinks else None

    def run(cuts: list[int], prompt: int) -> torch.Tensor:
        parts, begin = [], 0
        for end in [*cuts, LENGTH]:
            oldest = 0 if window is None else max(0, begin - window + 1)
            out, _ = paged_attention(
                None,
                q[:, :, begin:end],
                k[:, :, oldest:end],
                v[:, :, oldest:end],
                None,
                sliding_window=window,
                s_aux=aux,
                cu_seq_lens_q=torch.tensor([0, end - begin]),
                cu_seq_lens_k=torch.tensor([0, end - oldest]),
                ktk_spans=[Span(begin, prompt)],
            )
            parts.append(out)
            begin = end
        return torch.cat(parts, 1)[0].transpose(0, 1)  # (heads, tokens, width)

    places = torch.arange(LENGTH)
    hidden = places[None] > places[:, None]
    if window is not None:
        hidden |= places[None] <= places[:, None] - window
    scores = q[0].double() @ k[0].double().repeat_interleave(2, 0).mT / WIDTH**0.5
    scores = scores.masked_fill(hidden, -torch.inf)
    if aux is not None:
        scores = torch.cat([scores, aux.double()[:, None, None].expand(-1, LENGTH, 1)], 2)
    want = scores.softmax(-1)[..., :LENGTH] @ v[0].double().repeat_interleave(2, 0)
    for prompt in (LENGTH, 150, 1):
        whole = run([], prompt)
        assert torch.allclose(whole.double(), want, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
        for cuts in (
            [1],
            [BLOCK],
            [BLOCK + 1],
            [63, 64, 65, 66],
            [37, 140],
            list(range(1, LENGTH)),
        ):
            assert torch.equal(run(cuts, prompt), whole), (prompt, cuts)


# --- the engine -----------------------------------------------------------------------------------

GREEDY = Sampling(0.0, num_logprobs=0)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return open_model(make_model(tmp_path_factory.mktemp("invariance") / "tiny-moe"))


def engine_of(opened: OpenModel, cache_pages: int = 64) -> BatchingEngine:
    page = (
        PAGE * 2 * 2 * 2 * 16 * opened.model.dtype.itemsize
    )  # layers, keys and values, heads, width
    limits = Limits(context=640, running=16, batch_tokens=96, cache_bytes=cache_pages * page)
    engine = BatchingEngine(opened, limits)
    assert engine.cache_bytes == cache_pages * page
    engine.start()
    return engine


async def answer(engine: BatchingEngine, prompt: list[int], count: int) -> list[Token]:
    parts = engine.generate(prompt, GREEDY, count)
    return [token async for tokens in parts for token in tokens]


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[3 + (7 * i + 5 * j) % 290 for j in range(n)] for i, n in enumerate(lengths)]


@pytest.fixture
def alone(opened: OpenModel) -> Any:
    """The tokens of a prompt in an engine that has never seen another."""

    def run(prompt: list[int], count: int) -> list[Token]:
        engine = engine_of(opened)
        try:
            return asyncio.run(answer(engine, prompt, count))
        finally:
            engine.stop()

    return run


def test_a_prompt_that_finds_its_pages_is_answered_as_when_it_was_new(
    opened: OpenModel, alone: Any
) -> None:
    """One token is left to be read of 65, 129: read alone it must have the bits that it has
    among others.
    """
    engine = engine_of(opened)
    try:
        for prompt in prompts_of((65, 129, 150)):
            first, again = (asyncio.run(answer(engine, prompt, 8)) for _ in range(2))
            assert first == again == alone(prompt, 8)
    finally:
        engine.stop()


def test_a_conversation_that_goes_on_is_answered_as_a_new_one(
    opened: OpenModel, alone: Any
) -> None:
    """Pages that hold a piece of an earlier answer were computed token by token,
    and are not its prompt's.
    """
    engine = engine_of(opened)
    try:
        prompt = prompts_of((100,))[0]
        made = asyncio.run(answer(engine, prompt, 60))
        longer = [*prompt, *(token.id for token in made), 7, 8, 9]
        assert asyncio.run(answer(engine, longer, 12)) == alone(longer, 12)
        cache = engine._batches._manager.batch_processor.cache
        kept = sum(len(a.ledger.hash_to_block) for a in cache.cache_allocators.values())
        assert kept == len(longer) // PAGE  # of the first one's, what holds its prompt only
    finally:
        engine.stop()


def test_answers_put_off_for_want_of_pages_go_on_with_the_same_bits(
    opened: OpenModel, alone: Any
) -> None:
    """Eleven pages for six sequences of three: some are taken out of the cache and read again."""
    engine = engine_of(opened, cache_pages=11)
    prompts = prompts_of((60, 61, 62, 63, 64, 65))
    put_off = []
    scheduler = engine._batches._manager.batch_processor.scheduler
    add = scheduler.add_waiting_request
    scheduler.add_waiting_request = lambda state: (
        put_off.append(state._true_initial_tokens),
        add(state),
    )

    async def together() -> list[list[Token]]:
        return list(await asyncio.gather(*(answer(engine, prompt, 100) for prompt in prompts)))

    try:
        assert asyncio.run(together()) == [alone(prompt, 100) for prompt in prompts]
        assert any(put_off)
    finally:
        engine.stop()


def test_a_request_that_nobody_waits_for_is_taken_out(opened: OpenModel) -> None:
    """Its cancellation may come before the manager knows it, and is then forgotten."""
    engine = engine_of(opened)
    try:
        engine._batches._manager.add_request([5] * 70, "nobody's", 10**6, streaming=True)
        end = time.monotonic() + 5
        while engine.cache_pages[0] == engine.cache_pages[1] and time.monotonic() < end - 4:
            time.sleep(0.001)
        while engine.running or engine.cache_pages[0] < engine.cache_pages[1]:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert engine.is_alive
    finally:
        engine.stop()
