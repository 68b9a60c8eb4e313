"""What each dtype of the KV cache costs in accuracy, beside fp32.

    python bench/kv_dtypes.py MODEL --tokens 8192 --window 1024

Each window of the text is computed anew, through pages as `ktk serve` has them; each row attends to
keys and values that were rounded, its own too. Everything else is as the model has it.
"""

from __future__ import annotations

import argparse
import contextlib
from types import SimpleNamespace
from typing import Any

import torch

from ktk.evaluate.distance import StoredLogits, distance
from ktk.generate.open import open_model
from ktk.generate.sampling import Sampling
from ktk.generate.session import Session
from ktk.integration.transformers.native_batch import NativeModel
from ktk.kv.pages import PAGE
from ktk.kv.pool import PagePool
from ktk.machine import openmp
from ktk.quantise.texts import stdlib_text, windows

CHUNK = 256  # rows of a pass


class Cached:
    """The model over a KV cache of a dtype, called as ``window_logits`` calls one."""

    def __init__(self, model: Any, kv_dtype: str, tokens: int) -> None:
        self.native = NativeModel(model, is_invariant=False, kv_dtype=kv_dtype)
        count = -(-tokens // PAGE)
        self._pool = PagePool(count, self.native.shapes, self.native.kv_dtype)
        self._pages = [
            page for page in (self._pool.take() for _ in range(count)) if page is not None
        ]

    @openmp.own_threads()
    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        del use_cache
        tokens, tables = ids[0].tolist(), [self._pool.tables(self._pages)]
        logits = []
        for first in range(0, len(tokens), CHUNK):
            rows = tokens[first : first + CHUNK]
            places = list(range(first, first + len(rows)))
            made, _ = self.native.forward(rows, [0] * len(rows), places, tables, range(len(rows)))
            logits.append(made)
        return SimpleNamespace(logits=torch.cat(logits)[None])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    given = parser.parse_args()
    opened = open_model(given.model)
    Session(opened.model, opened.tokenizer).generate([5, 6], Sampling(0.0), 3)  # layers are tried
    ids = opened.tokenizer(stdlib_text(), add_special_tokens=False, verbose=False)["input_ids"]
    texts = windows(ids, given.tokens // given.window, given.window)
    with contextlib.closing(
        StoredLogits(Cached(opened.model, "fp32", given.window), texts)
    ) as reference:
        print("KV dtype  bytes a token  KL mean, nats  KL 99 %  same top-1  perplexity")
        for name in ("fp32", "fp16", "bf16", "int8"):
            cached = Cached(opened.model, name, given.window)
            found = distance(cached, texts, reference)
            size = cached.native.token_bytes
            print(
                f"{name:8}  {size:13,}  {found.kl:13.2e}  {found.kl_p99:7.1e}  {found.top1:10.2%}"
                f"  {found.perplexity:10.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
