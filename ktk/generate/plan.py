"""What to serve a model with on this machine: format, context, requests at once, told from headers
and the memory there is.

Weights and what Python takes come first; of what is left, LEFT stays free and the rest is keys and
values. The context is the longest of which REQUESTS fit into that, or the longest at all; never
longer than the model's.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from ktk.generate.describe import OVERHEAD, ModelDescription, describe_model
from ktk.placement.residency.expert_memory import ExpertMemory

FORMATS = ("bf16", "int8", "nl4", "int4")  # of float experts, the most exact first
CONTEXTS = tuple(2**n for n in range(20, 9, -1))
REQUESTS = 4  # with a whole context each, before a shorter one is proposed
MOST_REQUESTS = 16
LEFT = 0.1  # of what is free


@dataclass(frozen=True)
class Way:
    """One way to serve a model; sizes in bytes.

    weight_format : None where the file's own runs. expert_memory : room for experts where not all
    fit, 0: all do. kv_bytes : of keys and values of all requests. context, requests : tokens of
    one, and how many have that many at once; 0 where the model does not fit. tokens_per_second : of
    one request, if nothing but reading weights from memory took time; None where a disk has a part.
    """

    description: ModelDescription
    weight_format: str | None
    expert_memory: int
    kv_bytes: int
    context: int
    requests: int
    tokens_per_second: float | None

    @property
    def fits(self) -> bool:
        return self.requests > 0

    def to_json(self) -> dict[str, Any]:
        found = self.description
        shown = {k: v for k, v in asdict(self).items() if k != "description"}
        return {
            **shown,
            "weight_format": found.weight_format,
            "bits_per_weight": found.bits_per_weight,
            "backend": found.backend,
            "kernel": found.kernel,
            "expert_bytes": found.expert_bytes,
            "other_bytes": found.rest_bytes,
            "fits": self.fits,
            "command": self.command() if self.fits else None,
        }

    def command(self) -> str:
        """The line that starts the server."""
        words = ["ktk serve", shlex.quote(self.description.path)]
        if self.weight_format is not None:
            words.append(f"--weight-format {self.weight_format}")
        if self.expert_memory:
            words.append(f"--expert-memory {self.expert_memory >> 20}MiB")
        if self.description.kv_dtype:
            words.append(f"--kv-dtype {self.description.kv_dtype}")
        words.append(f"--context {self.context} --max-requests {self.requests}")
        words.append(f"--kv-cache {max(1, math.floor(self.kv_bytes / 2**30 * 1000)) / 1000:g}")
        return " ".join(words)


def ways(
    path: str,
    read_rate: float,
    context: int | None = None,
    method: str = "auto",
    linear: str = "file",
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> list[Way]:
    """How a model can be served, the most exact way first.

    read_rate : of memory, bytes/s. context : tokens of a request; None: as there is room. method,
    linear, dtype, kv_dtype : as in ``describe_model``. Raises CheckpointError, ValueError.
    """
    options: dict[str, Any] = {
        "method": method,
        "dtype": dtype,
        "linear": linear,
        "kv_dtype": kv_dtype,
    }
    first = describe_model(path, context=context, **options)
    if first.kind not in ("float", "quantised"):
        return [_way(first, None, read_rate, context)]
    if method not in ("auto", first.backend):
        return [_way(first, first.weight_format, read_rate, context)]
    found = [describe_model(path, weight_format=f, context=context, **options) for f in FORMATS]
    runs = [f for f in found if f.reason is None]
    return [_way(f, f.weight_format, read_rate, context) for f in runs or found[:1]]


def best(found: list[Way]) -> Way | None:
    """The first that fits, but with fewer than 16 bits: those are for comparison; None if none
    does.
    """
    small = [way for way in found if way.fits and way.weight_format != "bf16"]
    return next(iter([way for way in small if not way.expert_memory] or small), None)


def _way(
    found: ModelDescription, weight_format: str | None, read_rate: float, context: int | None
) -> Way:
    free = int(found.available_bytes * (1 - LEFT)) - OVERHEAD - found.rest_bytes
    token_bytes = max(1, found.kv_bytes // max(1, found.context))
    longest = context or found.max_context or found.context
    expert_memory = 0
    if found.reason is not None:
        free = 0
    elif found.expert_bytes + token_bytes * min(longest, CONTEXTS[-1]) > free:
        # A quarter for keys and values, the rest for experts; only what is on the disk can stay
        # there.
        expert_memory = free * 3 // 4 if found.kind in ("packed", "gguf") else 0
        if not _has_room(found, expert_memory):
            free = expert_memory = 0
    room = max(0, free - (expert_memory or found.expert_bytes))
    tokens = room // token_bytes
    chosen = _context(longest, tokens, context)
    requests = min(MOST_REQUESTS, tokens // chosen) if chosen else 0
    return Way(
        found,
        weight_format,
        expert_memory if requests else 0,
        requests * chosen * token_bytes,
        chosen if requests else 0,
        requests,
        None if expert_memory else round(read_rate / _read_bytes(found), 1),
    )


def _has_room(found: ModelDescription, expert_memory: int) -> bool:
    """For the experts of one token, at least."""
    if expert_memory <= 0 or not found.num_experts_per_tok:
        return False
    each = found.expert_bytes // max(1, found.num_moe_layers * found.num_experts)
    try:
        ExpertMemory(f"{expert_memory >> 20}MiB").room(
            [each] * found.num_moe_layers,
            [found.num_experts] * found.num_moe_layers,
            found.num_experts_per_tok,
        )
    except ValueError:
        return False
    return True


def _context(longest: int, tokens: int, wanted: int | None) -> int:
    """Tokens of a request; 0 if none fits."""
    if wanted is not None:
        return wanted if wanted <= tokens else 0
    lengths = [longest, *(length for length in CONTEXTS if length < longest)]
    many = [length for length in lengths if length * REQUESTS <= tokens]
    return next(iter(many or [length for length in lengths if length <= tokens]), 0)


def _read_bytes(found: ModelDescription) -> float:
    """Of a token."""
    share = found.num_experts_per_tok / max(1, found.num_experts)
    return max(1.0, found.rest_bytes + found.expert_bytes * share)
