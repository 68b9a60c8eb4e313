"""A call of the operator for tests of threads."""

from __future__ import annotations

import numpy as np

from ktk import backends
from ktk.backends import Operands
from ktk.backends.base import Runner
from ktk.experts.spec import MoESpec
from ktk.machine.threads import EngineLayout
from make.cases import pack_all, random_experts, random_hidden, random_routing


def case(num_threads: int) -> tuple[Runner, tuple[np.ndarray, ...]]:
    spec = MoESpec(8, 128, 272, "int8")
    packed = pack_all(spec, random_experts(spec, 1))
    ids, weights = random_routing(40, 3, 8, 2)
    backend = next(b for b in backends.backends().values() if b.why_not(spec) is None)
    return backend.load(packed, EngineLayout(num_threads)), (
        random_hidden(40, 128, 3),
        ids,
        weights,
    )


def run(runner: Runner, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    out = np.empty_like(inputs[0])
    hidden, ids, weights = inputs
    runner.forward(Operands(hidden, ids, weights, None, out))
    return out
