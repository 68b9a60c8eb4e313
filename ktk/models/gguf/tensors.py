"""Which tensors of a GGUF file are experts', and whether their shapes fit each other and the
metadata.

Three ways to name them: stacked ``blk.N.ffn_{gate,up,down}_exps.weight``, fused
``blk.N.ffn_gate_up_exps.weight`` (gate's rows first), and one tensor per expert
``blk.N.ffn_{gate,up,down}.E.weight`` (Mixtral files from before April 2024). Shared experts
(``ffn_*_shexp``) and the router stay with the caller.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ktk.checkpoint.gguf import GgufCheckpoint, GgufTensor
from ktk.errors import CheckpointError
from ktk.models.gguf.config import GgufConfig
from ktk.models.metadata import MAX_SIZE

INDEX = r"(?:0|[1-9][0-9]{0,4})"
STACKED = re.compile(
    rf"blk\.(?P<layer>{INDEX})\.ffn_(?P<part>gate_up|gate|up|down)_exps"
    r"\.(?P<kind>weight|bias|scale)"
)
SINGLE = re.compile(
    rf"blk\.(?P<layer>{INDEX})\.ffn_(?P<part>gate|up|down)\.(?P<expert>{INDEX})\.weight"
)
Found = dict[
    int, dict[str, Any]
]  # layer -> projection -> tensor, or "projection." -> expert -> tensor
Extras = dict[tuple[str, str], str]  # (projection, "bias" or "scale") -> tensor


@dataclass(frozen=True)
class Part:
    """One projection of a layer: a stacked tensor, rows of one, or a tensor per expert."""

    names: tuple[str, ...]
    num_experts: int
    out_features: int
    in_features: int
    first_row: int = 0  # within the tensor: up's rows of a fused one follow gate's


def find_tensors(names: Iterable[str]) -> tuple[Found, dict[int, Extras]]:
    """Experts' weights and what belongs to them, by layer."""
    found: Found = {}
    extras: dict[int, Extras] = {}
    for tensor in names:
        if match := STACKED.fullmatch(tensor):
            layer = int(match["layer"])
            if match["kind"] == "weight":
                found.setdefault(layer, {})[match["part"]] = tensor
            else:
                extras.setdefault(layer, {})[match["part"], match["kind"]] = tensor
        elif match := SINGLE.fullmatch(tensor):
            singles = found.setdefault(int(match["layer"]), {}).setdefault(f"{match['part']}.", {})
            singles[int(match["expert"])] = tensor
    return found, extras


def layer_parts(
    config: GgufConfig,
    is_gateless: bool,
    layer: int,
    found: dict[str, Any],
    extras: Extras,
) -> dict[str, Part]:
    """A layer's projections, in the order gate, up, down;
    every shape agrees with the others and the metadata.
    """
    checkpoint = config.checkpoint
    where = f"{checkpoint.path}: layer {layer}"
    styles = {
        "per expert" if part.endswith(".") else "fused" if part == "gate_up" else "stacked"
        for part in found
        if part != "down"
    }
    if (
        any(f"{part}." in found for part in ("gate", "up", "down") if part in found)
        or len(styles) > 1
    ):
        raise CheckpointError(f"{where}: holds experts under several names: {sorted(found)}")
    count, count_key = config.size("expert_count", layer), config.key("expert_count")
    parts: dict[str, Part] = {}
    for part in ("gate_up", "gate", "up", "down"):
        if part in found:
            parts[part] = _stacked(checkpoint.tensors[found[part]])
        elif f"{part}." in found:
            parts[part] = _singles(checkpoint, where, part, found[f"{part}."], count, count_key)
    if fused := parts.pop("gate_up", None):
        if fused.out_features % 2:
            raise CheckpointError(
                f"{where}: {fused.names[0]!r} has {fused.out_features} rows: must be even, gate's "
                "and up's"
            )
        half = fused.out_features // 2
        for i, part in enumerate(("gate", "up")):
            parts[part] = Part(
                fused.names, fused.num_experts, half, fused.in_features, first_row=i * half
            )
    needed = ("up", "down") if is_gateless else ("gate", "up", "down")
    if absent := [part for part in needed if part not in parts]:
        raise CheckpointError(
            f"{where}: no tensor for {' and '.join(absent)}; has {sorted(found)}: is a part of "
            "the model missing?"
        )
    parts = {part: parts[part] for part in ("gate", "up", "down") if part in parts}
    up, down = parts["up"], parts["down"]
    hidden, intermediate = up.in_features, up.out_features
    for part, has in parts.items():
        ins, outs = (intermediate, hidden) if part == "down" else (hidden, intermediate)
        if (has.num_experts, has.out_features, has.in_features) != (up.num_experts, outs, ins):
            raise CheckpointError(
                f"{where}: {has.names[0]!r} is {has.num_experts} x {has.out_features} x "
                f"{has.in_features}, {up.names[0]!r} {up.num_experts} x {intermediate} x {hidden} "
                "(experts, out, in): they do not fit"
            )
    if max(down.num_experts, hidden, intermediate) > MAX_SIZE:
        raise CheckpointError(
            f"{where}: {down.num_experts} experts of {hidden} x {intermediate}: at most "
            f"{MAX_SIZE} each"
        )
    config.agree(where, ("expert_count",), layer, "experts", down.num_experts)
    config.agree(where, ("expert_feed_forward_length",), layer, "a width of", intermediate)
    config.agree(where, ("moe_latent_size", "embedding_length"), layer, "a hidden size of", hidden)
    _check_extras(checkpoint, where, parts, extras)
    return parts


def _stacked(tensor: GgufTensor) -> Part:
    # ggml drops trailing dimensions of 1, and with them the only expert.
    shape = (1, *tensor.shape) if len(tensor.shape) == 2 else tensor.shape
    if len(shape) != 3:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} (byte {tensor.begin}) is {tensor.shape}: must "
            "be (experts, out, in)"
        )
    return Part((tensor.name,), *shape)


def _singles(
    checkpoint: GgufCheckpoint,
    where: str,
    part: str,
    found: dict[int, str],
    count: int | None,
    count_key: str,
) -> Part:
    """A projection of tensors of its experts' own."""
    count = max(found) + 1 if count is None else count
    missing = list(itertools.islice((e for e in range(count) if e not in found), 9))
    if missing or len(found) != count:
        text = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            (
                f"{where}: {part} holds {len(found)} experts, the highest {max(found)}, "
                f"{count_key} is {count}"
            )
            + (f"; missing: {text}" if missing else "")
        )
    names = tuple(found[expert] for expert in range(count))
    first = checkpoint.tensors[names[0]]
    for name in names:
        tensor = checkpoint.tensors[name]
        if len(tensor.shape) != 2 or tensor.shape != first.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} (byte {tensor.begin}) is {tensor.shape}, "
                f"{first.name!r} is {first.shape}: must be alike, (out, in)"
            )
    return Part(names, count, *first.shape)


def _check_extras(
    checkpoint: GgufCheckpoint,
    where: str,
    parts: dict[str, Part],
    extras: Extras,
) -> None:
    """Biases and scales have their projection's shape; scales that ktk cannot apply are refused."""
    widths = {part: has.out_features for part, has in parts.items()}
    widths["gate_up"] = 2 * widths["up"]
    experts = parts["down"].num_experts
    for (part, kind), name in extras.items():
        tensor = checkpoint.tensors[name]
        if kind == "scale" and part != "down":
            raise CheckpointError(
                f"{where}: {name!r}: scales of gate and up projections are not supported"
            )
        if part not in widths or (part == "gate_up" and ("up", kind) in extras):
            raise CheckpointError(f"{where}: {name!r} has no projection of its own")
        wanted = (experts,) if kind == "scale" else (experts, widths[part])
        if tensor.shape != wanted and (experts > 1 or tensor.shape != wanted[1:]):
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} (byte {tensor.begin}) is {tensor.shape}: must be "
                f"{wanted}"
            )
