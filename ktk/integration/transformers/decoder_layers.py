"""Decoding one token: a decoder layer's forward pass as one native call instead of some forty torch
operations.

What a layer computes is read from its modules' shapes and tried on numbers, never from names of
models: norms and routing when the model is opened (``decoder_specs``), the layer as a whole before
the first token it decodes (``decoder_trial``). A layer that comes out otherwise keeps its own
forward and the reason, and so does everything but a single new token without gradients and without
a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch

from ktk import fork
from ktk.errors import BackendError
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.adapters import ExpertAdapter, adapter_of
from ktk.integration.transformers.cache import growing_layer
from ktk.integration.transformers.decoder_specs import DescribedLayer, UnlikeError, describe_layer
from ktk.integration.transformers.decoder_trial import Trial
from ktk.integration.transformers.experts import handle_of, is_experts, unheard
from ktk.integration.transformers.linear import SharedForward
from ktk.integration.transformers.native_call import DTYPES, run_native, run_rows
from ktk.log import warn_once
from ktk.ops import linear
from ktk.ops.components import RoutedExperts
from ktk.ops.decoder import DecoderLayer, Pages, look_ahead

_KNOWN = {
    name
    for name in ("attention_mask", hf.POSITIONS, *hf.PLUMBING, *hf.PLACES)
    if not name.startswith("output_")
}


def fuse_decoder_layers(model: torch.nn.Module) -> list[str]:
    """Give every decoder layer that ``DecoderSpec`` describes its fast way to decode; their names.

    To be called again once weights were replaced. Only layers whose projections ktk runs
    (``replace_linears``, ``share_linears``) and whose experts are packed or in blocks. A warning
    names the others.
    """
    fused: list[str] = []
    unlike: dict[str, list[str]] = {}
    verdicts: dict[Hashable, str | None] = {}
    missing = linear.why_not()
    for name, module in decoder_layers(model):
        if isinstance(module.forward, FusedForward):
            module.forward = module.forward.own_forward
        try:
            if missing is not None:
                raise UnlikeError(missing)
            module.forward = FusedForward(module, describe_layer(module), name, verdicts)
        except (UnlikeError, BackendError, ValueError) as error:
            _unlike[module] = str(error)
            unlike.setdefault(str(error), []).append(name)
        else:
            fused.append(name)
    look_ahead([m.forward.described.spec for _, m in decoder_layers(model) if _is_fused(m)])
    for why, names in unlike.items():
        text = "%s: decoded by torch, layer by layer, which is slower: %s"
        warn_once(f"fused decode {type(model).__name__} {why}", text, some(names), why)
    return fused


def _is_fused(module: Any) -> bool:
    return isinstance(module.forward, FusedForward)


def decoder_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of each layer around experts, in order,
    and of every other module with a ``self_attn``.
    """
    around = {
        child
        for parent in model.modules()
        if isinstance(parent, torch.nn.ModuleList)
        and any(is_experts(m) for child in parent for m in child.modules() if m is not child)
        for child in parent
    }
    return [
        (name, module)
        for name, module in model.named_modules()
        if module in around or isinstance(getattr(module, "self_attn", None), torch.nn.Module)
    ]


# Why a layer has no fast way to decode, of those that ``fuse_decoder_layers`` has seen.
_unlike: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def fusion_report(model: torch.nn.Module) -> dict[str, str | None]:
    """Each decoder layer's name -> None if a new token passes it in one native call, else the
    reason why not.

    What shows only when a token is decoded counts from then on.
    """
    found: dict[str, str | None] = {}
    for name, module in decoder_layers(model):
        found[name] = why_not_fused(module)
    return found


def why_not_fused(module: Any) -> str | None:
    """``fusion_report`` of one layer."""
    if isinstance(module.forward, FusedForward):
        return module.forward.reason or module.forward.why_not_now()
    return _unlike.get(module, "fuse_decoder_layers was not called")


def native_calls(model: torch.nn.Module) -> int:
    """How often a decoder layer was run by one native call, tokens times layers."""
    forwards = (module.forward for _, module in decoder_layers(model))
    return sum(forward.calls for forward in forwards if isinstance(forward, FusedForward))


def some(names: list[str]) -> str:
    """The first three of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


Note = Callable[[Any], None]


class PassOfRows(Protocol):
    """A model's pass in which something else stands for its decoder layers."""

    def run(self, layer: FusedForward, x: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        """The layer's output. named : the other arguments of its forward."""


class Rows:
    """Rows of several sequences, as one pass of a model takes them.

    layers, pages : by a layer's number, what runs it, and the pages of each sequence. sequence,
    position : of each row, as ``DecoderLayer.forward`` takes them.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        pages: Sequence[Sequence[Pages]],
        sequence: Sequence[int],
        position: Sequence[int],
    ) -> None:
        self.layers, self.pages = layers, pages
        self.sequence, self.position = sequence, position
        self._turns: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}

    def run(self, layer: FusedForward, x: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        return layer.run_rows(self, x, named)

    def turns_of(self, positions: Any, rotary_dim: int) -> torch.Tensor:
        """float32 (2, rows, rotary_dim / 2) of what a layer is given as its position embeddings.

        Raises ValueError where they have an unknown shape.
        """
        found = self._turns.get((id(positions), rotary_dim))
        if found is None:
            turns = None if positions is None else turns_of(positions, rotary_dim)
            if turns is None or turns.shape[1] != len(self.sequence):
                raise ValueError("the position embeddings have an unknown shape")
            found = positions, turns  # positions: kept alive, so that its id stays its own
            self._turns[id(positions), rotary_dim] = found
        return found[1]


class FusedForward:
    """In place of a decoder layer's ``forward``.

    calls : native ones. reason : why the layer's own forward decodes now, None if the native call
        does.
    """

    def __init__(
        self,
        module: Any,
        described: DescribedLayer,
        name: str,
        verdicts: dict[Hashable, str | None],
    ) -> None:
        self.module, self.own_forward = module, module.forward
        self.described, self.name = described, name
        self.layer = DecoderLayer(described.spec)
        attention = described.spec.attention  # of a trial's other spec only the order differs
        self.cached_shapes, self.rotary_dim = attention.cached_shapes, attention.rotary.dim
        self.index = int(module.self_attn.layer_idx)
        forwards = (getattr(m, "forward", None) for m in module.modules())
        self.shared = [(f, f.linear) for f in forwards if isinstance(f, SharedForward)]
        self.parts = [(m._modules, dict(m._modules)) for m in module.modules() if m._modules]
        self.experts = [(m, handle_of(m)) for m in module.modules() if is_experts(m)]
        adapters = [adapter_of(m) for m, _ in self.experts]
        self.adapters = [(a, _state(a)) for a in adapters if a is not None]
        self.verdicts = verdicts  # kind of layer -> what was found
        self.is_tried, self.is_unlike = False, False
        self._untried = fork.Lock()
        self.calls = 0
        self.reason: str | None = None
        self.chosen: np.ndarray | None = None
        self.note: Note | None = None
        self.rows: PassOfRows | None = None  # while one runs

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if self.rows is not None:
            return self.rows.run(self, hidden_states, named)
        if self.is_tried:
            return self._run(hidden_states, *arguments, **named)
        with self._untried:  # a trial changes the module for a while: nobody else may run it then
            return self._run(hidden_states, *arguments, **named)

    def _run(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        is_new_token = hidden_states.shape[:-1] == (1, 1) and not arguments
        rows = self._rows(hidden_states, named) if is_new_token and not self.is_unlike else None
        if isinstance(rows, tuple) and not self.is_tried:
            rows = self._try(named) or rows
        if not isinstance(rows, tuple):
            if rows is not None:
                self._lost(rows)
            return self.own_forward(hidden_states, *arguments, **named)
        cache, turns = rows
        keys, values = cache.room()
        out = run_native(self.layer, hidden_states, turns, keys, values)
        cache.append(keys, values)
        self.calls += 1
        self.reason = None
        return out

    def run_rows(self, rows: Rows, x: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
        """What the layer makes of a pass's hidden states, given the forward's other arguments.

        Raises ValueError for what is not as it was tried, BackendError if the module has changed.
        """
        turns = rows.turns_of(named.get(hf.POSITIONS), self.rotary_dim)
        count, note = len(rows.sequence), self.note
        if x.shape[:-1] != (1, count) or x.dtype not in DTYPES:
            raise ValueError(f"{self.name}: hidden states are {x.dtype} {tuple(x.shape)}")
        self.check_unchanged()
        chosen = None if note is None else np.empty((count, self.top_k), np.int64)
        layer, pages = rows.layers[self.index], rows.pages[self.index]
        out = run_rows(layer, x, turns, pages, rows.sequence, rows.position, chosen)
        if note is not None:
            note(chosen)
        self.calls += count
        return out

    @property
    def top_k(self) -> int:
        """Experts that a token is routed to."""
        routed = [c for c in self.described.spec.components if isinstance(c, RoutedExperts)]
        return max((c.router.top_k for c in routed), default=0)

    def leave_chosen(self, chosen: np.ndarray | None, note: Note | None = None) -> None:
        """Have native calls of one token write its experts to ``chosen``, and those of rows of
        several sequences call ``note`` with theirs, (rows, top_k); None: no more.

        chosen : int64, contiguous, (top_k,) or longer. ValueError for any other.
        """
        if chosen is not None and not (
            chosen.dtype == np.int64 and chosen.flags.c_contiguous and chosen.size >= self.top_k
        ):
            raise ValueError(
                f"chosen is {chosen.dtype} {chosen.shape}: must be contiguous int64 ({self.top_k},)"
            )
        self.chosen, self.note = chosen, note
        self.layer.native.leave_chosen(chosen)

    def check_unchanged(self) -> None:
        """Raises BackendError if the module is no longer what was described."""
        if (changed := self.why_not_now()) is not None:
            raise BackendError(f"{self.name}: {changed}: open the model anew")

    def why_not_now(self) -> str | None:
        """Why the module is no longer what was described."""
        if any(now != described for now, described in self.parts):
            return "a part of it was replaced or added, such as an adapter"
        if any(handle_of(module) is not handle for module, handle in self.experts):
            return "its experts were packed anew: call fuse_decoder_layers again"
        if any(_state(adapter) != state for adapter, state in self.adapters):
            return "its experts' adapter was switched or moved: call fuse_decoder_layers again"
        return None

    def _rows(
        self, x: torch.Tensor, named: dict[str, Any]
    ) -> tuple[Any, torch.Tensor] | str | None:
        """The layer's cache and the position's (2, rotary_dim / 2) cosines and sines.

        None if this is no case for the fast way: a prompt of one token, a server's batch,
        gradients. Otherwise what keeps it from being one.
        """
        given = hf.cache_in(named)
        if given is None or hf.query_bounds(named) is not None:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or self._is_trained()):
            return None
        if (changed := self.why_not_now()) is not None:
            return changed
        if self.module.training:
            return "the layer is in training mode: call model.eval()"
        if x.dtype not in DTYPES or x.device.type != "cpu":
            return f"hidden states are {x.dtype} on {x.device.type}"
        for shared, described in self.shared:
            if shared.is_stale or shared.linear is not described:
                return "a linear layer has another weight by now: call fuse_decoder_layers again"
        for name, argument in named.items():
            if name not in _KNOWN and argument is not None and argument is not False:
                return f"the layer is given {name}"
        positions = named.get(hf.POSITIONS)
        if not torch.is_tensor(positions) and not (
            isinstance(positions, tuple) and len(positions) == 2
        ):
            return f"the layer is given no {hf.POSITIONS}"
        cache = growing_layer(given, self.index)
        if cache is None:
            return f"its keys are in a {type(given).__name__} that does not grow in place"
        if not cache.is_initialized or not cache.get_seq_length():
            return None
        keys, of_keys, of_values = cache.keys, *self.cached_shapes
        num_keys = keys.shape[-2]
        shapes = (1, of_keys[0], num_keys, of_keys[1]), (1, of_values[0], num_keys, of_values[1])
        if keys.shape != shapes[0] or cache.values.shape != shapes[1] or not num_keys:
            found = tuple(keys.shape), tuple(cache.values.shape)
            return f"the KV cache holds keys and values {found}, not {shapes}"
        if keys.dtype is not x.dtype or keys.device.type != "cpu":
            return (
                f"the KV cache is {keys.dtype} on {keys.device.type}, hidden states are {x.dtype}"
            )
        if not _sees_all(named.get("attention_mask"), num_keys + 1):
            return "a mask hides some of the keys"
        turns = _turns_of(positions, self.rotary_dim)
        return "its position embeddings have an unknown shape" if turns is None else (cache, turns)

    def _is_trained(self) -> bool:
        """Whether adapters that were frozen take gradients again."""
        return any(p.requires_grad for adapter, _ in self.adapters for p in adapter.parameters())

    def _lost(self, reason: str) -> None:
        """A new token that the native call could not take."""
        self.reason = reason
        warn_once(
            f"fused decode {reason}",
            "%s: a token was decoded by torch, which is slower: %s",
            self.name,
            reason,
        )

    def _try(self, named: dict[str, Any]) -> str | None:
        """Compare, once, thoroughly where no layer of this kind was before; how it differs."""
        kind = _kind(self.module)
        reason = self.verdicts.get(kind)
        if reason is None:
            trial = Trial(self.described, self.module, self.own_forward, named, self.index)
            with unheard(self.module):
                reason = trial.differs(is_thorough=kind not in self.verdicts)
            self.verdicts.setdefault(kind, reason)
            if reason is None and trial.spec is not self.described.spec:
                self.layer = DecoderLayer(trial.spec)
                self.layer.native.leave_chosen(self.chosen)
        self.is_unlike = reason is not None
        self.is_tried = True
        return reason


def _state(adapter: ExpertAdapter) -> tuple[bool, int]:
    """What a described layer takes of an adapter: whether it is on, where its first matrix lies."""
    return adapter.is_enabled, next(adapter.parameters()).data_ptr()


def _kind(module: torch.nn.Module) -> Hashable:
    """Alike for layers that run the same code with the same numbers: classes,
    shapes and all attributes except where the layer stands.
    """
    parts: list[Hashable] = []
    for name, part in module.named_modules():
        own = sorted(part.__dict__.items())
        numbers = [
            (k, v) for k, v in own if isinstance(v, int | float | str | None) and k != "layer_idx"
        ]
        code = [
            (k, type(v) if type(v).__module__.startswith("ktk.") else id(v))
            for k, v in own
            if callable(v) and not isinstance(v, torch.nn.Module)
        ]
        shapes = [(k, tuple(v.shape)) for k, v in part.named_parameters(recurse=False)]
        parts.append(
            (name, type(part), *numbers, *code, *shapes, id(getattr(part, "config", None)))
        )
    return tuple(parts)


_MISSING = object()


class _Last:
    """What the last tensor came to, for the many layers of one token; the tensor is not kept
    alive.
    """

    def __init__(self) -> None:
        self._tensor: Callable[[], Any] = lambda: None
        self._key, self._value = 0, None

    def get(self, tensor: torch.Tensor, key: int) -> Any:
        """What ``keep`` was given for it, or ``_MISSING``."""
        return self._value if self._key == key and self._tensor() is tensor else _MISSING

    def keep(self, tensor: torch.Tensor, key: int, value: Any) -> None:
        self._tensor, self._key, self._value = ref(tensor), key, value


_last_mask, _last_turns = _Last(), _Last()


def _sees_all(mask: Any, num_keys: int) -> bool:
    """Whether a mask, (1, 1, 1, keys) as eager attention adds it or of bool, hides none of the
    keys.
    """
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or mask.shape != (1, 1, 1, num_keys):
        return False
    sees = _last_mask.get(mask, num_keys)
    if sees is _MISSING:
        sees = bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())
        _last_mask.keep(mask, num_keys, sees)
    return bool(sees)


def _turns_of(positions: Any, rotary_dim: int) -> torch.Tensor | None:
    """``turns_of`` one position, (2, 1, rotary_dim / 2); made once for all layers of a token."""
    first = positions if torch.is_tensor(positions) else positions[0]
    turns: torch.Tensor | None = _last_turns.get(first, rotary_dim)
    if turns is _MISSING:
        turns = turns_of(positions, rotary_dim) if first.shape[:-1] == (1, 1) else None
        if turns is not None:
            _last_turns.keep(first, rotary_dim, turns)
    return turns


def turns_of(positions: Any, rotary_dim: int) -> torch.Tensor | None:
    """float32 (2, rows, rotary_dim / 2): cosines and sines of each position, given as these two or
    as complex numbers of them, (1, rows, width); None where their shape is another.
    """
    first = positions if torch.is_tensor(positions) else positions[0]
    half, width = rotary_dim // 2, first.shape[-1]
    both = [positions.real, positions.imag] if first.is_complex() else list(positions)
    if len(both) != 2 or first.ndim != 3 or len(first) != 1 or width not in (half, 2 * half):
        return None
    of_all = torch.stack([of[0] for of in both]).detach().float().cpu()
    turns = of_all[..., :half].contiguous()
    if width == rotary_dim and not torch.equal(turns, of_all[..., half:]):
        turns = of_all[..., ::2].contiguous()  # neighbours turn together: each angle comes twice
    return turns
