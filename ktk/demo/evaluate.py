"""How a model answers and how fast it is."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch

# Of SmolLM2's answer to it every token leads the next likeliest by 1.75 and more, where int8
# experts move that lead by 0.22 at most: an answer that differs is a fault, not rounding. Most
# questions are not like that ("What is the capital of France?": 0.12).
QUESTION = "Please tell me the capital of Germany."
ANSWER = "The capital of Germany is Berlin."


class Clock:
    """A transformers streamer that only notes when each token came: first the prompt,
    then one by one.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def decode_rate(self) -> float:
        """Tokens/s of the median step after the first token, which belongs to prefill.

        The median, since one pause of a busy machine would halve a mean. Raises ValueError below
        two tokens.
        """
        if len(self.times) < 3:
            raise ValueError(
                f"{len(self.times) - 1} tokens generated: must be at least 2 to time decoding"
            )
        return 1 / median(b - a for a, b in pairwise(self.times[1:]))


def prompt_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """(1, tokens): the question in the tokenizer's chat template, or plain where it has none."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        encoded = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int) -> tuple[str, float]:
    """The greedy answer up to its end-of-text token,
    and the decoding rate over all ``max_new_tokens``.
    """
    ids = prompt_ids(tokenizer, question)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    clock = Clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[],  # never stop early: the timing needs all the tokens
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        streamer=clock,
    )
    new = out[0, ids.shape[1] :].tolist()
    stop = next((i for i, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:stop], skip_special_tokens=True).strip()
    return text, clock.decode_rate()


@torch.no_grad()
def prefill_rate(model: Any, window: list[int], repeats: int = 5) -> float:
    """Tokens/s of reading a window into an empty cache; median of ``repeats``,
    after one run to warm up.
    """
    ids = torch.tensor([window])
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return len(window) / median(seconds[1:])
