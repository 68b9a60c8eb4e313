"""How a model answers, how fast it is and how far its predictions are from another's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

# The language is named because SmolLM2's first tokens of an English and of a French answer are level without it:
# the checkpoint's own bf16 rounding then decides, not the experts.
QUESTION = "What is the capital of France? Answer in English."
_ROWS = 64  # positions whose float64 distributions are in memory at once


class Clock:
    """A transformers streamer that only notes when each token came: first the prompt, then one by one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def decode_rate(self) -> float:
        """Tokens/s of the median step after the first token, which belongs to prefill.

        The median, since one pause of a busy machine would halve a mean. Raises ValueError below two tokens.
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
    """The greedy answer up to its end-of-text token, and the decoding rate over all ``max_new_tokens``."""
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
    """Tokens/s of reading a window into an empty cache; median of ``repeats``, after one run to warm up."""
    ids = torch.tensor([window])
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return len(window) / median(seconds[1:])


@torch.no_grad()
def window_logits(model: Any, window: list[int]) -> torch.Tensor:
    """float32 (tokens, vocabulary)."""
    logits: torch.Tensor = model(torch.tensor([window]), use_cache=False).logits[0]
    return logits.float()


@dataclass(frozen=True)
class Distance:
    """kl: mean Kullback-Leibler divergence per token, in nats. top1: share of tokens, 0..1."""

    kl: float
    top1: float
    num_tokens: int


def distance(model: Any, windows: list[list[int]], reference: list[torch.Tensor]) -> Distance:
    """How far the model's next-token distributions are from the reference's logits on the same windows."""
    total, same, count = 0.0, 0, 0
    for window, logits in zip(windows, reference, strict=True):
        got = window_logits(model, window)
        for start in range(0, len(window), _ROWS):
            p = torch.log_softmax(
                logits[start : start + _ROWS].double(), dim=-1
            )  # (rows, vocabulary)
            q = torch.log_softmax(got[start : start + _ROWS].double(), dim=-1)
            total += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(window)
    return Distance(total / count, same / count, count)
