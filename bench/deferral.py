"""What deferred experts cost: KL, top-1 agreement and perplexity of a model that decodes with them.

    python bench/deferral.py demo/smollm2-moe --packed demo/smollm2-moe-int8

Every token is decoded by itself, over a cache, as when text is generated: of a whole window at once
nearly every expert is some token's best, and few would be deferred. The reference is the float
model in float32, none deferred.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

from ktk.evaluate.distance import StoredLogits, distance
from ktk.evaluate.run import load_float
from ktk.integration.transformers import load_model
from ktk.integration.transformers.deferral import defer_experts
from ktk.integration.transformers.loading import packed_modules
from ktk.integration.transformers.names import CACHE
from ktk.quantise.texts import read_text, stdlib_text, windows


class TokenByToken:
    """Calls a model with one token after the other."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        cache = DynamicCache(config=self.model.config)
        steps = [self.model(token, **{CACHE: cache}).logits for token in ids.split(1, dim=1)]
        return SimpleNamespace(logits=torch.cat(steps, dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="the float model's directory")
    parser.add_argument("--text", type=Path, help="default: docstrings, as of ktk eval")
    parser.add_argument("--packed", type=Path, help="a packed directory of it; default: the model")
    parser.add_argument("--tokens", type=int, default=64, help="of a window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--deferred", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = stdlib_text() if options.text is None else read_text(options.text)
    ids = tokenizer(text)["input_ids"]
    cut = windows(ids, options.windows, options.tokens)
    reference = StoredLogits(TokenByToken(load_float(options.model)), cut)
    model = load_model(options.packed or options.model, dtype=torch.float32)
    print(f"{packed_modules(model)[0].kernel}, {len(cut)} windows of {options.tokens} tokens")
    print("deferred  layers      KL  99 %    top-1  perplexity")
    for most in options.deferred:
        layers = defer_experts(model, most)
        found = distance(TokenByToken(model), cut, reference)
        print(
            f"{most:8}  {layers:6}  {found.kl:6.4f}  {found.kl_p99:5.3f}  {found.top1:6.1%}  "
            f"{found.perplexity:10.2f}",
            flush=True,
        )
    reference.close()


if __name__ == "__main__":
    main()
