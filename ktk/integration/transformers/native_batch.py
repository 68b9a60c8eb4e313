"""A model whose decoder layers all run natively, on rows of any sequences at once.

Where a model does nothing else around its layers, a pass is an embedding, one native call, a norm
and a head (``plain_pass.py``). Of others the model's own forward runs, with multipliers and heads
of its own; each decoder layer takes the pass's rows to ``DecoderLayer`` and the pages of their
sequences. A row's bits are the same whatever the other rows are, so prompts may be cut and answers
joined as a scheduler likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.batches import CannotBatch
from ktk.integration.transformers.decoder_layers import (
    FusedForward,
    Rows,
    decoder_layers,
    why_not_fused,
)
from ktk.integration.transformers.invariance import InvariantModel
from ktk.integration.transformers.model_config import rope_types
from ktk.integration.transformers.native_call import DTYPES
from ktk.integration.transformers.plain_pass import PlainPass
from ktk.kv.dtypes import KV_DTYPES, row_bytes
from ktk.ops.components import Attention
from ktk.ops.decoder import DecoderLayer, PageTables, Shapes

# Their angles depend on the longest sequence of the pass.
_UNSTEADY = ("dynamic", "longrope")


class NativeModel:
    """Raises CannotBatch, with the reason, for a model that cannot be run so.

    To be made once a token was decoded: what a layer computes is tried then. fused : its layers'
    forwards. layers : what runs each one. is_invariant : until ``close`` the model's products and
    functions outside its decoder layers are batch invariant, too. kv_dtype : a row of ``KV_DTYPES``
    that keys and values are kept in; None: the model's dtype.
    """

    def __init__(self, model: Any, is_invariant: bool = True, kv_dtype: str | None = None) -> None:
        self.model = model
        layers = [module for _, module in decoder_layers(model)]
        self.fused = [_fused(module) for module in layers]
        numbers = [layer.index for layer in self.fused]
        expected = model.config.get_text_config().num_hidden_layers
        if numbers != list(range(expected)):
            raise CannotBatch(f"{len(numbers)} of its {expected} layers run natively")
        for kind in rope_types(model.config.get_text_config()):
            if kind in _UNSTEADY:
                raise CannotBatch(f"its angles depend on the longest sequence ({kind})")
        if model.dtype not in DTYPES:
            raise CannotBatch(f"its dtype is {model.dtype}")
        self.dtype = DTYPES[model.dtype]
        self.kv_dtype = self.dtype if kv_dtype is None else KV_DTYPES[kv_dtype]
        self.layers = list(map(_with_window, self.fused, _windows(model)))
        inside = {part for module in layers for part in module.modules()}
        self._invariant = InvariantModel(model, inside) if is_invariant else None
        with torch.inference_mode():
            self._plain = PlainPass.of(model, self.fused, self.layers)

    def check_unchanged(self) -> None:
        """To be called before passes of a text. Raises BackendError if the model's layers are no
        longer what they were.
        """
        for layer in self.fused:
            layer.check_unchanged()

    def close(self) -> None:
        """Leave the model as it was."""
        if self._invariant is not None:
            self._invariant.undo()

    @property
    def shapes(self) -> list[Shapes]:
        """Of each layer's keys and values, as ``PagePool`` takes them."""
        return [layer.cached_shapes for layer in self.fused]

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""
        of_heads = [each for both in self.shapes for each in both]
        return sum(heads * row_bytes(width, self.kv_dtype) for heads, width in of_heads)

    @property
    def plain(self) -> PlainPass | None:
        """Passes in parts, of a model that takes them at this time."""
        return self._plain if self._plain is not None and self._plain.takes else None

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int],
        sequence: Sequence[int],
        position: Sequence[int],
        tables: Sequence[PageTables],
        wanted: Sequence[int],
        wants_hidden: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: logits of the rows ``wanted``, (len(wanted), vocab_size), and the hidden states
        that the head took, (len(wanted), hidden_size); none unless wanted. Of the model's dtype.

        tokens, sequence, position : of each row; a sequence's in order, those before in its pages.
        tables : of each sequence, with places for all its rows.
        wanted : at least one. meanwhile : called when the layers are about to run, which leave
        Python to other threads.
        """
        if (plain := self.plain) is not None:
            return plain.forward(tokens, sequence, position, tables, wanted, meanwhile)
        meanwhile()
        by_layer = list(zip(*tables, strict=True))
        rows = Rows(self.layers, by_layer, sequence, position)
        taken: list[torch.Tensor] = []
        hook = hf.before_head(self.model, taken.append) if wants_hidden else None
        for layer in self.fused:
            layer.rows = rows
        try:
            given = hf.row_inputs(tokens, position) | hf.logits_of(self.model, wanted)
            out = self.model(**given)
        finally:
            for layer in self.fused:
                layer.rows = None
            if hook is not None:
                hook.remove()

        def rows_of(found: torch.Tensor) -> torch.Tensor:
            own = found[0]
            return own if len(own) == len(wanted) else own[list(wanted)]

        logits = rows_of(out.logits)
        return logits, rows_of(taken[0]) if taken else logits[:, :0]


def _windows(model: Any) -> list[int | None]:
    """How many tokens each layer sees, as the model's own cache keeps them; None: all.

    One token at a time needs no window: the cache has no more than it sees.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise CannotBatch(f"it has layers of {', '.join(sorted(map(str, unknown)))}")
    windows: list[int | None] = []
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is hf.DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is hf.DynamicLayer:
            windows.append(None)
        else:
            raise CannotBatch(f"its cache has a {type(layer).__name__}")
    return windows


def _with_window(fused: FusedForward, window: int | None) -> DecoderLayer:
    if window is None:
        return fused.layer
    spec = fused.layer.spec
    if not isinstance(spec.attention, Attention):
        raise CannotBatch(f"{fused.name}: latent attention with a window of {window}")
    attention = replace(spec.attention, window=window)
    return DecoderLayer(spec.mapped(lambda c: attention if c is spec.attention else c))


def _fused(module: Any) -> FusedForward:
    forward = module.forward
    if not isinstance(forward, FusedForward):
        raise CannotBatch(str(why_not_fused(module)))
    reason = why_not_fused(module)
    if forward.is_unlike or reason is not None:
        raise CannotBatch(str(reason))
    if not forward.is_tried:
        raise CannotBatch("no token was decoded yet")
    return forward
