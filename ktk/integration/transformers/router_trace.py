"""Traces of a model as it runs: which experts its tokens go to, for ``ktk.placement.residency``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.experts import find_experts, handle_of, listen
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.gguf_tokenizer import load_gguf_tokenizer
from ktk.integration.transformers.loading import load_model
from ktk.integration.transformers.tokens import load_tokenizer
from ktk.placement.residency.trace import Trace

PIECE = 256  # tokens of a text run at once


class RouterRecorder:
    """Collects the calls of a model's experts modules, in their order, of one text at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = [module for _, module in find_experts(model)]
        handles = [handle_of(module) for module in self.modules]
        packed = [handle.moe for handle in handles if handle is not None]
        if not packed or len(packed) < len(handles):
            raise ValueError(
                f"{type(model).__name__}: {len(packed)} of {len(handles)} experts modules run on "
                "ktk: all must, and one at least"
            )
        self.num_experts = max(moe.spec.num_experts for moe in packed)
        sizes = [moe.bits_per_weight * moe.spec.num_weights / 8 for moe in packed]
        self.expert_bytes = round(max(sizes))
        self._calls: list[tuple[int, np.ndarray, np.ndarray]] = []  # layer, ids, weights

    def note(self, layer: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """What to call with a layer's expert ids and weights, (num_tokens, top_k)."""

        def take(ids: torch.Tensor, weights: torch.Tensor) -> None:
            found = ids.detach().cpu().numpy().astype(np.int32)
            in_range = (found >= 0) & (found < self.num_experts)
            weight = weights.detach().float().cpu().numpy()
            self._calls.append((layer, np.where(in_range, found, -1), weight))

        return take

    def trace(self, source: str = "") -> Trace:
        """All that was noted so far. ValueError if that is nothing.

        A layer that sends tokens to fewer experts than another has -1 behind them.
        """
        if not self._calls:
            raise ValueError("nothing was recorded: run the model")
        top_k = max(ids.shape[1] for _, ids, _ in self._calls)

        def wide(rows: np.ndarray, fill: float) -> np.ndarray:
            return np.pad(rows, ((0, 0), (0, top_k - rows.shape[1])), constant_values=fill)

        many = [len(ids) for _, ids, _ in self._calls]
        seen = [0] * len(self.modules)
        tokens = []
        for (layer, _, _), count in zip(self._calls, many, strict=True):
            tokens.append(np.arange(seen[layer], seen[layer] + count))
            seen[layer] += count
        return Trace(
            num_layers=len(self.modules),
            num_experts=self.num_experts,
            layers=np.repeat(np.array([c[0] for c in self._calls], np.int32), many),
            calls=np.repeat(np.arange(len(many)), many),
            tokens=np.concatenate(tokens).astype(np.int64),
            expert_ids=np.concatenate([wide(ids, -1) for _, ids, _ in self._calls]),
            weights=np.concatenate([wide(weights, 0) for _, _, weights in self._calls]),
            expert_bytes=self.expert_bytes,
            source=source,
        )


@contextlib.contextmanager
def recording(model: Any) -> Iterator[RouterRecorder]:
    """While it lasts, every call of the model's experts is noted; results stay the same.

    model : its experts run on ktk and its decoder layers are its own, not fused
    (``fuse_decoder_layers`` sends new tokens past the experts modules). ValueError for any other.
    """
    recorder = RouterRecorder(model)
    try:
        for layer, module in enumerate(recorder.modules):
            listen(module, recorder.note(layer))
        yield recorder
    finally:
        for module in recorder.modules:
            listen(module, None)


def open_plain(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A model of a directory or a .gguf file whose decoder layers are its own, and its tokenizer.

    Raises as ``load_model`` and ``load_gguf_model``.
    """
    if os.fspath(path).endswith(".gguf"):
        return load_gguf_model(path).eval(), load_gguf_tokenizer(path)
    return load_model(path, only_text=True).eval(), load_tokenizer(path)


@torch.inference_mode()
def record_text(
    model: Any,
    token_ids: list[int],
    prompt: int,
    source: str = "",
    step: Callable[[int], None] | None = None,
) -> Trace:
    """The trace of a text in the calls that generating it makes: ``prompt`` tokens in one call,
    then one by one.

    The text is run in pieces, faster than one by one: where a token goes depends on those before it
    only. step : called with the number of tokens done. ValueError unless 1 <= prompt <=
    len(token_ids), and as ``recording``.
    """
    if not 1 <= prompt <= len(token_ids):
        raise ValueError(f"prompt={prompt}: must be 1..{len(token_ids)}, the text's tokens")
    with recording(model) as recorder:
        cache = DynamicCache(config=model.config)
        for start in range(0, len(token_ids), PIECE):
            piece = torch.tensor([token_ids[start : start + PIECE]])
            named = {**hf.last_logits(model), hf.CACHE: cache}
            model(input_ids=piece, use_cache=True, **named)
            if step is not None:
                step(start + piece.shape[1])
    trace = recorder.trace(source)
    if len(trace.layers) != len(token_ids) * trace.num_layers:
        raise ValueError(
            f"{len(trace.layers)} rows of {len(token_ids)} tokens in {trace.num_layers} layers "
            "were recorded: some went past the experts modules; load the model with load_model"
        )
    return trace.stepped(prompt)
