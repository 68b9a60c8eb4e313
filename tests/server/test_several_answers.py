"""Several answers to a request, several prompts in one: each as it would be alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from ktk.generate.open import OpenModel

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Why? " * 40}]


def post(client: TestClient, path: str = PLAIN, **body: Any) -> dict[str, Any]:
    asked = {"seed": 5, "temperature": 1.0, "max_tokens": 12, **body}
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    asked = {"seed": 5, "temperature": 1.0, "max_tokens": 12, "stream": True, **body}
    lines = client.post(path, json=asked).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_n_answers_are_those_of_seeds_in_turn_and_the_prompt_counts_once(
    client: TestClient,
) -> None:
    several = post(client, prompt="The experts", n=4)
    alone = [post(client, prompt="The experts", seed=5 + i) for i in range(4)]
    assert texts(several) == [texts(one)[0] for one in alone]
    assert len(set(texts(several))) == 4
    assert several["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert several["usage"]["completion_tokens"] == 48


def test_streams_of_several_answers_are_told_apart(client: TestClient) -> None:
    whole = post(client, CHAT, messages=QUESTION, n=3)["choices"]
    chunks = streamed(client, CHAT, messages=QUESTION, n=3, stream_options={"include_usage": True})
    for index in range(3):
        own = [
            c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index
        ]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(one["delta"].get("content", "") for one in own)
        assert text == whole[index]["message"]["content"]
        assert [one["finish_reason"] for one in own][-1] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 36


def test_several_prompts_are_answered_as_each_alone(client: TestClient, opened: OpenModel) -> None:
    prompts = ["The", "def add", "Zwölf"]
    alone = [text for one in prompts for text in texts(post(client, prompt=one, n=2))]
    assert texts(post(client, prompt=prompts, n=2)) == alone
    tokens = [opened.tokenizer(one)["input_ids"] for one in prompts]
    assert texts(post(client, prompt=tokens, n=2)) == alone
    chunks = streamed(client, PLAIN, prompt=prompts, n=2)
    made = [""] * 6
    for chunk in chunks:
        made[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert made == alone


def test_best_of_gives_the_likeliest(client: TestClient) -> None:
    every = post(client, prompt="The", n=5, logprobs=0)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return sum(found) / len(found)

    want = sorted(every, key=mean, reverse=True)[:2]
    best = post(client, prompt="The", n=2, best_of=5)
    assert texts(best) == [choice["text"] for choice in want]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 60


def test_echo_puts_the_prompt_before_the_answer(client: TestClient, opened: OpenModel) -> None:
    prompts = ["The experts", "def add"]
    plain = texts(post(client, prompt=prompts))
    want = [prompt + text for prompt, text in zip(prompts, plain, strict=True)]
    assert texts(post(client, prompt=prompts, echo=True)) == want
    ids = opened.tokenizer(prompts[0])["input_ids"]
    assert texts(post(client, prompt=ids, echo=True)) == want[:1]
    chunks = streamed(client, PLAIN, prompt=prompts[0], echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want[0]


def test_penalties_and_biases_reach_the_tokens(client: TestClient, opened: OpenModel) -> None:
    """Greedy, by a token that the model would not choose."""
    token = opened.tokenizer("Q", add_special_tokens=False)["input_ids"][0]
    asked: dict[str, Any] = {"prompt": "The", "temperature": 0, "logprobs": 0}
    biased = post(client, **asked, logit_bias={str(token): 100})
    assert texts(biased) == ["Q" * 12]
    mixed = post(client, **asked, logit_bias={str(token): 100}, frequency_penalty=2)
    assert texts(mixed) == texts(biased)  # 100 outweighs it
    greedy = post(client, **asked)
    free = greedy["choices"][0]["logprobs"]["tokens"]
    unlike = post(client, **asked, repetition_penalty=10)["choices"][0]["logprobs"]["tokens"]
    assert unlike != free and len(set(unlike)) >= len(set(free))
    assert texts(post(client, prompt="The", min_p=1.0)) == texts(greedy)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": []}, "prompt has 0 texts"),
        ({"prompt": ["a"] * 300}, "prompt has 300 texts"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "at least n"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "whole answers"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "n": 65}, "n: "),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias has the token 99999"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "min_p": 1.5}, "min_p"),
    ],
)
def test_what_makes_no_sense_is_400(client: TestClient, body: dict[str, Any], says: str) -> None:
    answer = client.post(PLAIN, json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_one_answer_that_fails_fails_the_request_and_frees_the_others(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktk.generate.sampling import Sampler

    right = Sampler.choose

    def choose(self: Sampler, logits: Any) -> int:
        if self.sampling.seed == 7 and len(self.tokens) == 3:
            raise RuntimeError("by purpose")
        return right(self, logits)

    monkeypatch.setattr(Sampler, "choose", choose)
    answer = client.post(PLAIN, json={"prompt": "a", "n": 4, "seed": 5, "max_tokens": 400})
    assert answer.status_code == 500 and "by purpose" in answer.json()["error"]["message"]
    state = client.get("/v1/ktk").json()
    assert state["requests_waiting"] == 0
    assert texts(post(client, prompt="a", seed=6))[0]
