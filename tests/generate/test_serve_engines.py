"""The engines of `ktk serve` in this process: which one a model gets,
and that its tokens are those of generate().
"""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    MiniMaxConfig,
    Qwen3NextConfig,
)

from ktk.generate import trial
from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Engine, Limits, ServerBusy
from ktk.generate.open import OpenModel
from ktk.generate.sampling import Sampling, Token
from ktk.generate.sequential import SequentialEngine
from ktk.integration.transformers import batches
from make import transformers_cases as cases

LIMITS = Limits(context=320, running=4, batch_tokens=96, cache_bytes=64 << 20)
PROMPTS = [
    [3 + (7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate((2, 65, 90, 230))
]
NEW_TOKENS = 16

TOKENS = {**cases.TOKENS, "max_position_embeddings": 512}

# Families with layers that keep a state instead of keys and values.
RECURRENT = {
    "qwen3_next": Qwen3NextConfig(
        **cases.SHAPE,
        **TOKENS,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **cases.SHAPE,
        **TOKENS,
        num_key_value_heads=2,
        intermediate_size=64,
        shared_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=64,
        position_embedding_type="rope",
    ),
}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


def opened(model: Any) -> OpenModel:
    return OpenModel(model, Bytes(), SimpleNamespace(path="tiny", context=320))  # type: ignore[arg-type]


def recurrent(family: str) -> Any:
    torch.manual_seed(cases.SEED)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(RECURRENT[family])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    return model


def alone(model: Any, prompt: list[int]) -> list[int]:
    made = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


async def together(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    async def one(prompt: list[int]) -> list[int]:
        parts = engine.generate(prompt, Sampling(0.0), NEW_TOKENS)
        return [token.id async for tokens in parts for token in tokens]

    return list(await asyncio.gather(*map(one, prompts)))


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_batch_gives_the_tokens_of_generate(family: str) -> None:
    """Prompts shorter and longer than gpt-oss' window of 64,
    cut into chunks of what is left of 96 tokens.
    """
    model = cases.make_model(family, max_position_embeddings=512)
    want = [alone(model, prompt) for prompt in PROMPTS]
    engine = trial.start_engine(opened(model), LIMITS)
    try:
        assert engine.why_alone is None and isinstance(engine, BatchingEngine)
        assert asyncio.run(together(engine, PROMPTS)) == want
        assert engine.largest_batch > 1, "requests share a pass"
    finally:
        engine.stop()
    assert alone(model, PROMPTS[2]) == want[2]  # the engine leaves the model as it was


@pytest.mark.parametrize("family", RECURRENT)
def test_what_cannot_be_batched_is_served_one_after_another(family: str) -> None:
    model = recurrent(family)
    want = [alone(model, prompt) for prompt in PROMPTS]
    engine = trial.start_engine(opened(model), LIMITS)
    try:
        assert isinstance(engine, SequentialEngine)
        assert engine.why_alone and "linear_attention" in engine.why_alone
        assert type(model).__name__ in engine.why_alone
        # Twice: the second time, the cache of the last prompt is there.
        assert asyncio.run(together(engine, PROMPTS + PROMPTS)) == want + want
        assert engine.unfinished == engine.running == 0
    finally:
        engine.stop()


def test_a_model_with_a_cache_of_its_own_is_served() -> None:
    config = MiniMaxConfig(
        **cases.SHAPE,
        **TOKENS,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=32,
    )
    torch.manual_seed(cases.SEED)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    want = [alone(model, prompt) for prompt in PROMPTS]
    engine = trial.start_engine(opened(model), LIMITS)
    try:
        assert engine.why_alone and isinstance(engine, SequentialEngine)
        assert asyncio.run(together(engine, PROMPTS)) == want
    finally:
        engine.stop()


def test_an_edited_conversation_is_read_again_where_states_cannot_be_taken_back() -> None:
    from ktk.generate.session import Session

    for model in (
        recurrent("qwen3_next"),
        cases.make_model("gpt_oss", max_position_embeddings=512),
    ):
        session = Session(model, Bytes())
        session.generate(PROMPTS[3], Sampling(0.0), 4)
        edited = [*PROMPTS[3][:200], 9, 8, 7]
        fresh = Session(model, Bytes()).generate(edited, Sampling(0.0), 8)
        assert session.generate(edited, Sampling(0.0), 8).text == fresh.text


def test_a_wrong_batch_is_noticed_before_anybody_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = batches.paged_attention

    def blind(module: Any, query: Any, key: Any, value: Any, *more: Any, **kwargs: Any) -> Any:
        """Every other layer sees nothing."""
        out, none = right(module, query, key, value, *more, **kwargs)
        return out * (module.layer_idx % 2), none

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("attention has softcap")

    model = cases.make_model("qwen3_moe", max_position_embeddings=512)
    want = alone(model, PROMPTS[1])
    for attention, says in ((blind, "not that of generate()"), (broken, "softcap")):
        monkeypatch.setattr(batches, "paged_attention", attention)
        engine = trial.start_engine(opened(model), LIMITS)
        try:
            assert isinstance(engine, SequentialEngine)
            assert engine.why_alone and says in engine.why_alone
            assert asyncio.run(together(engine, PROMPTS[1:2])) == [want]
        finally:
            engine.stop()


def test_a_model_that_does_not_generate_is_an_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = cases.make_model("qwen3_moe")
    monkeypatch.setattr(model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(
        RuntimeError, match="Qwen3MoeForCausalLM cannot be served.*division by zero"
    ):
        trial.start_engine(opened(model), LIMITS)


def test_rounding_is_no_difference_and_another_token_is() -> None:
    def token(chosen: int, *logprobs: float) -> Token:
        return Token(chosen, logprobs[chosen], tuple(enumerate(logprobs)))

    want = [token(0, -0.7, -0.8, -3.0), token(1, -2.0, -0.2, -3.0)]
    assert trial.difference(want, want) is None
    # Another token that is as likely ends the comparison: what follows it is another text.
    assert trial.difference(want, [Token(1, -0.75), Token(2, -0.1)]) is None
    assert trial.difference(want, [Token(0, -0.7), Token(0, -0.2)]) == (
        "its token 2 of a trial is not that of generate()"
    )
    for wrong in (Token(0, -0.1), Token(2, -0.7), Token(7, -0.7)):
        assert trial.difference(want, [wrong, *want[1:]])
    assert trial.difference(want, [])


@pytest.fixture
def sequential() -> Any:
    engine = SequentialEngine(opened(recurrent("qwen3_next")), LIMITS)
    engine.start()
    yield engine
    engine.stop()


def test_leaving_ends_a_sequential_request_and_those_that_wait(sequential: Any) -> None:
    async def leave() -> list[list[int]]:
        first = sequential.generate(PROMPTS[0], Sampling(0.0), 10**6)
        await anext(first)
        waits = sequential.generate(PROMPTS[1], Sampling(0.0), 10**6)
        begun = asyncio.ensure_future(anext(waits))
        await asyncio.sleep(0.05)
        assert (sequential.running, sequential.waiting) == (1, 1)
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
        await first.aclose()
        return await asyncio.wait_for(together(sequential, PROMPTS[:1]), 20)

    want = alone(sequential.model, PROMPTS[0])
    assert asyncio.run(leave()) == [want]
    assert sequential.unfinished == 0


def test_of_requests_that_wait_the_lowest_priority_is_next(sequential: Any) -> None:
    async def order() -> list[int]:
        first = sequential.generate(PROMPTS[0], Sampling(0.0), 10**6)
        await anext(first)
        ended = []

        async def run(priority: int) -> None:
            async for _ in sequential.generate(PROMPTS[1], Sampling(0.0), 2, priority=priority):
                pass
            ended.append(priority)

        tasks = [asyncio.ensure_future(run(priority)) for priority in (2, 0, -1)]
        await asyncio.sleep(0.05)
        await first.aclose()
        await asyncio.gather(*tasks)
        return ended

    assert asyncio.run(order()) == [-1, 0, 2]


def test_a_failing_request_fails_alone(sequential: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = alone(sequential.model, PROMPTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(sequential.model, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(RuntimeError, match="division by zero"):
            asyncio.run(together(sequential, PROMPTS[:1]))
    assert asyncio.run(together(sequential, PROMPTS[:1])) == [want]


def test_engine_errors_reach_clients_as_json(
    sequential: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the engine is 500, a full queue 503, streamed or not."""
    from fastapi.testclient import TestClient

    from ktk.server.app import Access, build_app

    client = TestClient(build_app(opened(sequential.model), sequential, Access()))
    for stream in (False, True):
        body = {"prompt": "Why?", "max_tokens": 3, "stream": stream}
        with monkeypatch.context() as patch:
            patch.setattr(sequential.model, "generate", lambda *_, **__: 1 / 0)
            answer = client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
            assert "division by zero" in answer.json()["error"]["message"]
        with monkeypatch.context() as patch:
            patch.setattr(sequential, "limits", Limits(320, waiting=0))
            answer = client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "wait already" in answer.json()["error"]["message"]
    quiet = TestClient(client.app, raise_server_exceptions=False)
    with monkeypatch.context() as patch:
        patch.setattr(Bytes, "__call__", lambda *_: {}[0])
        answer = quiet.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "0")
    assert client.post("/v1/completions", json=body).status_code == 200


def test_a_stopped_engine_is_busy() -> None:
    engine = SequentialEngine(opened(recurrent("qwen3_next")), LIMITS)
    with pytest.raises(ServerBusy):
        asyncio.run(together(engine, PROMPTS[:1]))
    engine.start()
    engine.stop()
    with pytest.raises(ServerBusy):
        asyncio.run(together(engine, PROMPTS[:1]))
