"""What goes wrong in one request is that request's error: the others get their bits,
and the server stays healthy.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

import torch

from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Engine, Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import SMALLEST_TEMPERATURE, Sampler, Sampling
from ktk.generate.sequential import SequentialEngine
from ktk.generate.session import Session
from ktk.generate.text import Detokenizer, StopStrings
from ktk.server import service as served
from ktk.server.answer import CompletionLogprobs
from ktk.server.app import Access, build_app
from make.serving import make_model

try:  # what openai's client needs, by its version
    import httpx2 as httpx
except ImportError:
    httpx = pytest.importorskip("httpx")

LIMITS = Limits(context=256, running=17, batch_tokens=64)
VICTIM: contextvars.ContextVar[bool] = contextvars.ContextVar("VICTIM", default=False)
SEED = 666  # the victim's, by which it is known in the generation thread
PLACES = {
    "making the sampler": (Sampler, "__init__"),
    "choosing": (Sampler, "choose"),
    "log probabilities": (Sampler, "_token"),
    "text": (Detokenizer, "add"),
    "the end of the text": (Detokenizer, "finish"),
    "stop strings": (StopStrings, "add"),
    "the end of stop strings": (StopStrings, "finish"),
    "the prompt": (served, "encode"),
    "the answer's log probabilities": (CompletionLogprobs, "of"),
}


@pytest.fixture(scope="module", params=[NativeEngine, BatchingEngine, SequentialEngine])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def opened(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    folder, is_native = tmp_path_factory.mktemp("failures") / "tiny-moe", kind is NativeEngine
    opened = open_model(make_model(folder, is_native=is_native))
    if is_native:
        Session(opened.model, opened.tokenizer).generate([5, 6], Sampling(0.0), 3)
    return opened


@pytest.fixture(scope="module")
def engine(kind: Any, opened: OpenModel) -> Iterator[Engine]:
    engine = kind(opened, LIMITS)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def app(opened: OpenModel, engine: Engine) -> Any:
    return build_app(opened, engine, Access())


async def ask(app: Any, is_victim: bool, **body: Any) -> tuple[int, str]:
    VICTIM.set(is_victim)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/completions", json=body)
        return answer.status_code, answer.text


async def beside_sixteen(app: Any, **victim: Any) -> tuple[tuple[int, str], list[str]]:
    """The victim's answer, and the others' texts."""
    asked = [
        {"prompt": f"The {i} experts", "max_tokens": 6, "temperature": i % 3 / 2, "seed": i}
        for i in range(16)
    ]
    tasks = [asyncio.create_task(ask(app, False, **body)) for body in asked[:8]]
    tasks.append(asyncio.create_task(ask(app, True, prompt="Why?", max_tokens=6, **victim)))
    tasks += [asyncio.create_task(ask(app, False, **body)) for body in asked[8:]]
    answers = await asyncio.gather(*tasks)
    own = answers.pop(8)
    assert {status for status, _ in answers} == {200}
    return own, [json.loads(text)["choices"][0]["text"] for _, text in answers]


@pytest.fixture(scope="module")
def want(app: Any) -> list[str]:
    """The sixteen's texts where nothing fails."""
    (status, _), texts = asyncio.run(beside_sixteen(app, seed=SEED))
    assert status == 200
    return texts


async def settle(engine: Engine) -> None:
    for _ in range(400):
        free, pages = engine.cache_pages
        if engine.unfinished == engine.running == 0 and free == pages:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("pages are still held")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_anywhere_is_one_requests_error(
    app: Any,
    engine: Engine,
    want: list[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    stream: bool,
) -> None:
    owner, name = PLACES[place]
    right = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        sampling = args[1] if name == "__init__" else getattr(args[0], "sampling", None)
        if VICTIM.get() or getattr(sampling, "seed", None) == SEED:
            raise ZeroDivisionError("injected")
        return right(*args, **kwargs)

    async def run() -> None:
        victim = {"seed": SEED, "logprobs": 1, "stop": "never", "stream": stream}
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            (status, text), others = await beside_sixteen(app, **victim)
        assert others == want
        assert engine.is_alive
        await settle(engine)
        assert "injected" in text
        if status == 200:  # the stream had begun
            assert stream and text.endswith("data: [DONE]\n\n")
            assert json.loads(text.split("\n\n")[-3][6:])["error"]["type"] == "server_error"
        else:
            assert status == 500 and json.loads(text)["error"]["type"] == "server_error"
        assert (await ask(app, True, prompt="Why?", max_tokens=6, **victim))[0] == 200

    asyncio.run(run())


TINY = (1e-320, 1.1e-38, 1.2e-38)


@pytest.mark.parametrize("top_p", [None, 1e-320, 0.5])
def test_tiny_temperatures_are_greedy_and_disturb_nobody(
    app: Any, engine: Engine, want: list[str], top_p: float | None
) -> None:
    async def run() -> None:
        _, text = await ask(app, True, prompt="Why?", max_tokens=6, temperature=0)
        greedy = json.loads(text)["choices"][0]["text"]
        for temperature in TINY:
            more = {} if top_p is None else {"top_p": top_p}
            (status, text), others = await beside_sixteen(app, temperature=temperature, **more)
            assert (status, others) == (200, want), temperature
            assert json.loads(text)["choices"][0]["text"] == greedy, temperature
        assert engine.is_alive

    asyncio.run(run())


def test_every_temperature_chooses_a_token_of_any_logits() -> None:
    """Large ones, equal ones, forbidden ones."""
    tiny = float(SMALLEST_TEMPERATURE)
    for temperature in (5e-324, tiny / 2, tiny, 1e-20, 1e-3, 0.5, 2.0):
        for logits in (
            torch.tensor([3e38, -3e38, 0.0, 1.0]),
            torch.tensor([-1.0, -1.0, -2.0, -torch.inf]),
            torch.tensor([-1e30, -2e30, -torch.inf, -3e30]),
        ):
            for more in ({}, {"top_p": 1e-300}, {"top_k": 2}):
                sampler = Sampler(Sampling(temperature, seed=1, **more))
                chosen = {sampler.choose(logits) for _ in range(20)}
                assert all(logits[token] > -torch.inf for token in chosen)
                assert temperature > 1e-3 or chosen <= {0, 1}
                if temperature <= tiny and logits[0] != logits[1]:
                    assert chosen == {0}
