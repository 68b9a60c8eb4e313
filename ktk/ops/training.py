"""Training through packed experts: their forward pass with adapters, and what it leaves for
gradients.

The forward pass runs the packed kernels, so activations are rounded as in inference, and without
adapters the output has inference's bits. The backward pass takes that rounding as the identity.
The experts' own weights are frozen.

What is here is portable: products by the kernels on the way forward, one dequantised expert at a
time on the way back. Sums over a token's slots are in top-k order, sums over tokens are NumPy's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ktk.backends import Operands
from ktk.errors import BackendError
from ktk.experts.dequantise import expert_weights
from ktk.experts.fma import fma
from ktk.experts.formats.floats import to_f32
from ktk.experts.lora import ExpertLora
from ktk.experts.rows import store_rows
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.ops.dropout import dropout_factors
from ktk.ops.inputs import as_hidden, as_routing, new_like
from ktk.ops.moe import MoE
from ktk.ops.streamed import AnyMoE


@dataclass(frozen=True)
class Saved:
    """What ``backward`` needs of a ``forward``.

    hidden : float32, float16 or uint16 bf16 bits (num_tokens, hidden_size); topk_ids : int64
        (num_tokens, top_k); topk_weights : float32, likewise. The caller's own arrays where these
        fit: they must not change until then.
    lora : as it was given.
    z : float32 (num_pairs, projections, intermediate_size): gate (if there is one) and up before
        the activation, pairs in the order of expert, token, slot; None: ``backward`` computes
        them again. Compiled kernels pad the last dimension.
    """

    hidden: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    lora: ExpertLora | None
    z: np.ndarray | None


class Gradients(NamedTuple):
    """hidden : float32 (num_tokens, hidden_size). topk_weights : float32 (num_tokens, top_k).
    lora : float32, of each matrix of ``ExpertLora.arrays`` by its name and of its shape; experts
    without tokens have exactly zero.
    """

    hidden: np.ndarray
    topk_weights: np.ndarray
    lora: dict[str, np.ndarray]


def forward(
    moe: AnyMoE,
    hidden_states: Any,
    topk_ids: Any,
    topk_weights: Any,
    lora: ExpertLora | None = None,
    *,
    is_saved: bool = True,
) -> tuple[Any, Saved]:
    """Sum over each token's slots of weight * expert(hidden), the experts with their adapters.

    Arguments as ``ktk.MoE.forward`` takes them. lora : None without adapters.
    is_saved : keep what spares ``backward`` a part of the forward pass.
    Returns a new array or tensor like hidden_states, and what ``backward`` needs.
    Raises TypeError / ValueError naming the argument that does not fit, BackendError for experts
    that come and go (``StreamedMoE``).
    """
    moe = _present(moe)
    hidden = as_hidden(hidden_states, moe.spec.hidden_size)
    ids, weights = as_routing(topk_ids, topk_weights, len(hidden))
    if lora is not None:
        lora.check(moe.spec)
    result, out = new_like(hidden_states, hidden.shape)
    saved = Saved(hidden, ids, weights, lora, None)
    is_adapted = lora is not None and bool(lora.pairs)
    if moe.runner.why_not_trained() is None and ids.size and (is_adapted or is_saved):
        z = moe.runner.forward_saved(hidden, ids, weights, lora, out)
        return result, dataclasses.replace(saved, z=z) if is_saved else saved
    if lora is None or not is_adapted:
        moe.run(Operands(hidden, ids, weights, None, out))
        return result, saved
    y = np.zeros((ids.size, moe.spec.hidden_size), np.float32)  # of each pair
    kept = []
    for group in _groups(ids, moe.spec.num_experts):
        x = to_f32(hidden[group.pairs // ids.shape[1]])  # (rows, H)
        z = _before_activation(moe, group, x, lora)
        y[group.pairs] = _after_activation(moe, group, z, lora)
        if is_saved:
            kept.append(z)
    store_rows(_summed(y, ids, weights, moe.spec.num_experts), out)
    if is_saved:
        saved = dataclasses.replace(saved, z=np.concatenate(kept) if kept else _no_rows(moe))
    return result, saved


def backward(
    moe: AnyMoE, saved: Saved, grad: Any, *, blocks: StoredExperts | None = None
) -> Gradients:
    """Gradients, given that of ``forward``'s output.

    grad : (num_tokens, hidden_size), float32, float16 or bfloat16.
    blocks : the experts in the order of their GGUF file, where the operator repacked them; None:
        as the operator has them.
    Raises TypeError / ValueError naming the argument that does not fit, BackendError for experts
    that come and go.
    """
    moe = _present(moe)
    g = as_hidden(grad, moe.spec.hidden_size)
    if g.shape != saved.hidden.shape:
        raise ValueError(
            f"grad has shape {g.shape}: must be that of the output, {saved.hidden.shape}"
        )
    if saved.lora is not None:
        saved.lora.check(moe.spec)
    if moe.runner.why_not_trained() is None and saved.topk_ids.size:
        return Gradients(*_native_backward(moe, saved, g))
    g = to_f32(g)
    top_k = saved.topk_ids.shape[1]
    lora = saved.lora or ExpertLora()
    d_lora = {name: np.zeros(a.shape, np.float32) for name, a in lora.arrays.items()}
    d_weights = np.zeros(saved.topk_ids.shape, np.float32)
    d_pairs = np.zeros((saved.topk_ids.size, moe.spec.hidden_size), np.float32)
    start = 0
    for group in _groups(saved.topk_ids, moe.spec.num_experts):
        token = group.pairs // top_k
        stop = start + len(token)
        x = to_f32(saved.hidden[token])  # (rows, H)
        z = None if saved.z is None else saved.z[start:stop]
        if z is None:
            z = _before_activation(moe, group, x, lora)
        rows = _Rows(x, z, g[token], saved.topk_weights.reshape(-1)[group.pairs])
        weights = _dequantised(moe, blocks, group.expert)
        found = _expert_backward(moe, group, rows, weights, lora, d_lora)
        d_pairs[group.pairs], d_weights.reshape(-1)[group.pairs] = found
        start = stop
    d_hidden = np.zeros(g.shape, np.float32)
    for slot in range(top_k):
        d_hidden += d_pairs.reshape(*saved.topk_ids.shape, g.shape[1])[:, slot]
    return Gradients(d_hidden, d_weights, d_lora)


def _present(moe: AnyMoE) -> MoE:
    if isinstance(moe, MoE):
        return moe
    raise BackendError(
        f"{type(moe).__name__}: experts that come and go cannot be trained through; load the model "
        "without a limit of expert memory"
    )


def _native_backward(
    moe: MoE, saved: Saved, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    given = (saved.hidden, saved.topk_ids, saved.topk_weights, saved.lora)
    z = saved.z
    if z is None:
        z = moe.runner.forward_saved(*given, np.empty_like(saved.hidden))
    return moe.runner.backward(*given, z, g)


class _Group(NamedTuple):
    """The pairs of one expert, token * top_k + slot, ascending."""

    expert: int
    pairs: np.ndarray


class _Rows(NamedTuple):
    """Of one expert's pairs: hidden (rows, H), z (rows, projections, I), the output's gradient
    (rows, H), routing weights (rows,); float32.
    """

    x: np.ndarray
    z: np.ndarray
    grad: np.ndarray
    weights: np.ndarray


def _groups(ids: np.ndarray, num_experts: int) -> Iterator[_Group]:
    """Experts that have tokens, ascending."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(num_experts + 1))
    for expert in np.flatnonzero(np.diff(bounds)).tolist():
        yield _Group(expert, order[bounds[expert] : bounds[expert + 1]])


def _no_rows(moe: MoE) -> np.ndarray:
    return np.zeros((0, 1 + moe.spec.has_gate, moe.spec.intermediate_size), np.float32)


def _before_activation(moe: MoE, group: _Group, x: np.ndarray, lora: ExpertLora) -> np.ndarray:
    """float32 (rows, projections, I) of x (rows, H)."""
    spec = moe.spec
    names = ("gate", "up") if spec.has_gate else ("up",)
    ids = np.full(len(x), group.expert, np.int64)
    z = moe.linear("gate_up", x, ids).reshape(len(x), len(names), -1)
    dropped = x * _factors(lora, group, False, spec.hidden_size)
    for at, name in enumerate(names):
        z[:, at] += _bias(moe, group.expert, name)
        z[:, at] += _adapter(lora, name, group.expert, dropped)
    return z


def _after_activation(moe: MoE, group: _Group, z: np.ndarray, lora: ExpertLora) -> np.ndarray:
    """float32 (rows, H), the expert's output before it is weighted."""
    h = moe.spec.activation.apply(z[:, 0] if moe.spec.has_gate else None, z[:, -1])
    y = moe.linear("down", h, np.full(len(h), group.expert, np.int64))
    y += _bias(moe, group.expert, "down")
    dropped = h * _factors(lora, group, True, moe.spec.intermediate_size)
    return np.asarray(y + _adapter(lora, "down", group.expert, dropped))


def _summed(y: np.ndarray, ids: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 (num_tokens, H) of the pairs' rows, as the kernels sum them."""
    rows = y.reshape(*ids.shape, y.shape[1])
    out = np.zeros((len(ids), y.shape[1]), np.float32)
    is_used = (ids >= 0) & (ids < num_experts)
    for slot in range(ids.shape[1]):
        at = np.flatnonzero(is_used[:, slot])
        out[at] = fma(weights[at, slot, None], rows[at, slot], out[at])
    return out


def _expert_backward(
    moe: MoE,
    group: _Group,
    rows: _Rows,
    weights: ExpertWeights,
    lora: ExpertLora,
    d_lora: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of hidden (rows, H) and of the routing weights (rows,); those of this expert's
    adapters go into ``d_lora``.
    """
    spec, e = moe.spec, group.expert
    gate, up = rows.z[:, 0] if spec.has_gate else None, rows.z[:, -1]
    h = spec.activation.apply(gate, up)  # (rows, I)
    factor = _factors(lora, group, True, spec.intermediate_size)
    through = rows.grad @ weights.down  # of h, before the routing weight
    through += factor * _adapter_back(lora, "down", e, rows.grad)
    d_weights = np.einsum("ri,ri->r", h, through)
    if weights.down_bias is not None:
        d_weights += rows.grad @ weights.down_bias
    scale = rows.weights[:, None]
    _adapter_gradients(lora, "down", e, h * factor, rows.grad * scale, d_lora)
    d_gate, d_up = spec.activation.gradient(gate, up, through * scale)
    factor = _factors(lora, group, False, spec.hidden_size)
    dropped, d_x = rows.x * factor, np.zeros_like(rows.x)
    for name, matrix, d_z in (("gate", weights.gate, d_gate), ("up", weights.up, d_up)):
        if matrix is not None and d_z is not None:
            d_x += d_z @ matrix
            d_x += factor * _adapter_back(lora, name, e, d_z)
            _adapter_gradients(lora, name, e, dropped, d_z, d_lora)
    return d_x, d_weights


def _factors(lora: ExpertLora, group: _Group, is_down: bool, columns: int) -> Any:
    """What A's inputs are multiplied by, float32 (rows, columns) or 1."""
    if not lora.dropout:
        return np.float32(1)
    return dropout_factors(lora.seed, lora.dropout, group.pairs, is_down, columns)


def _matrices(lora: ExpertLora, name: str, expert: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A (rank, in) and B (out, rank) of one expert, float32."""
    pair = lora.pairs.get(name)
    return None if pair is None else (to_f32(pair[0][expert]), to_f32(pair[1][expert]))


def _adapter(lora: ExpertLora, name: str, expert: int, dropped: np.ndarray) -> Any:
    """scaling * B (A dropped): float32 (rows, out), 0 without an adapter."""
    if (found := _matrices(lora, name, expert)) is None:
        return np.float32(0)
    a, b = found
    return np.float32(lora.scaling) * ((dropped @ a.T) @ b.T)


def _adapter_back(lora: ExpertLora, name: str, expert: int, d_z: np.ndarray) -> Any:
    """scaling * A^T (B^T d_z): float32 (rows, in), of A's input; 0 without an adapter."""
    if (found := _matrices(lora, name, expert)) is None:
        return np.float32(0)
    a, b = found
    return np.float32(lora.scaling) * ((d_z @ b) @ a)


def _adapter_gradients(
    lora: ExpertLora,
    name: str,
    expert: int,
    dropped: np.ndarray,
    d_z: np.ndarray,
    d_lora: dict[str, np.ndarray],
) -> None:
    if (found := _matrices(lora, name, expert)) is None:
        return
    a, b = found
    s = np.float32(lora.scaling)
    d_lora[f"{name}_b"][expert] = s * (d_z.T @ (dropped @ a.T))
    d_lora[f"{name}_a"][expert] = s * ((d_z @ b).T @ dropped)


def _bias(moe: MoE, expert: int, name: str) -> Any:
    """float32 (out_features,), 0 without one."""
    if not moe.spec.has_bias:
        return np.float32(0)
    stored = moe.runner.packed_expert(expert)
    return stored.biases[name][stored.place(expert)]


def _dequantised(moe: MoE, blocks: StoredExperts | None, expert: int) -> ExpertWeights:
    return expert_weights(blocks or moe.runner.packed_expert(expert), expert)
