"""Decoding one token: a decoder layer's forward pass as one native call instead of some forty torch operations.

What a layer computes is read from its modules' shapes and tried on numbers, never from names of models: norms and routing on
random inputs when the model is opened, the layer as a whole on the first token it decodes, beside its own forward, which
then gives the result. A layer that comes out otherwise keeps its own forward, and so does everything but a single new
token without gradients and without a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ktk import linear
from ktk._log import warn_once
from ktk.decoder import HEAD_STEP, DecoderLayer, DecoderSpec, Mlp
from ktk.errors import BackendError
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.activations import recognise_gate
from ktk.integration.transformers.cache import growing_layer
from ktk.integration.transformers.experts import handle_of, is_experts
from ktk.integration.transformers.linear import KtkLinear, SharedForward, linear_of
from ktk.linear import Linear
from ktk.routing import MAX_GROUPS, SCORES, Router, route

log = logging.getLogger("ktk")

PROBE_TOKENS = 64
LOGITS = 1.5  # standard deviation of the probe's logits: large enough to tell scores apart, small enough for bf16
# bf16 logits: of the probe's tokens some lie near the edge between two experts, and weights are rounded.
LEAST_SAME, SAME_WEIGHT = 0.6, 0.025
# So may a token be that is decoded: a layer fails when several differ, three for each way of rotating.
TRIALS = 6
CLOSE = 0.05  # of what a layer adds to its input, relative, root mean square: bf16 and rounded activations give 0.005 to 0.02
_DTYPES = {torch.float32: "f", torch.float16: "e", torch.bfloat16: "H"}


class _UnlikeError(Exception):
    """Why a module is not what a DecoderSpec describes."""


def fuse_decoder_layers(model: torch.nn.Module) -> list[str]:
    """Give every decoder layer that ``DecoderSpec`` describes its fast way to decode; their names.

    To be called again once weights were replaced. Only layers whose projections ktk runs (``replace_linears``, ``share_linears``) and whose experts are packed or in blocks. A warning names the others.
    """
    fused: list[str] = []
    unlike: dict[str, list[str]] = {}
    missing = linear.why_not()
    for name, module in decoder_layers(model):
        if isinstance(module.forward, FusedForward):
            module.forward = module.forward.own_forward
        try:
            if missing is not None:
                raise _UnlikeError(missing)
            module.forward = FusedForward(module, _layer_of(module), name)
        except (_UnlikeError, BackendError, ValueError) as error:
            _unlike[module] = str(error)
            unlike.setdefault(str(error), []).append(name)
        else:
            fused.append(name)
    for why, names in unlike.items():
        text = "%s: decoded by torch, layer by layer, which is slower: %s"
        warn_once(f"fused decode {type(model).__name__} {why}", text, some(names), why)
    return fused


def decoder_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of each layer around experts, in order, and of every other module with a ``self_attn``."""
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
    """Each decoder layer's name -> None if a new token passes it in one native call, else the reason why not.

    What shows only when a token is decoded counts from then on.
    """
    found: dict[str, str | None] = {}
    for name, module in decoder_layers(model):
        if isinstance(module.forward, FusedForward):
            found[name] = module.forward.reason
        else:
            found[name] = _unlike.get(module, "fuse_decoder_layers was not called")
    return found


def native_calls(model: torch.nn.Module) -> int:
    """How often a decoder layer was run by one native call, tokens times layers."""
    forwards = (module.forward for _, module in decoder_layers(model))
    return sum(forward.calls for forward in forwards if isinstance(forward, FusedForward))


def some(names: list[str]) -> str:
    """The first three of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class FusedForward:
    """In place of a decoder layer's ``forward``.

    calls : native ones. reason : why the layer's own forward decodes now, None if the native call does.
    """

    def __init__(self, module: Any, layer: DecoderLayer, name: str) -> None:
        self.module, self.own_forward = module, module.forward
        self.layer, self.name = layer, name
        self.index = int(module.self_attn.layer_idx)
        forwards = (getattr(m, "forward", None) for m in module.modules())
        self.shared = [(f, f.linear) for f in forwards if isinstance(f, SharedForward)]
        self.trials = TRIALS  # 0: it computes what the layer does
        self.other = DecoderLayer(replace(layer.spec, is_interleaved=True))
        self.is_unlike = False
        self.calls = 0
        self.reason: str | None = None

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        is_new_token = hidden_states.shape[:-1] == (1, 1) and not arguments
        rows = self._rows(hidden_states, named) if is_new_token and not self.is_unlike else None
        if not isinstance(rows, tuple):
            if rows is not None:
                self._lost(rows)
            return self.own_forward(hidden_states, *arguments, **named)
        cache, turns = rows
        keys, values = cache.room()
        out = self._run(hidden_states, turns, keys, values)
        self.calls += 1
        self.reason = None
        if self.trials:
            return self._try(hidden_states, named, out, keys[:, :, -1].clone(), values[:, :, -1].clone())  # fmt: skip
        cache.append(keys, values)
        return out

    def _rows(
        self, x: torch.Tensor, named: dict[str, Any]
    ) -> tuple[Any, torch.Tensor] | str | None:
        """The layer's cache and the position's (2, rotary_dim / 2) cosines and sines.

        None if this is no case for the fast way: a prompt of one token, gradients. Otherwise what keeps it from being one.
        """
        given = hf.cache_in(named)
        if given is None or (torch.is_grad_enabled() and x.requires_grad):
            return None
        if self.module.training:
            return "the layer is in training mode: call model.eval()"
        if x.dtype not in _DTYPES or x.device.type != "cpu":
            return f"hidden states are {x.dtype} on {x.device.type}"
        if any(f.is_stale or f.linear is not linear for f, linear in self.shared):
            return "a linear layer has another weight by now: call fuse_decoder_layers again"
        positions = named.get(hf.POSITIONS)
        if not isinstance(positions, tuple) or len(positions) != 2:
            return f"the layer is given no {hf.POSITIONS}"
        cache = growing_layer(given, self.index)
        if cache is None:
            return f"its keys are in a {type(given).__name__} that does not grow in place"
        if not cache.is_initialized or not cache.get_seq_length():
            return None
        spec, keys = self.layer.spec, cache.keys
        shape = (1, spec.num_kv_heads, keys.shape[-2], spec.head_dim)
        if keys.shape != shape or cache.values.shape != shape or not keys.shape[-2]:
            return f"the KV cache holds keys {tuple(keys.shape)} and values {tuple(cache.values.shape)}, not {shape}"
        if keys.dtype is not x.dtype or keys.device.type != "cpu":
            return (
                f"the KV cache is {keys.dtype} on {keys.device.type}, hidden states are {x.dtype}"
            )
        if not _sees_all(named.get("attention_mask"), keys.shape[-2] + 1):
            return "a mask hides some of the keys"
        turns = _turns_of(positions, spec.rotary_dim)
        return "its position embeddings have an unknown shape" if turns is None else (cache, turns)

    def _lost(self, reason: str) -> None:
        """A new token that the native call could not take."""
        self.reason = reason
        warn_once(
            f"fused decode {reason}",
            "%s: a token was decoded by torch, which is slower: %s",
            self.name,
            reason,
        )

    def _run(
        self, x: torch.Tensor, turns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        x = x.detach().contiguous()
        out = torch.empty_like(x)
        at = turns.data_ptr()
        self.layer.native.forward(
            _DTYPES[x.dtype], x.data_ptr(), at, at + turns.stride(0) * 4, keys.data_ptr(), keys.stride(1),
            values.data_ptr(), values.stride(1), keys.shape[-2] - 1, out.data_ptr(),
        )  # fmt: skip
        return out

    def _try(
        self,
        x: torch.Tensor,
        named: dict[str, Any],
        out: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> Any:
        """The layer's own result; whether the fast way's is as near as rounding allows decides what comes after."""
        own = self.own_forward(x, **named)
        cache = growing_layer(hf.cache_in(named), self.index)
        errors = [float("inf")]
        if isinstance(own, torch.Tensor) and own.shape == out.shape:
            errors = [
                _relative(out.float() - x.float(), own.float() - x.float()),
                _relative(key.float(), cache.keys[:, :, -1].float()),
                _relative(value.float(), cache.values[:, :, -1].float()),
            ]
        log.debug("%s: errors of the native call %s", self.name, errors)
        if max(errors) <= CLOSE:
            self.trials = 0
        else:
            self.trials -= 1
            self.is_unlike = not self.trials
            self.layer, self.other = self.other, self.layer
            if self.is_unlike:
                self._lost(f"its own forward differs from the native call by {max(errors):.3f}")
        return own


def _relative(x: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((x - wanted).norm() / wanted.norm().clamp_min(1e-30))


# Of one token for its many layers: the last mask, the last cosines, and what they came to.
_last_mask: list[tuple[Any, int, bool]] = [(None, 0, False)]
_last_turns: list[tuple[Any, int, torch.Tensor | None]] = [(None, 0, None)]


def _sees_all(mask: Any, num_keys: int) -> bool:
    """Whether a mask, (1, 1, 1, keys) as eager attention adds it or of bool, hides none of the keys."""
    if mask is None:
        return True
    last, last_keys, sees = _last_mask[0]
    if last is not mask or last_keys != num_keys:
        sees = isinstance(mask, torch.Tensor) and mask.shape == (1, 1, 1, num_keys)
        sees = sees and bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())
        _last_mask[0] = (mask, num_keys, sees)
    return sees


def _turns_of(positions: tuple[Any, ...], rotary_dim: int) -> torch.Tensor | None:
    """float32 (2, rotary_dim / 2): cosines and sines of one position."""
    cosines, sines = positions
    last, last_dim, turns = _last_turns[0]
    if last is cosines and last_dim == rotary_dim:
        return turns
    half = rotary_dim // 2
    if (
        cosines.ndim != 3
        or cosines.shape[:2] != (1, 1)
        or cosines.shape[-1] not in (half, 2 * half)
    ):
        return None
    both = torch.stack([cosines[0, 0], sines[0, 0]]).detach().float().cpu()
    turns = both[:, :half].contiguous()
    if both.shape[1] == rotary_dim and not torch.equal(turns, both[:, half:]):
        turns = both[:, ::2].contiguous()  # neighbours turn together: each angle comes twice
    _last_turns[0] = (cosines, rotary_dim, turns)
    return turns


# --- what a layer computes ----------------------------------------------------------------------------


def _layer_of(module: Any) -> DecoderLayer:
    if not isinstance(getattr(module, "self_attn", None), torch.nn.Module):
        raise _UnlikeError(f"a {type(module).__name__} without a self_attn")
    children = _children(module)
    attention = children.pop("self_attn")
    norms = [
        _norm(children.pop(name, None), name)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    (weight, epsilon), (output_norm, output_epsilon) = norms
    if epsilon != output_epsilon:
        raise _UnlikeError(f"its norms' epsilons differ: {epsilon}, {output_epsilon}")
    if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
        raise _UnlikeError(
            f"it has more parts than attention, two norms and an MLP: {', '.join(children)}"
        )
    (mlp,) = children.values()
    spec = {**_attention(attention), **_feed_forward(mlp, attention.q_proj.in_features)}
    return DecoderLayer(
        DecoderSpec(epsilon=epsilon, input_norm=weight, output_norm=output_norm, **spec)
    )


def _children(module: Any) -> dict[str, Any]:
    """Sub-modules that hold anything: parameters, or weights of ktk's."""
    return {
        name: child
        for name, child in module.named_children()
        if any(isinstance(m, KtkLinear) or is_experts(m) for m in child.modules())
        or any(True for _ in child.parameters())
    }


def _linear(module: Any, name: str) -> Linear:
    found = linear_of(module)
    if found is None:
        raise _UnlikeError(f"{name} is a {type(module).__name__} that torch runs")
    return found


def _norm(module: Any, name: str) -> tuple[np.ndarray, float]:
    """An RMSNorm's weight, float32, and epsilon."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or getattr(module, "bias", None) is not None:
        raise _UnlikeError(f"{name} is no RMSNorm")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float):
        raise _UnlikeError(f"{name} has no epsilon")
    with torch.no_grad():
        x = _probe(4, len(weight), weight)
        own, wide = module(x).float(), x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        for w in (weight.float(), weight.float() + 1):
            if _relative(normal * w, own) < 0.01:
                return w.cpu().numpy(), epsilon
    raise _UnlikeError(f"{name} is no RMSNorm: it computes something else")


def _probe(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, columns, generator=generator)
    return x.to(dtype=like.dtype, device=like.device)


def _attention(module: Any) -> dict[str, Any]:
    """The fields of a DecoderSpec that say how a layer attends."""
    children = _children(module)
    found: dict[str, Any] = {}
    for field in ("q", "k", "v", "o"):
        found[field] = _linear(children.pop(f"{field}_proj", None), f"{field}_proj")
    found["head_dim"], found["scaling"] = int(module.head_dim), float(module.scaling)
    if found["head_dim"] % HEAD_STEP:
        raise _UnlikeError(
            f"its heads are {found['head_dim']} wide: must be a multiple of {HEAD_STEP}"
        )
    epsilons = []
    for field in ("q_norm", "k_norm"):
        if field in children:
            found[field], epsilon = _norm(children.pop(field), field)
            epsilons.append(epsilon)
    if epsilons:
        found["head_epsilon"] = epsilons[0]
    own = dict(module.named_parameters(recurse=False))
    sinks = own.pop("sinks", None)
    if sinks is not None:
        found["sinks"] = sinks.detach().float().cpu().numpy()
    if children or own or len(epsilons) == 1 or len(set(epsilons)) > 1:
        raise _UnlikeError(
            f"its attention has other parts: {', '.join([*children, *own]) or 'norms'}"
        )
    config = module.config
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    found["rotary_dim"] = int(found["head_dim"] * (partial or 1.0))
    return found


def _feed_forward(module: Any, hidden_size: int) -> dict[str, Any]:
    """The fields of a DecoderSpec that say what follows attention."""
    children = _children(module)
    experts_name = next((name for name, child in children.items() if is_experts(child)), None)
    if experts_name is None:
        return {"mlp": _mlp(module)}
    experts = children.pop(experts_name)
    handle = handle_of(experts)
    if handle is None or handle.activation is None:
        raise _UnlikeError("its experts are not packed, or their activation is its own")
    gates = {
        n: c for n, c in children.items() if _matrix_of(c, handle.moe.spec.num_experts) is not None
    }
    if len(gates) != 1:
        raise _UnlikeError(f"{len(gates)} of its parts could be the router")
    ((gate_name, gate),) = gates.items()
    del children[gate_name]
    matrix = _matrix_of(gate, handle.moe.spec.num_experts)
    assert matrix is not None
    router, bias = _router(module, experts, gate, matrix)
    found: dict[str, Any] = {
        "experts": handle.moe,
        "router": router,
        "logits": Linear(
            matrix, bias, weight_format="bf16" if matrix.dtype is torch.bfloat16 else "fp32"
        ),
    }
    scale = None
    for name, child in list(children.items()):
        if isinstance(child, torch.nn.Linear) and tuple(child.weight.shape) == (1, hidden_size):
            scale = children.pop(name).weight.detach()[0].float().cpu().numpy()
    if len(children) > 1 or (scale is not None and not children):
        raise _UnlikeError(f"its experts have other parts beside them: {', '.join(children)}")
    if children:
        (shared,) = children.values()
        found["mlp"] = replace(_mlp(shared), scale=scale)
    return found


def _mlp(module: Any) -> Mlp:
    children = _children(module)
    gate, up, down = (
        _linear(children.pop(f"{n}_proj", None), f"{n}_proj") for n in ("gate", "up", "down")
    )
    activation = recognise_gate(getattr(module, "act_fn", None))
    if children or activation is None:
        raise _UnlikeError("its MLP is not down(act(gate) * up) with an activation known here")
    return Mlp(gate, up, down, activation)


def _matrix_of(module: Any, num_experts: int) -> torch.Tensor | None:
    """The (num_experts, hidden_size) weight of a router."""
    weight = getattr(module, "weight", None)
    if isinstance(module, KtkLinear) or weight is None or weight.ndim != 2:
        return None
    return weight.detach() if len(weight) == num_experts else None


# --- routing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Routed:
    """What a sparse block gave its experts for the probe."""

    logits: np.ndarray  # float32 (tokens, num_experts), without bias
    ids: np.ndarray
    weights: np.ndarray


def _router(
    module: Any, experts: Any, gate: Any, matrix: torch.Tensor
) -> tuple[Router, torch.Tensor | None]:
    """The routing that gives what a sparse block gives its experts, and the logits' bias."""
    routed = _routed(module, experts, matrix)
    factor = _number("routed_scaling_factor", gate, module)
    known = (1.0, *((factor,) if factor else ()))
    best, found = LEAST_SAME, None
    for bias, router in _candidates(module, gate, matrix, routed.ids.shape[1]):
        logits = routed.logits if bias is None else routed.logits + bias.float().cpu().numpy()
        same, scale = _compare(router, logits, routed, known)
        if same > best and scale is not None:
            best, found = same, (replace(router, scale=scale), bias)
    if found is None:
        raise _UnlikeError("its routing is none that is known here")
    return found


def _routed(module: Any, experts: Any, matrix: torch.Tensor) -> _Routed:
    x = _probe(PROBE_TOKENS, matrix.shape[1], matrix)
    spread = float((x.float() @ matrix.float().T).std())
    x = x * (LOGITS / spread if spread else 1.0)
    seen: list[tuple[torch.Tensor, ...]] = []

    def record(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((ids, weights))
        return torch.zeros_like(hidden)

    had = experts.__dict__.get("forward")
    experts.forward = record
    try:
        with torch.no_grad():
            module(x[None])
    except Exception as error:
        raise _UnlikeError(f"its experts cannot be tried alone: {error}") from error
    finally:
        del experts.forward
        if had is not None:
            experts.forward = had
    if len(seen) != 1 or seen[0][0].shape != seen[0][1].shape or len(seen[0][0]) != PROBE_TOKENS:
        raise _UnlikeError("it calls its experts in a way of its own")
    ids, weights = seen[0]
    logits = x.float() @ matrix.float().T
    return _Routed(logits.cpu().numpy(), ids.cpu().numpy(), weights.float().cpu().numpy())


def _candidates(
    module: Any, gate: Any, matrix: torch.Tensor, top_k: int
) -> Iterator[tuple[torch.Tensor | None, Router]]:
    """(bias of the logits, router) pairs that the module's tensors and numbers allow."""
    num_experts = len(matrix)
    vectors: list[torch.Tensor] = []
    for owner in (gate, module):
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
            if tensor.numel() != num_experts or name.startswith("experts."):
                continue
            if all(tensor.data_ptr() != v.data_ptr() for v in vectors):
                vectors.append(tensor.detach().flatten())
    uses: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)]
    for vector in vectors:
        uses += [(None, vector), (vector, None)]
    groups = [(1, 1, 1)]
    many, top = (_number(name, gate, module) for name in ("n_group", "topk_group"))
    if many and top and 1 < many <= MAX_GROUPS and top < many and num_experts % many == 0:
        groups = [(many, top, 2), (many, top, 1), *groups]
    for bias, correction in reversed(uses):  # a tensor that is there is probably used
        added = None if correction is None else correction.float().cpu().numpy()
        for score in SCORES:
            for is_normalised in (True, False):
                for num_groups, top_groups, best in groups:
                    yield bias, Router(
                        num_experts, top_k, score, is_normalised, 1.0, added, num_groups, top_groups, best
                    )  # fmt: skip


def _number(name: str, *owners: Any) -> Any:
    for owner in owners:
        for place in (owner, getattr(owner, "config", None)):
            value = getattr(place, name, None)
            if isinstance(value, int | float) and value > 0:
                return value
    return None


def _compare(
    router: Router, logits: np.ndarray, routed: _Routed, known: tuple[float, ...]
) -> tuple[float, float | None]:
    """Part of the tokens that go to the experts the block chose, and by what the router's weights must be multiplied.

    That is one of the known numbers if it is near one, and None if the weights are others.
    """
    ids, weights = route(router, logits)
    order, own_order = ids.argsort(1), routed.ids.argsort(1)
    same = (np.take_along_axis(ids, order, 1) == np.take_along_axis(routed.ids, own_order, 1)).all(
        1
    )
    if not same.any():
        return 0.0, None
    ours = np.take_along_axis(weights, order, 1)[same]
    ratio = np.take_along_axis(routed.weights, own_order, 1)[same] / np.maximum(ours, 1e-30)
    scale = float(np.median(ratio))
    if not np.isfinite(scale) or np.quantile(np.abs(ratio / scale - 1), 0.9) > SAME_WEIGHT:
        return 0.0, None
    near = next((s for s in known if abs(scale / s - 1) < 0.01), scale)
    return float(same.mean()), near
