"""What a decoder layer computes, as a ``DecoderSpec``: read from its modules' shapes and tried part
by part, in float32.

Norms, routing and activations are compared with what they are taken for on inputs of several sizes,
to the rounding of float32, so that a factor or an epsilon a percent off is another one.
``decoder_trial`` then tries the layer as a whole.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ktk.experts.lora import ExpertLora
from ktk.integration.transformers.activations import recognise_gate
from ktk.integration.transformers.adapters import adapter_of
from ktk.integration.transformers.experts import handle_of, is_experts
from ktk.integration.transformers.forward import ktk_experts_forward, run_experts
from ktk.integration.transformers.linear import KtkLinear, linear_of
from ktk.integration.transformers.trained_experts import trained_of
from ktk.ops.components import (
    DIM_STEP,
    Attention,
    Component,
    LatentAttention,
    Mlp,
    Norm,
    Rotary,
    RoutedExperts,
)
from ktk.ops.decoder import Branch, DecoderSpec
from ktk.ops.inputs import to_numpy
from ktk.ops.linear import Linear
from ktk.ops.router import MAX_GROUPS, SCORES, Router, route

PROBE_TOKENS = 64
# Standard deviations of the probe's logits: large enough to tell scores apart and to reach a cap,
# too small to saturate a sigmoid.
LOGITS = (0.5, 1.5, 3.0)
# Of float32. An honest router differs by 2e-6 at most, and a token in thousands lies so near the
# edge between two experts that it goes elsewhere.
LEAST_SAME, SAME_WEIGHT = 0.97, 1e-4
NORM_SCALES = (1e-4, 1e-3, 1.0, 100.0)  # of inputs: the smallest show an epsilon of 1e-6 and more
SAME_NORM = 1e-5
DEFERRED = "some of its experts run with the next layer"


# What models call a layer's norms: of attention's branch and of the feed-forward one the norm
# before it and the one after.
NORMS: tuple[tuple[tuple[str | None, str | None], tuple[str | None, str | None]], ...] = (
    (("input_layernorm", None), ("post_attention_layernorm", None)),
    ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")),
    (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    (("input_layernorm", "post_attention_layernorm"), ("pre_mlp_layernorm", "post_mlp_layernorm")),
    (
        ("input_layernorm", "post_self_attn_layernorm"),
        ("post_attention_layernorm", "post_mlp_layernorm"),
    ),
    (("input_layernorm", None), ("post_attention_layernorm", "post_mlp_layernorm")),
)


class UnlikeError(Exception):
    """Why a module is not what a DecoderSpec describes."""


@dataclass(frozen=True)
class DescribedLayer:
    """A layer's spec, and the modules that hold the parts of it; experts,
    shared and router None where it has none.
    """

    spec: DecoderSpec
    attention: Any
    norms: tuple[tuple[Any, Any], ...]  # before and after each branch, or None
    feed_forward: Any
    experts: Any = None
    shared: Any = None  # the MLP beside the experts, or the only one
    router: Any = None  # holds the matrix of the logits
    shared_gate: Any = None  # holds the row that says how much the shared expert counts


def describe_layer(module: Any) -> DescribedLayer:
    """Raises UnlikeError if a DecoderSpec cannot say what the layer computes,
    ValueError if its shapes do not fit.
    """
    if not isinstance(getattr(module, "self_attn", None), torch.nn.Module):
        raise UnlikeError(f"a {type(module).__name__} without a self_attn")
    children = _children(module)
    attention = children.pop("self_attn")
    norms = {name: children.pop(name) for name in list(children) if "norm" in name}
    places = next((p for p in NORMS if {n for pair in p for n in pair if n} == set(norms)), None)
    if places is None:
        raise UnlikeError(f"its norms are {', '.join(norms) or 'none'}")
    if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
        raise UnlikeError(
            f"it has more parts than attention, norms and an MLP: {', '.join(children)}"
        )
    (feed_forward,) = children.values()
    described = {name: describe_norm(norm, name) for name, norm in norms.items()}
    attends = _latent_attention if hasattr(attention, "kv_lora_rank") else _attention
    first = (attends(attention),)
    second, parts = _feed_forward(feed_forward)
    multiplier = _number("residual_multiplier", module) or 1.0
    branches = [
        Branch(components, described.get(before or ""), described.get(after or ""), multiplier)
        for components, (before, after) in zip((first, second), places, strict=True)
    ]
    modules = tuple((norms.get(before or ""), norms.get(after or "")) for before, after in places)
    return DescribedLayer(DecoderSpec(tuple(branches)), attention, modules, feed_forward, **parts)


@contextlib.contextmanager
def in_float32(module: Any) -> Iterator[None]:
    """Its own code in float32: what ktk runs by ktk's kernels, which take float32,
    the rest on its parameters as float32.
    """
    undo: list[Callable[[], None]] = []
    try:
        for part in module.modules():
            if isinstance(part, KtkLinear):
                continue
            if (linear := linear_of(part)) is not None:
                undo.append(replace_forward(part, functools.partial(_run_linear, linear)))
            elif is_experts(part) and (handle := handle_of(part)) is not None:
                run = functools.partial(run_experts, part, handle)
                if adapter_of(part) is not None:
                    run = functools.partial(ktk_experts_forward, part)
                undo.append(replace_forward(part, run))
            else:
                for tensors in (part._parameters, part._buffers):
                    undo.append(functools.partial(tensors.update, dict(tensors)))
                    tensors.update(
                        {
                            n: t.detach().float()
                            for n, t in tensors.items()
                            if t is not None and t.is_floating_point()
                        }
                    )
        yield
    finally:
        for step in reversed(undo):
            step()


def _run_linear(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = linear(x.reshape(-1, linear.in_features))
    return y.view(*x.shape[:-1], linear.out_features)


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put a forward into one module; returns what undoes it."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def undo() -> None:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own

    return undo


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
        raise UnlikeError(f"{name} is a {type(module).__name__} that torch runs")
    return found


def describe_norm(module: Any, name: str) -> Norm:
    """Raises UnlikeError if it is no RMSNorm."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or getattr(module, "bias", None) is not None:
        raise UnlikeError(f"{name} is no RMSNorm")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float):
        raise UnlikeError(f"{name} has no epsilon")
    rows = torch.cat([scale * _probe(4, len(weight)) for scale in NORM_SCALES])
    rows = torch.cat(
        [rows, rows[-4:] ** 3, -(rows[-4:] ** 3)]
    )  # a few large, which a clip would cut
    with torch.no_grad(), in_float32(module):
        own = module(rows)
    normal = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + epsilon)
    for w in (weight.detach().float().cpu(), weight.detach().float().cpu() + 1):
        if ((normal * w - own).norm(dim=-1) <= SAME_NORM * own.norm(dim=-1)).all():
            return Norm(w.numpy(), epsilon)
    raise UnlikeError(f"{name} is no RMSNorm: it computes something else")


def _probe(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def _attention(module: Any) -> Attention:
    children = _children(module)
    q, k, v, o = (_linear(children.pop(f"{n}_proj", None), f"{n}_proj") for n in "qkvo")
    head_dim = int(module.head_dim)
    if head_dim % DIM_STEP:
        raise UnlikeError(f"its heads are {head_dim} wide: must be a multiple of {DIM_STEP}")
    q_norm, k_norm = (
        describe_norm(children.pop(n), n) if n in children else None for n in ("q_norm", "k_norm")
    )
    own = dict(module.named_parameters(recurse=False))
    sinks = own.pop("sinks", None)
    if children or own or (q_norm is None) != (k_norm is None):
        raise UnlikeError(
            f"its attention has other parts: {', '.join([*children, *own]) or 'norms'}"
        )
    config = module.config
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return Attention(
        q,
        k,
        v,
        o,
        head_dim,
        Rotary(int(head_dim * (partial or 1.0))),
        float(module.scaling),
        q_norm,
        k_norm,
        None if sinks is None else sinks.detach().float().cpu().numpy(),
    )


def _latent_attention(module: Any) -> LatentAttention:
    children = _children(module)
    q_a, q_norm = None, None
    if "q_a_proj" in children:
        q_a = _linear(children.pop("q_a_proj"), "q_a_proj")
        q_norm = describe_norm(children.pop("q_a_layernorm", None), "q_a_layernorm")
    name = "q_proj" if q_a is None else "q_b_proj"
    q = _linear(children.pop(name, None), name)
    latent = _linear(children.pop("kv_a_proj_with_mqa", None), "kv_a_proj_with_mqa")
    latent_norm = describe_norm(children.pop("kv_a_layernorm", None), "kv_a_layernorm")
    expand = _linear(children.pop("kv_b_proj", None), "kv_b_proj")
    o = _linear(children.pop("o_proj", None), "o_proj")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if children or own or expand.bias is not None:
        others = ", ".join([*children, *own]) or "a bias of kv_b_proj"
        raise UnlikeError(f"its attention has other parts: {others}")
    nope, turned, value = (
        int(getattr(module, f"{n}_head_dim")) for n in ("qk_nope", "qk_rope", "v")
    )
    for width in (nope, turned, value, int(module.kv_lora_rank)):
        if width % DIM_STEP:
            raise UnlikeError(
                f"its heads have parts {width} wide: must be a multiple of {DIM_STEP}"
            )
    heads = int(module.num_heads)
    matrix = matrix_of(expand).view(heads, nope + value, expand.in_features)
    weight_format = "fp32" if expand.spec.weight_format == "fp32" else "bf16"
    keys, values = matrix.split([nope, value], 1)
    return LatentAttention(
        heads,
        q,
        latent,
        latent_norm,
        Linear(keys.mT.reshape(-1, nope), weight_format=weight_format),
        Linear(values.reshape(-1, expand.in_features), weight_format=weight_format),
        o,
        Rotary(turned),
        float(module.scaling),
        q_a,
        q_norm,
    )


def matrix_of(linear: Linear) -> torch.Tensor:
    """Its weights as float32 (out_features, in_features), by the rows of a unit matrix:
    exact in any code of activations.
    """
    rows: torch.Tensor = linear(torch.eye(linear.in_features))
    return rows.mT


def _feed_forward(module: Any) -> tuple[tuple[Component, ...], dict[str, Any]]:
    """The components that follow attention, in order, and the fields of a DescribedLayer."""
    children = _children(module)
    experts_name = next((name for name, child in children.items() if is_experts(child)), None)
    if experts_name is None:
        for name, child in children.items():
            if any(map(is_experts, child.modules())):
                raise UnlikeError(f"its {name} are in a {type(child).__name__}, as of an adapter")
        return (_mlp(module),), {"shared": module}
    experts = children.pop(experts_name)
    handle = handle_of(experts)
    if handle is None or handle.activation is None:
        raise UnlikeError("its experts are not packed, or their activation is its own")
    if trained_of(experts) is not None:
        raise UnlikeError("some of its experts are trained")
    if handle.hybrid is not None:
        raise UnlikeError(f"some of its experts are on {handle.hybrid.device}")
    if handle.deferral is not None:
        raise UnlikeError(DEFERRED)
    gates = {
        n: c for n, c in children.items() if _matrix_of(c, handle.moe.spec.num_experts) is not None
    }
    if len(gates) != 1:
        raise UnlikeError(f"{len(gates)} of its parts could be the router")
    ((gate_name, gate),) = gates.items()
    del children[gate_name]
    matrix = _matrix_of(gate, handle.moe.spec.num_experts)
    assert matrix is not None
    router, bias = _router(module, experts, gate, matrix)
    weight_format = "bf16" if matrix.dtype is torch.bfloat16 else "fp32"
    logits = Linear(matrix, bias, weight_format=weight_format)
    routed = RoutedExperts(handle.moe, logits, router, _lora(experts))
    parts = {"experts": experts, "router": gate}
    scale, hidden_size = None, handle.moe.spec.hidden_size
    for name, child in list(children.items()):
        if isinstance(child, torch.nn.Linear) and tuple(child.weight.shape) == (1, hidden_size):
            parts["shared_gate"] = children.pop(name)
            scale = child.weight.detach()[0].float().cpu().numpy()
    if len(children) > 1 or (scale is not None and not children):
        raise UnlikeError(f"its experts have other parts beside them: {', '.join(children)}")
    if not children:
        return (routed,), parts
    (parts["shared"],) = children.values()
    return (replace(_mlp(parts["shared"]), scale=scale), routed), parts


def _lora(experts: Any) -> ExpertLora | None:
    """Their frozen adapters, in the memory that these have."""
    adapter = adapter_of(experts)
    if adapter is None or not adapter.is_enabled:
        return None
    if any(matrix.requires_grad for matrix in adapter.parameters()):
        raise UnlikeError("its experts have adapters that are trained")
    matrices = {name: matrix.detach() for name, matrix in adapter.named_parameters()}
    for matrix in matrices.values():
        is_taken = matrix.dtype in (torch.float32, torch.bfloat16) and matrix.is_contiguous()
        if not is_taken or matrix.device.type != "cpu":
            raise UnlikeError(f"its experts' adapters are {matrix.dtype} on {matrix.device}")
    arrays: Any = {name: to_numpy(matrix, name) for name, matrix in matrices.items()}
    return ExpertLora(**arrays, scaling=adapter.scaling)


def _mlp(module: Any) -> Mlp:
    children = _children(module)
    gate, up, down = (
        _linear(children.pop(f"{n}_proj", None), f"{n}_proj") for n in ("gate", "up", "down")
    )
    activation = recognise_gate(getattr(module, "act_fn", None))
    if children or activation is None:
        raise UnlikeError("its MLP is not down(act(gate) * up) with an activation known here")
    return Mlp(gate, up, down, activation)


def _matrix_of(module: Any, num_experts: int) -> torch.Tensor | None:
    """The (num_experts, hidden_size) weight of a router."""
    weight = getattr(module, "weight", None)
    if isinstance(module, KtkLinear) or weight is None or weight.ndim != 2:
        return None
    return weight.detach() if len(weight) == num_experts else None


# --- routing --------------------------------------------------------------------------------------


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
        raise UnlikeError("its routing is none that is known here")
    return found


def _routed(module: Any, experts: Any, matrix: torch.Tensor) -> _Routed:
    wide = matrix.float()
    x = _probe(PROBE_TOKENS, matrix.shape[1])
    spread = float((x @ wide.T).std())
    x = torch.cat([x * (size / spread if spread else 1.0) for size in LOGITS])
    seen: list[tuple[torch.Tensor, ...]] = []

    def record(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append((ids, weights))
        return torch.zeros_like(hidden)

    try:
        with torch.no_grad(), in_float32(module):
            undo = replace_forward(experts, record)
            try:
                module(x[None])
            finally:
                undo()
    except Exception as error:
        raise UnlikeError(f"its experts cannot be tried alone: {error}") from error
    if len(seen) != 1 or seen[0][0].shape != seen[0][1].shape or len(seen[0][0]) != len(x):
        raise UnlikeError("it calls its experts in a way of its own")
    ids, weights = seen[0]
    return _Routed((x @ wide.T).numpy(), ids.numpy(), weights.float().numpy())


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
                    yield (
                        bias,
                        Router(
                            num_experts,
                            top_k,
                            score,
                            is_normalised,
                            1.0,
                            added,
                            num_groups,
                            top_groups,
                            best,
                        ),
                    )


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
    """Part of the tokens that go to the experts the block chose, and by what the router's weights
    must be multiplied.

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
    if not np.isfinite(scale) or np.abs(ratio / scale - 1).max() > SAME_WEIGHT:
        return 0.0, None
    near = next((s for s in known if abs(scale / s - 1) < SAME_WEIGHT), scale)
    return float(same.mean()), near
