"""Whether a decoder layer computes what its ``DecoderSpec`` says: its own forward beside the native
call, in float32.

In float32 rounding and another formula lie far apart: see LIMIT. Attention, experts and the MLP
beside them are compared each by itself and relative to its own size, so that a large one hides no
error of a small one. Four kinds of input make visible what seldom acts: few keys and many, more
than any window or index; norms' outputs 64 times as large, for clips and caps; inputs as large as
only a clip would notice; so small that epsilons count; places in the text beyond any length.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.decoder_specs import (
    DescribedLayer,
    in_float32,
    matrix_of,
    replace_forward,
)
from ktk.integration.transformers.native_call import run_native
from ktk.ops.components import (
    ROTARY_ORDERS,
    Attention,
    Component,
    LatentAttention,
    Mlp,
    Norm,
    RoutedExperts,
)
from ktk.ops.decoder import Branch, DecoderLayer, DecoderSpec
from ktk.ops.linear import Linear

# Of a part's size, root mean square. See the commit that set it for what honest layers and those 1
# % off come to.
LIMIT = 2e-4
ROUNDING = 3e-7  # of what a part is added to
SAME_SUM = 1e-5  # of inputs beside which the parts are small
# Of two sums in other orders a code of a rounded activation may fall to the other side: such a
# layer passes with other inputs.
SEEDS = tuple(range(11, 19))
SCORES = 2.0  # standard deviation of scores: neither all keys alike nor one alone
FEWEST_KEYS, MANY_KEYS, MOST_KEYS = 7, 300, 8192
_REACHES = re.compile(r"window|chunk|topk|block|local|sink|span|index")


@dataclass(frozen=True)
class _Probe:
    says: str
    num_keys: int
    size: float = 1.0  # of inputs
    norms: float = 1.0  # what norms' outputs are multiplied by
    place: int | None = None  # in the text, if another than the token's
    has_parts: bool = True


class Trial:
    """A described layer's native call against ``own_forward``,
    given the arguments of a real call for one token.
    """

    def __init__(
        self,
        described: DescribedLayer,
        module: Any,
        own_forward: Callable[..., Any],
        named: dict[str, Any],
        index: int,
    ) -> None:
        self.described, self.module, self.own_forward = described, module, own_forward
        self.named, self.index = named, index
        self.spec = described.spec
        self._of_latents: torch.Tensor | None = None

    def differs(self, is_thorough: bool) -> str | None:
        """What comes out otherwise; None if nothing does.

        ``spec`` is then the one that computes the same.
        """
        attention = self.described.spec.attention
        probes = list(self._probes())[: None if is_thorough else 1]
        orders = ROTARY_ORDERS if isinstance(attention, LatentAttention) else ROTARY_ORDERS[:2]
        reasons = []
        for order in orders if attention.rotary.dim else orders[:1]:
            if order != attention.rotary.order:
                rotary = replace(attention.rotary, order=order)
                turned = replace(attention, rotary=rotary)
                self.spec = self.described.spec.mapped(
                    lambda c, turned=turned: turned if c is attention else c  # type: ignore[misc]
                )
            reason = next((r for probe in probes if (r := self._try(probe)) is not None), None)
            if reason is None:
                return None
            reasons.append(reason)
        return reasons[0]

    def _probes(self) -> Iterator[_Probe]:
        yield _Probe("few keys", FEWEST_KEYS)
        many = self._many_keys()
        yield _Probe("many keys, small inputs, far on", many, size=1e-3, place=1 << 20)
        yield _Probe("norms' outputs made large", 40, norms=64.0)
        yield _Probe("huge inputs", FEWEST_KEYS, size=1e6, has_parts=False)

    def _many_keys(self) -> int:
        config = getattr(self.described.attention, "config", None)
        reaches = (
            [
                value
                for name, value in vars(config).items()
                if _REACHES.search(name) and isinstance(value, int)
            ]
            if config is not None
            else []
        )
        return min(MOST_KEYS, max([MANY_KEYS, *(r + 9 for r in reaches)]))

    def _try(self, probe: _Probe) -> str | None:
        worst: tuple[float, str] = (math.inf, "")
        for seed in SEEDS:
            try:
                error, part = max(self._errors(probe, seed))
            except Exception as failure:  # whatever its code makes of inputs that it did not expect
                return f"its own forward cannot be tried: {type(failure).__name__}: {failure}"
            if error <= 1:
                return None
            worst = min(worst, (error, part))
        return (
            f"its own forward differs from the native call in {worst[1]} ({probe.says}), "
            f"by {worst[0]:.2g} times what rounding explains"
        )

    def _errors(self, probe: _Probe, seed: int) -> Iterator[tuple[float, str]]:
        """(error over what is allowed, of which part)."""
        g = torch.Generator().manual_seed(seed)
        attention = self.spec.attention
        x = torch.randn(1, 1, self.spec.hidden_size, generator=g) * probe.size
        if self.spec.branches[0].norm is None:
            x *= probe.norms
        angles = torch.rand(attention.rotary.dim // 2, generator=g) * 2 * math.pi
        turns = torch.stack([angles.cos(), angles.sin()])
        keys, values = (
            torch.randn(1, heads, probe.num_keys, width, generator=g)
            for heads, width in attention.cached_shapes
        )
        run = functools.partial(self._own, x, turns, probe)
        with torch.no_grad(), in_float32(self.module), self._exact_latents():
            size = self._key_size(x)
            keys = keys * size
            if isinstance(attention, LatentAttention):
                values = values * size
            own: dict[str | None, Any] = {None: run(keys, values, None)}
            if len(self.spec.branches[1].components) > 1 and probe.has_parts:
                own |= {part: run(keys, values, part) for part in ("experts", "mlp")}
        natives = {part: self._native(x, turns, keys, values, probe, part) for part in own}
        h, out, *rows = own[None]
        got, *got_rows = natives[None]
        if not probe.has_parts:
            yield float((got - out).norm() / (SAME_SUM * out.norm())), "its sum"
            return
        h_native, *_ = self._native(x, turns, keys, values, probe, "attention")
        yield _error(h_native, h, h - x, h), "attention"
        for name, a, b in zip(("keys", "values"), got_rows, rows, strict=True):
            yield _error(a, b, b, b), name
        for left_out, (_, own_out, *_) in own.items():
            what = {None: "experts or MLP", "experts": "the MLP", "mlp": "experts"}[left_out]
            part, wanted = natives[left_out][0] - h_native, own_out - h
            yield _error(part, wanted, wanted, own_out), what

    @contextlib.contextmanager
    def _exact_latents(self) -> Iterator[None]:
        """What makes keys and values of latents in float32, by the weights that are absorbed:
        its rounding is no formula.
        """
        attention = self.spec.attention
        if not isinstance(attention, LatentAttention):
            yield
            return
        if self._of_latents is None:
            heads, latent = attention.num_heads, attention.latent_dim
            of_keys = matrix_of(attention.absorb).view(heads, latent, attention.nope_dim).mT
            of_values = matrix_of(attention.expand).view(heads, attention.value_dim, latent)
            self._of_latents = torch.cat([of_keys, of_values], 1).reshape(-1, latent)
        matrix = self._of_latents.T
        undo = replace_forward(self.described.attention.kv_b_proj, lambda rows: rows @ matrix)
        try:
            yield
        finally:
            undo()

    def _key_size(self, x: torch.Tensor) -> float:
        """What random keys must be multiplied by for scores of SCORES."""
        attention, module = self.spec.attention, self.described.attention
        before = self.described.norms[0][0]
        rows = x if before is None else before(x)
        if isinstance(attention, LatentAttention):
            q = (
                module.q_proj(rows)
                if attention.q_a is None
                else module.q_b_proj(module.q_a_layernorm(module.q_a_proj(rows)))
            )
            q = q.view(attention.num_heads, -1)
            absorbed = attention.absorb(q[:, : attention.nope_dim].contiguous())
            every = torch.arange(attention.num_heads)
            latent = absorbed.view(attention.num_heads, attention.num_heads, -1)[every, every]
            norm = float(
                latent.pow(2).sum(1).add(q[:, attention.nope_dim :].pow(2).sum(1)).mean().sqrt()
            )
        elif attention.q_norm is not None:
            weight = attention.q_norm.weight
            norm = float(np.sqrt(np.square(weight).mean() * attention.head_dim))
        else:
            norm = float(module.q_proj(rows).pow(2).mean().mul(attention.head_dim).sqrt())
        return SCORES / max(norm * abs(attention.scaling), 1e-20)

    def _own(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        probe: _Probe,
        keys: torch.Tensor,
        values: torch.Tensor,
        left_out: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What stands before the second norm, the output, the new key and value:
        the layer's own forward's, without one of its parts.
        """
        described = self.described
        seen: list[torch.Tensor] = []
        cache = DynamicCache()
        cache.layers = [hf.DynamicLayer() for _ in range(self.index + 1)]
        layer: Any = cache.layers[self.index]
        layer.update(keys, values)
        undo = []
        for before, after in described.norms:
            scaled = after if before is None else before
            undo.append(replace_forward(scaled, _times(scaled.forward, probe.norms)))
        second = described.norms[1][0] or described.feed_forward
        undo.append(replace_forward(second, _seeing(second.forward, seen)))
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(described.attention, name, None)) is not None:
                undo.append(replace_forward(norm, _times(norm.forward, math.sqrt(probe.norms))))
        silent = {"experts": described.experts, "mlp": described.shared}.get(left_out or "")
        if silent is not None:
            undo.append(replace_forward(silent, lambda rows, *_: torch.zeros_like(rows)))
        # Logits stay as they are: of large ones scores are alike, and of a gate that shuts nothing
        # is seen.
        routers = [m for m in (described.router, described.shared_gate) if m is not None]
        matrices = [m.weight for m in routers]
        try:
            for module, matrix in zip(routers, matrices, strict=True):
                module._parameters["weight"] = matrix / probe.norms
            out = self.own_forward(x.clone(), **self._arguments(turns, probe, cache))
        finally:
            for module, matrix in zip(routers, matrices, strict=True):
                module._parameters["weight"] = matrix
            for step in reversed(undo):
                step()
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            raise TypeError(f"it returns a {type(out).__name__}")
        return seen[0].view_as(x), out, layer.keys[:, :, -1], layer.values[:, :, -1]

    def _arguments(self, turns: torch.Tensor, probe: _Probe, cache: Any) -> dict[str, Any]:
        named = {
            name: value.float()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in self.named.items()
        }
        given = named[hf.POSITIONS]
        if torch.is_tensor(given):
            named[hf.POSITIONS] = torch.complex(turns[0], turns[1]).view(1, 1, -1)
        else:
            cosines, half = given[0], turns.shape[1]
            if cosines.shape[-1] != half:
                are_pairs = not torch.equal(cosines[..., :half], cosines[..., half:])
                turns = (
                    turns.repeat_interleave(2, -1) if are_pairs else torch.cat([turns, turns], -1)
                )
            named[hf.POSITIONS] = (turns[0].view(1, 1, -1), turns[1].view(1, 1, -1))
        named[str(hf.cache_name(named))] = cache
        if (mask := named.get("attention_mask")) is not None:
            make = torch.ones if mask.dtype == torch.bool else torch.zeros
            named["attention_mask"] = make(1, 1, 1, probe.num_keys + 1, dtype=mask.dtype)
        for name in hf.PLACES:
            if probe.place is not None and isinstance(named.get(name), torch.Tensor):
                named[name] = torch.full_like(named[name], probe.place)
        return named

    def _native(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        probe: _Probe,
        left_out: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output, the new key and value.

        left_out : "attention" leaves all but attention out.
        """
        left = {
            None: Component,
            "experts": Attention | LatentAttention | Mlp,
            "mlp": Attention | LatentAttention | RoutedExperts,
            "attention": Attention | LatentAttention,
        }[left_out]
        spec = self._changed(probe.norms).mapped(lambda c: c if isinstance(c, left) else None)
        room = [torch.cat([rows, torch.zeros_like(rows[:, :, :1])], 2) for rows in (keys, values)]
        out = run_native(DecoderLayer(spec), x, turns.contiguous(), *room)
        return out, room[0][:, :, -1], room[1][:, :, -1]

    def _changed(self, norms: float) -> DecoderSpec:
        """The spec, with norms' outputs so many times as large and logits as they were."""
        if norms == 1.0:
            return self.spec
        spec = self.spec.mapped(lambda c: self._with_norms(c, norms))
        return replace(spec, branches=tuple(_with_norm(branch, norms) for branch in spec.branches))

    def _with_norms(self, component: Component, norms: float) -> Component:
        if isinstance(component, Attention) and component.q_norm and component.k_norm:
            factor = math.sqrt(norms)
            q_norm, k_norm = (_norm_times(n, factor) for n in (component.q_norm, component.k_norm))
            return replace(component, q_norm=q_norm, k_norm=k_norm)
        if isinstance(component, RoutedExperts):
            matrix = self.described.router.weight.detach().float() / norms
            bias = component.logits.bias
            bias = None if bias is None else bias[: len(matrix)]
            return replace(component, logits=Linear(matrix, bias, weight_format="fp32"))
        if isinstance(component, Mlp) and component.scale is not None:
            return replace(component, scale=component.scale / norms)
        return component


def _norm_times(norm: Norm, factor: float) -> Norm:
    return replace(norm, weight=norm.weight * factor)


def _with_norm(branch: Branch, factor: float) -> Branch:
    """Its first norm's output so many times as large."""
    if branch.norm is not None:
        return replace(branch, norm=_norm_times(branch.norm, factor))
    assert branch.output_norm is not None
    return replace(branch, output_norm=_norm_times(branch.output_norm, factor))


def _times(
    forward: Callable[[torch.Tensor], torch.Tensor], factor: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: forward(x) * factor


def _seeing(forward: Callable[..., Any], seen: list[torch.Tensor]) -> Callable[..., Any]:
    """``forward`` that keeps what it is given."""

    def run(x: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(x.detach().clone())
        return forward(x, *arguments, **named)

    return run


def _error(
    got: torch.Tensor, wanted: torch.Tensor, part: torch.Tensor, total: torch.Tensor
) -> float:
    """Of the error, what is allowed: LIMIT of the part and the rounding of what it was added to."""
    allowed = LIMIT * float(part.norm()) + ROUNDING * float(total.norm())
    error = float((got - wanted).norm()) / max(allowed, 1e-30)
    return error if math.isfinite(error) else math.inf
