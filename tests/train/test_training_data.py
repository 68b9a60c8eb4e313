"""Lines of a training file as tokens and targets; what is wrong with a line is said with its
number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5")
from ktk.train.data import DataError, Example, read_examples
from ktk.train.order import Order, hold_out
from make.serving import make_tokenizer

CHAT = [
    {"role": "user", "content": "add 1 and 2"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "and 4?"},
    {"role": "assistant", "content": "7, of course"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def examples(tokenizer: Any, folder: Path, *lines: object, context: int = 64) -> list[Example]:
    path = folder / "data.jsonl"
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(encoded))
    return read_examples(path, tokenizer, context)


def targets(tokenizer: Any, example: Example) -> str:
    pairs = zip(example.ids, example.is_target, strict=True)
    text: str = tokenizer.decode([token for token, is_target in pairs if is_target])
    return text


def test_only_what_the_assistant_says_counts(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = examples(tokenizer, tmp_path, {"messages": CHAT}, context=512)
    assert targets(tokenizer, example) == "3<|im_end|>\n7, of course<|im_end|>\n"
    assert tokenizer.decode(list(example.ids)) == tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )


def test_an_answer_is_trained_as_it_will_be_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = examples(tokenizer, tmp_path, {"messages": CHAT[:2]}, context=512)
    asked = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert list(example.ids[: len(asked)]) == asked
    assert example.is_target == (False,) * len(asked) + (True,) * (len(example.ids) - len(asked))


def test_answers_that_a_template_changes_later_are_examples_of_their_own(tmp_path: Path) -> None:
    own = make_tokenizer()
    own.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}(thinking) {% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = examples(own, tmp_path, {"messages": CHAT}, context=512)
    assert [targets(own, one) for one in found] == [
        "(thinking) 3<|im_end|>\n",
        "(thinking) 7, of course<|im_end|>\n",
    ]


def test_a_completion_counts_with_the_token_that_ends_it(tokenizer: Any, tmp_path: Path) -> None:
    (example,) = examples(tokenizer, tmp_path, {"prompt": "def add(", "completion": "a, b):"})
    assert targets(tokenizer, example) == "a, b):<|im_end|>"
    assert tokenizer.decode(list(example.ids)) == "def add(a, b):<|im_end|>"


def test_a_long_text_is_cut_into_sequences(tokenizer: Any, tmp_path: Path) -> None:
    text = "the experts of a mixture " * 20
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    found = examples(tokenizer, tmp_path, {"text": text}, context=16)
    assert [len(one.ids) for one in found[:-1]] == [16] * (len(found) - 1)
    assert [token for one in found for token in one.ids] == whole[: sum(len(o.ids) for o in found)]
    assert all(all(one.is_target) for one in found)


def test_blank_lines_and_a_mark_of_utf8_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    line = json.dumps({"text": "one two"}).encode()
    assert len(examples(tokenizer, tmp_path, b"\xef\xbb\xbf" + line, b"", b"  ", line)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a', "line 2: is not JSON"),
        (b'{"text": "\xff"}', "line 2: is not UTF-8 at byte 10"),
        (b"[" * 100_000, "line 2: nested too deeply"),
        (b"[1]", "line 2: is a JSON list: must be an object"),
        (b"NaN", "line 2: is a JSON float"),
        (b"{}", 'must have "messages"'),
        (b'{"prompt": "a"}', "line 2: has ['prompt']"),
        (b'{"text": 3}', "'text' is a int: must be a string"),
        (b'{"text": ""}', "fewer than two tokens"),
        (b'{"text": "\\ud800 and more"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "completion": null}', "'completion' is a NoneType"),
        (b'{"messages": []}', "must be a list of messages"),
        (b'{"messages": ["hi"]}', "message 0 is a str"),
        (b'{"messages": [{"role": "user"}]}', "message 0: 'content' must be a string"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "no message is the assistant's"),
        (json.dumps({"prompt": "a long one " * 30, "completion": "b"}).encode(), "all prompt"),
    ],
)
def test_a_wrong_line_is_named(tokenizer: Any, tmp_path: Path, line: bytes, message: str) -> None:
    good = json.dumps({"text": "one two"}).encode()
    with pytest.raises(DataError) as caught:
        examples(tokenizer, tmp_path, good, line)
    assert message in str(caught.value) and "line 2: " in str(caught.value)


def test_a_file_without_examples_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no examples"):
        examples(tokenizer, tmp_path, b"\n\n")


def test_an_order_takes_every_example_once_in_an_epoch() -> None:
    order = Order(num_examples=7, per_step=3, seed=1)
    taken = [at for step in range(14) for at in order.of_step(step)]
    epochs = [taken[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order.of_step(5) == Order(7, 3, 1).of_step(5) != Order(7, 3, 2).of_step(5)
    assert [order.steps(epochs) for epochs in (0.1, 1, 3)] == [1, 3, 7]


def test_what_is_held_out_is_not_trained_on() -> None:
    every = [Example((at, 0), (True, True)) for at in range(20)]
    train, held_out = hold_out(every, 0.1, 0)
    assert (len(train), len(held_out)) == (18, 2)
    assert {one.ids for one in (*train, *held_out)} == {one.ids for one in every}
    assert hold_out(every, 0, 0) == (every, [])
    with pytest.raises(ValueError, match="too few"):
        hold_out(every[:1], 0.1, 0)
