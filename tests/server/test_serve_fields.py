"""No field of a request that would change its answer is ignored: it is served,
or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from make.serving import asking

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from ktk.generate import engine
from ktk.generate.engine import Limits
from ktk.generate.open import OpenModel, open_model
from ktk.generate.trial import start_engine
from ktk.server.fields import FIELDS, MESSAGE_FIELDS, refusal
from ktk.server.protocol import ChatRequest, CompletionRequest
from make.serving import make_model

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return open_model(make_model(tmp_path_factory.mktemp("fields") / "tiny-moe"))


@pytest.fixture(scope="module")
def client(opened: OpenModel) -> Iterator[TestClient]:
    yield from asking(opened, start_engine(opened, Limits(context=512, running=4)))


def chat(client: TestClient, **more: Any) -> tuple[int, Any]:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 4, **more}
    answer = client.post(CHAT, json=body)
    return answer.status_code, answer.json()


def plain(client: TestClient, **more: Any) -> dict[str, Any]:
    """The answer to a prompt whose greedy continuation is whole characters."""
    answer = client.post(
        PLAIN, json={"prompt": "def add", "temperature": 0, "max_tokens": 40, **more}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


# A value of each field that another server would act on.
ACTS: dict[str, Any] = {
    "best_of": 3,
    "echo": True,
    "suffix": "x",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "store": True,
    "service_tier": "flex",
    "structural_tag": {},
    "bad_words": ["x"],
    "bad_words_ids": [[5]],
    "allowed_token_ids": [5],
    "typical_p": 0.5,
    "repeat_penalty": 1.1,
    "length_penalty": 2,
    "use_beam_search": True,
    "mirostat": 2,
    "mirostat_tau": 3,
    "mirostat_eta": 0.2,
    "tfs_z": 0.5,
    "top_n_sigma": 1,
    "xtc_probability": 0.5,
    "dry_multiplier": 0.8,
    "dynatemp_range": 0.5,
    "samplers": ["top_k"],
    "penalize_nl": True,
    "min_keep": 1,
    "truncate_prompt_tokens": 5,
    "truncate": 5,
    "skip_special_tokens": False,
    "detokenize": False,
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "enable_thinking": False,
    "thinking": {"type": "enabled"},
    "continue_final_message": True,
    "add_generation_prompt": False,
    "documents": [{}],
    "add_special_tokens": True,
    "n_predict": 5,
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "stop_regex": "a",
    "n_probs": 3,
    "do_sample": True,
    "watermark": True,
    "details": True,
    "return_full_text": True,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "lora": [{"id": 0}],
    "lora_path": "x",
    "n_keep": 5,
    "t_max_predict_ms": 5,
    "n_indent": 2,
    "id_slot": 1,
    "ignore_eos_token": True,
    "temprature": 0.3,
    "prompt": "x",
    "repetition_detection": {},
    "kv_transfer_params": {},
    "vllm_xargs": {"a": 1},
    "logits_processors": ["x"],
    "reasoning_budget": 0,
    "reasoning_format": "none",
    "include_reasoning": False,
    "stop_sequences": ["a"],
    "early_stopping": True,
    "return_hidden_states": True,
    "custom_params": {},
    "input_ids": [5],
    "prompt_embeds": "x",
    "timings_per_token": True,
    "no_stop_trim": True,
}


@pytest.mark.parametrize("name", ACTS)
def test_a_field_that_would_change_the_answer_is_400_and_named(
    client: TestClient, name: str
) -> None:
    status, answer = chat(client, **{name: ACTS[name]})
    error = answer["error"]
    assert (status, error["param"]) == (400, name)
    assert error["message"].startswith(f"{name}={ACTS[name]!r:.80}: ")
    assert ";" in error["message"]  # what to do


def test_every_known_field_accepts_what_is_done_anyway(client: TestClient) -> None:
    _, want = chat(client)
    for name, known in FIELDS.items():
        for value in known.accepted if known.accepted is not None else ("anything", 3, [1]):
            status, answer = chat(client, **{name: value})
            assert status == 200, answer
            assert answer["choices"] == want["choices"]
        assert name in ChatRequest.model_fields or chat(client, **{name: None})[0] == 200
    for name, known in MESSAGE_FIELDS.items():
        for value in (*(known.accepted or ()), None):
            assert chat(client, messages=[{**QUESTION[0], name: value}])[0] == 200


def test_true_is_not_one_and_no_field_is_known_twice() -> None:
    assert refusal({"best_of": True}, FIELDS) and refusal({"echo": 0}, FIELDS)
    assert not refusal({"best_of": 1.0}, FIELDS)
    served = set(ChatRequest.model_fields) & set(CompletionRequest.model_fields)
    assert not served & set(FIELDS)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"messages": [{**QUESTION[0], "tool_calls": [{"id": "1"}]}]}, "tool_calls.0.function"),
        ({"messages": [{**QUESTION[0], "nmae": "x"}]}, "messages.0: nmae='x'"),
        ({"messages": [{**QUESTION[0], "reasoning": "x"}]}, "use reasoning_content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "x=1",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "continuous_usage_stats",
        ),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options: usage=True"),
    ],
)
def test_nested_fields_are_looked_at_too(
    client: TestClient, more: dict[str, Any], says: str
) -> None:
    status, answer = chat(client, **more)
    assert status == 400 and says in answer["error"]["message"], answer


def test_openais_client_makes_its_ordinary_calls(client: TestClient) -> None:
    openai = pytest.importorskip("openai")
    sent: list[dict[str, Any]] = []

    def post(request: Any) -> Any:
        sent.append(json.loads(request.content))
        return client.post(
            request.url.path, content=request.content, headers={"content-type": "application/json"}
        )

    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?", "name": "Ann"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": [{"type": "text", "text": "Oh?"}]},
    ]
    calls: list[dict[str, Any]] = [
        {},
        {"stream": True, "stream_options": {"include_usage": True}},
        {
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 1,
            "stop": ["x", "y"],
            "n": 1,
            "user": "u",
            "logit_bias": {},
        },
        {
            "response_format": {"type": "text"},
            "store": False,
            "metadata": {"a": "b"},
            "service_tier": "auto",
        },
        {"logprobs": True, "top_logprobs": 2, "presence_penalty": 0, "frequency_penalty": 0.0},
        {
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "safety_identifier": "s",
        },
    ]
    real = openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0)
    for call in calls:
        request = real._build_request(
            openai._models.FinalRequestOptions(
                method="post",
                url="/chat/completions",
                json_data={"messages": asked, "model": "tiny-moe", "max_tokens": 3, **call},
            )
        )
        answer = post(request)
        assert answer.status_code == 200, answer.text
    assert len(sent) == len(calls)


# --- what is served beside OpenAI's fields --------------------------------------------------------


def test_a_priority_reaches_the_engine(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class Seen(engine.Generation):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            given.append(self.priority)

    monkeypatch.setattr(engine, "Generation", Seen)
    for changes in ({"priority": -3}, {"priority": 7}, {}):
        assert chat(client, **changes)[0] == 200
    assert given == [-3, 7, 0]
    for wrong in (True, "1", 1.5):
        status, answer = chat(client, priority=wrong)
        assert status == 400 and answer["error"]["param"] == "priority"


def test_min_tokens_keeps_ends_away(client: TestClient, opened: OpenModel) -> None:
    """By a token that greedy decoding chooses early made an end."""
    free = plain(client, logprobs=0)
    first = opened.tokenizer(free["logprobs"]["tokens"][0])["input_ids"]
    assert len(first) == 1
    ended = plain(client, stop_token_ids=first)
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    for count in (1, 7):
        later = plain(client, stop_token_ids=first, min_tokens=count, logprobs=0)
        tokens = later["logprobs"]["tokens"]
        assert len(tokens) >= count
        assert free["logprobs"]["tokens"][0] not in tokens
    text = free["text"]
    stop = text[4:6]
    assert plain(client, stop=stop)["text"] == text[: text.index(stop)]
    late = plain(client, stop=stop, min_tokens=30)
    assert len(late["text"]) > text.index(stop) + 2 and text.startswith(late["text"])
    status, answer = chat(client, min_tokens=5)
    assert status == 400 and answer["error"]["param"] == "min_tokens"


def test_stop_tokens_end_the_text_and_may_be_in_it(client: TestClient, opened: OpenModel) -> None:
    free = plain(client, logprobs=0)
    tokens = free["logprobs"]["tokens"]
    last = next(t for t in tokens if t != tokens[0] and len(opened.tokenizer(t)["input_ids"]) == 1)
    asked = {"stop_token_ids": opened.tokenizer(last)["input_ids"], "logprobs": 0}
    before = "".join(tokens[: tokens.index(last)])
    for included, want in ((False, before), (True, before + last)):
        made = plain(client, **asked, include_stop_str_in_output=included)
        assert (made["text"], made["finish_reason"]) == (want, "stop")
        assert "".join(made["logprobs"]["tokens"]) == want
    stop = free["text"][5:8]
    made = plain(client, stop=[stop], include_stop_str_in_output=True)
    assert made["text"] == free["text"][: free["text"].index(stop) + 3]
    for wrong in ([-1], [10**9]):
        status, answer = chat(client, stop_token_ids=wrong)
        assert (status, answer["error"]["param"]) == (400, "stop_token_ids")


def test_a_special_tokens_text_stops_where_that_token_is_no_end(
    client: TestClient, opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktk.generate.sampling import Sampler
    from ktk.generate.text import stop_tokens

    special = opened.tokenizer.convert_tokens_to_ids("<|im_start|>")
    right = Sampler.choose

    def choose(self: Sampler, logits: Any) -> int:
        if len(self.tokens) == 5:
            logits = logits.clone()
            logits[special] = 1000
        return right(self, logits)

    monkeypatch.setattr(Sampler, "choose", choose)
    free = plain(client, logprobs=0)
    before = "".join(free["logprobs"]["tokens"][:5])
    assert free["text"].startswith(before) and free["finish_reason"] == "length"
    stopped = plain(client, stop=["<|im_start|>", "nowhere"])
    assert (stopped["text"], stopped["finish_reason"]) == (before, "stop")
    included = plain(client, stop="<|im_start|>", include_stop_str_in_output=True)
    assert included["text"] == before + "<|im_start|>"
    assert stop_tokens(opened.tokenizer, ["x", "<|im_start|>"]) == ({special}, ["x"])
    status, answer = chat(client, stop="<|im_start|>user")
    assert status == 400 and "give '<|im_start|>' alone" in answer["error"]["message"]


def test_ignore_eos_goes_on_after_the_end(
    client: TestClient, opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktk.generate.sampling import Sampler

    end = opened.tokenizer.eos_token_id
    right = Sampler.choose

    def choose(self: Sampler, logits: Any) -> int:
        logits = logits.clone()
        logits[end] = 1000 if len(self.tokens) == 3 else logits[end]
        return right(self, logits)

    monkeypatch.setattr(Sampler, "choose", choose)
    assert plain(client)["finish_reason"] == "stop"
    assert plain(client, ignore_eos=True)["finish_reason"] == "length"
    assert plain(client, min_tokens=4)["finish_reason"] == "length"


def test_top_k_of_minus_one_is_all_tokens(client: TestClient) -> None:
    drawn = [
        plain(client, temperature=1.0, seed=3, **more)["text"]
        for more in ({}, {"top_k": -1}, {"top_k": 0})
    ]
    assert len(set(drawn)) == 1
