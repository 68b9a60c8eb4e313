"""Texts as tokens and back, and as vectors: /tokenize, /detokenize, /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

import torch

from ktk.generate.engine import Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling
from ktk.generate.sequential import SequentialEngine
from ktk.generate.session import Session
from ktk.server.app import Access, build_app
from make.serving import TEXT, make_model

try:  # what openai's client needs, by its version
    import httpx2 as httpx
except ImportError:
    httpx = pytest.importorskip("httpx")

LIMITS = Limits(context=256, running=4, batch_tokens=64)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    opened = open_model(make_model(tmp_path_factory.mktemp("texts") / "tiny-moe", is_native=True))
    Session(opened.model, opened.tokenizer).generate([5, 6], Sampling(0.0), 3)
    return opened


@pytest.fixture(scope="module")
def app(opened: OpenModel) -> Iterator[Any]:
    engine = NativeEngine(opened, LIMITS)
    engine.start()
    yield build_app(opened, engine, Access())
    engine.stop()


def post(app: Any, path: str, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
    """(status, JSON) of each, all asked at once."""

    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            kind = {"content-type": "application/json"}  # httpx would not write \ud800
            asked = (client.post(path, content=json.dumps(b), headers=kind) for b in bodies)
            return await asyncio.gather(*asked)

    return [(answer.status_code, answer.json()) for answer in asyncio.run(ask())]


def vectors(app: Any, *texts: Any) -> np.ndarray:
    (answer,) = post(app, "/v1/embeddings", {"input": list(texts)})
    assert answer[0] == 200, answer
    assert [row["index"] for row in answer[1]["data"]] == list(range(len(texts)))
    return np.array([row["embedding"] for row in answer[1]["data"]])


def test_tokens_of_a_text_and_back(app: Any, opened: OpenModel) -> None:
    text = TEXT[2]
    ids = opened.tokenizer(text)["input_ids"]
    ((status, found),) = post(app, "/tokenize", {"prompt": text, "model": "tiny-moe"})
    assert status == 200
    assert found == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    assert post(app, "/detokenize", {"tokens": ids}) == [(200, {"prompt": text})]
    messages = [{"role": "user", "content": "Why?"}]
    template = "<|im_start|>user\nWhy?<|im_end|>\n"
    for begins, end in ((True, "<|im_start|>assistant\n"), (False, "")):
        body = {"messages": messages, "add_generation_prompt": begins, "return_token_strs": True}
        ((_, found),) = post(app, "/tokenize", body)
        assert len(found["token_strs"]) == found["count"]
        assert post(app, "/detokenize", found | {"tokens": found["tokens"]})[0][0] == 400
        ((_, back),) = post(app, "/detokenize", {"tokens": found["tokens"]})
        assert back["prompt"] == template + end


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "give a prompt, or messages"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/tokenize", {"prompt": "\ud800"}, "surrogate"),
        ("/detokenize", {"tokens": [10**9]}, "tokens has the token 1000000000"),
        ("/v1/embeddings", {"input": []}, "1 to 256"),
        ("/v1/embeddings", {"input": ""}, "empty"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions=3"),
        ("/v1/embeddings", {"input": [[5, -1]]}, "input has the token -1"),
        ("/v1/embeddings", {"input": ["a", "a " * 400]}, "context is 256"),
    ],
)
def test_what_cannot_be_is_a_400_that_says_so(app: Any, path: str, body: Any, said: str) -> None:
    ((status, answer),) = post(app, path, body)
    assert status == 400 and said in answer["error"]["message"]


def test_a_vector_is_the_last_tokens_hidden_state(app: Any, opened: OpenModel) -> None:
    found = vectors(app, *TEXT)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    for text, vector in zip(TEXT, found, strict=True):
        ids = torch.tensor([opened.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            out = opened.model(input_ids=ids, output_hidden_states=True)
        want = out.hidden_states[-1][0, -1].double().numpy()
        assert vector @ want / np.linalg.norm(want) > 0.999  # bf16
    assert abs(found @ found.T - np.eye(3)).max() > 0.01  # not by chance: they do differ
    assert (found @ found.T)[~np.eye(3, dtype=bool)].max() < 0.99


def test_a_vector_has_the_same_bits_beside_answers_and_other_vectors(app: Any) -> None:
    texts = [TEXT[0], TEXT[0] + TEXT[1], TEXT[1]]  # one begins as another
    alone = [vectors(app, text)[0] for text in texts]
    answers = [{"prompt": text, "max_tokens": 9} for text in TEXT]

    async def both() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = [client.post("/v1/completions", json=body) for body in answers]
            return await asyncio.gather(
                *asked, client.post("/v1/embeddings", json={"input": texts})
            )

    *made, found = asyncio.run(both())
    assert [answer.json()["usage"]["completion_tokens"] for answer in made] == [9] * 3
    got = [row["embedding"] for row in found.json()["data"]]
    assert np.array_equal(np.array(alone), np.array(got))
    usage = found.json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] > 30


def test_base64_and_tokens_give_the_same_vector(app: Any, opened: OpenModel) -> None:
    ids = opened.tokenizer(TEXT[0])["input_ids"]
    want = vectors(app, TEXT[0])[0]
    bodies = [
        {"input": TEXT[0], "encoding_format": "base64", "dimensions": 128, "user": "me"},
        {"input": ids, "encoding_format": "base64"},
        {"input": [ids], "encoding_format": "base64"},
    ]
    for status, answer in post(app, "/v1/embeddings", *bodies):
        assert status == 200 and answer["usage"]["total_tokens"] == len(ids)
        raw = base64.b64decode(answer["data"][0]["embedding"])
        assert np.array_equal(np.frombuffer(raw, "<f4"), want.astype("<f4"))


def test_an_engine_without_hidden_states_says_why(opened: OpenModel) -> None:
    engine = SequentialEngine(opened, LIMITS)
    engine.why_alone = "it has layers of linear attention"
    ((status, answer),) = post(
        build_app(opened, engine, Access()), "/v1/embeddings", {"input": "a"}
    )
    assert status == 400 and "linear attention" in answer["error"]["message"]
