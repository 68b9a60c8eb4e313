"""Whether a decoder layer computes what its ``DecoderSpec`` says: its own forward beside the native call, in float32.

In float32 rounding and another formula lie far apart: see LIMIT. Attention, experts and the MLP beside them are compared each by
itself and relative to its own size, so that a large one hides no error of a small one. Four kinds of input make visible
what seldom acts: few keys and many, more than any window or index; norms' outputs 64 times as large, for clips and
caps; inputs as large as only a clip would notice; so small that epsilons count; places in the text beyond any length.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ktk.experts.activation import Activation
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.decoder_specs import (
    DescribedLayer,
    in_float32,
    replace_forward,
)
from ktk.ops.decoder import DecoderLayer, DecoderSpec, Mlp
from ktk.ops.linear import Linear

# Of a part's size, root mean square. See the commit that set it for what honest layers and those 1 % off come to.
LIMIT = 2e-4
ROUNDING = 3e-7  # of what a part is added to
SAME_SUM = 1e-5  # of inputs beside which the parts are small
# Of two sums in other orders a code of a rounded activation may fall to the other side: such a layer passes with other inputs.
SEEDS = tuple(range(11, 19))
SCORES = 2.0  # standard deviation of scores: neither all keys alike nor one alone
FEWEST_KEYS, MANY_KEYS, MOST_KEYS = 7, 300, 8192
_REACHES = re.compile(r"window|chunk|topk|block|local|sink|span|index")
_DTYPES = {torch.float32: "f", torch.float16: "e", torch.bfloat16: "H"}


def run_native(
    layer: DecoderLayer,
    x: torch.Tensor,
    turns: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """A token through the layer, its key and value written to the last rows. x : (1, 1, hidden_size), of a dtype in ``_DTYPES``."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    at = turns.data_ptr()
    layer.native.forward(
        _DTYPES[x.dtype], x.data_ptr(), at, at + turns.stride(0) * 4, keys.data_ptr(), keys.stride(1),
        values.data_ptr(), values.stride(1), keys.shape[-2] - 1, out.data_ptr(),
    )  # fmt: skip
    return out


def can_run(dtype: torch.dtype) -> bool:
    return dtype in _DTYPES


@dataclass(frozen=True)
class _Probe:
    says: str
    num_keys: int
    size: float = 1.0  # of inputs
    norms: float = 1.0  # what norms' outputs are multiplied by
    place: int | None = None  # in the text, if another than the token's
    has_parts: bool = True


class Trial:
    """A described layer's native call against ``own_forward``, given the arguments of a real call for one token."""

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

    def differs(self, is_thorough: bool) -> str | None:
        """What comes out otherwise; None if nothing does. Sets ``is_interleaved``."""
        spec = self.described.spec
        probes = list(self._probes())[: None if is_thorough else 1]
        reasons = []
        for self.is_interleaved in (False, True):
            self.spec = replace(spec, is_interleaved=self.is_interleaved)
            reason = next((r for probe in probes if (r := self._try(probe)) is not None), None)
            if reason is None:
                return None
            reasons.append(reason)
            if not spec.rotary_dim:
                break
        return reasons[0]

    def _probes(self) -> Iterator[_Probe]:
        yield _Probe("few keys", FEWEST_KEYS)
        many = self._many_keys()
        yield _Probe("many keys, small inputs, far on", many, size=1e-3, place=1 << 20)
        yield _Probe("norms' outputs made large", 40, norms=64.0)
        yield _Probe("huge inputs", FEWEST_KEYS, size=1e6, has_parts=False)

    def _many_keys(self) -> int:
        config = getattr(self.described.attention, "config", None)
        reaches = [
            value
            for name, value in vars(config).items()
            if _REACHES.search(name) and isinstance(value, int)
        ] if config is not None else []  # fmt: skip
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
        spec, hidden = self.spec, self.spec.hidden_size
        x = torch.randn(1, 1, hidden, generator=g) * probe.size
        angles = torch.rand(spec.rotary_dim // 2, generator=g) * 2 * math.pi
        turns = torch.stack([angles.cos(), angles.sin()])
        shape = (2, 1, spec.num_kv_heads, probe.num_keys, spec.head_dim)
        keys, values = torch.randn(shape, generator=g)
        run = functools.partial(self._own, x, turns, probe)
        with torch.no_grad(), in_float32(self.module):
            keys = keys * self._key_size(x)
            own: dict[str | None, Any] = {None: run(keys, values, None)}
            if spec.experts is not None and spec.mlp is not None and probe.has_parts:
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

    def _key_size(self, x: torch.Tensor) -> float:
        """What random keys must be multiplied by for scores of SCORES."""
        spec = self.spec
        if spec.q_norm is not None:
            size = float(np.sqrt(np.square(spec.q_norm).mean()))
        else:
            q = self.described.attention.q_proj(self.described.input_norm(x))
            size = float(q.pow(2).mean().sqrt())
        return SCORES / max(size * abs(spec.scaling) * math.sqrt(spec.head_dim), 1e-20)

    def _own(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        probe: _Probe,
        keys: torch.Tensor,
        values: torch.Tensor,
        left_out: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What stands before the second norm, the output, the new key and value: the layer's own forward's, without one of its parts."""
        described = self.described
        seen: list[torch.Tensor] = []
        cache = DynamicCache()
        cache.layers = [hf.DynamicLayer() for _ in range(self.index + 1)]
        layer: Any = cache.layers[self.index]
        layer.update(keys, values)
        undo = [
            replace_forward(
                described.input_norm, _times(described.input_norm.forward, probe.norms)
            ),
            replace_forward(
                described.output_norm, _times(described.output_norm.forward, probe.norms, seen)
            ),
        ]
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(described.attention, name, None)) is not None:
                undo.append(replace_forward(norm, _times(norm.forward, math.sqrt(probe.norms))))
        silent = {"experts": described.experts, "mlp": described.shared}.get(left_out or "")
        if silent is not None:
            undo.append(replace_forward(silent, lambda rows, *_: torch.zeros_like(rows)))
        # Logits stay as they are: of large ones scores are alike, and of a gate that shuts nothing is seen.
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
        return seen[0], out, layer.keys[:, :, -1], layer.values[:, :, -1]

    def _arguments(self, turns: torch.Tensor, probe: _Probe, cache: Any) -> dict[str, Any]:
        named = {
            name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.named.items()
        }  # fmt: skip
        cosines = named[hf.POSITIONS][0]
        half = turns.shape[1]
        if cosines.shape[-1] != half:
            first = cosines[..., :half]
            are_pairs = not torch.equal(first, cosines[..., half:])
            turns = turns.repeat_interleave(2, -1) if are_pairs else torch.cat([turns, turns], -1)
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
        """The output, the new key and value. left_out : "attention" leaves all but attention out."""
        spec = self._changed(probe.norms)
        if left_out in ("experts", "attention"):
            spec = replace(spec, experts=None, logits=None, router=None, mlp=spec.mlp if left_out == "experts" else _nothing(spec.hidden_size))  # fmt: skip
        elif left_out == "mlp":
            spec = replace(spec, mlp=None)
        room = [torch.cat([rows, torch.zeros_like(rows[:, :, :1])], 2) for rows in (keys, values)]
        out = run_native(DecoderLayer(spec), x, turns.contiguous(), *room)
        return out, room[0][:, :, -1], room[1][:, :, -1]

    def _changed(self, norms: float) -> DecoderSpec:
        """The spec, with norms' outputs so many times as large and logits as they were."""
        spec = self.spec
        if norms == 1.0:
            return spec
        changed: dict[str, Any] = {
            "input_norm": spec.input_norm * norms,
            "output_norm": spec.output_norm * norms,
        }
        for name in ("q_norm", "k_norm"):
            if (weight := getattr(spec, name)) is not None:
                changed[name] = weight * math.sqrt(norms)
        if spec.logits is not None:
            matrix = self.described.router.weight.detach().float() / norms
            changed["logits"] = Linear(
                matrix, spec.logits.bias[: len(matrix)] if spec.logits.bias is not None else None, weight_format="fp32"
            )  # fmt: skip
        if spec.mlp is not None and spec.mlp.scale is not None:
            changed["mlp"] = replace(spec.mlp, scale=spec.mlp.scale / norms)
        return replace(spec, **changed)


def _times(
    forward: Callable[[torch.Tensor], torch.Tensor],
    factor: float,
    seen: list[torch.Tensor] | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(x.detach().clone())
        return forward(x) * factor

    return run


def _error(
    got: torch.Tensor, wanted: torch.Tensor, part: torch.Tensor, total: torch.Tensor
) -> float:
    """Of the error, what is allowed: LIMIT of the part and the rounding of what it was added to."""
    allowed = LIMIT * float(part.norm()) + ROUNDING * float(total.norm())
    error = float((got - wanted).norm()) / max(allowed, 1e-30)
    return error if math.isfinite(error) else math.inf


def _nothing(hidden_size: int) -> Mlp:
    """An MLP that adds nothing. Not kept: a layer that is alive holds the engine's number of threads."""
    wide = Linear(np.zeros((16, hidden_size), np.float32), weight_format="fp32")
    down = Linear(np.zeros((hidden_size, 16), np.float32), weight_format="fp32")
    return Mlp(wide, wide, down, Activation.silu())
