"""What becomes of experts for a method: they run as they are; GGUF blocks also repacked,
or packed in another format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from ktk import backends, env
from ktk.experts.dequantise import expert_weights
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.placement.blocks import repack
from ktk.quantise.pack import pack_experts

# GGUF types of at least so many bits become int8 where blocks cannot run, others int4.
_INT8_FROM_BITS = 5


def packed_format(method: str, experts: StoredExperts) -> str | None:
    """The format that blocks are packed into for ``method``; None: they run as they are.

    A method that names a format (INT8, AMXINT4 ...) asks for that. "auto" and the names of backends
    for packed weights take int8 for types of 5 bits and more, int4 for others; "auto" only where no
    kernel over blocks runs.
    """
    key = backends.check_method(method)
    if key == "auto":
        key = env.backend() or key
    named = backends.method_format(key)
    if named is not None:
        return named
    backend = backends.backends()["LLAMAFILE"]
    if key.upper() == backend.name or (key == "auto" and backend.why_not(experts.spec) is None):
        return None
    return "int8" if experts.bits_per_weight >= _INT8_FROM_BITS else "int4"


def packed_spec(experts: StoredExperts, weight_format: str) -> MoESpec:
    """The spec of these experts packed in ``weight_format``."""
    return dataclasses.replace(
        experts.spec,
        weight_format=weight_format,
        group_size=None,
        activation_group=None,
        rotation=None,
    )


def plan(
    experts: StoredExperts, method: str, is_repacked: bool | None
) -> tuple[MoESpec, Callable[[int], StoredExperts]]:
    """The spec that will run, and what makes its experts, given a number of threads (the long
    part).

    is_repacked : whether blocks are copied in the kernels' order; None: KTK_REPACK.
    """
    if experts.is_packed:
        if is_repacked:
            raise ValueError("repack=True: these experts are packed already; it is for GGUF blocks")
        return experts.spec, lambda num_threads: experts
    if is_repacked not in (None, False, True):
        raise ValueError(f"repack={is_repacked!r}: must be True, False or None")
    weight_format = packed_format(method, experts)
    if weight_format is not None:
        spec = packed_spec(experts, weight_format)
        return spec, partial(pack_experts, spec, partial(expert_weights, experts))
    if env.repack() if is_repacked is None else is_repacked:
        return experts.spec, partial(repack, experts)
    return experts.spec, lambda num_threads: experts
