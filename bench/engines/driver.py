"""What the engines' drivers share: sizes, routings, a float32 reference, and the answers of
driven.py. Needs torch, not ktk.

The experts are a few, over and over, each in memory of its own: building them is quick, and the
check sees which one was run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Weights in huge pages, as ktk's are: torch reads this when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

ASLEEP = 0.15  # seconds after which its workers have stopped spinning
MIN_CALLS, MAX_CALLS = 2, 20
# A call longer than this needs no other before it to be warm, and stands for a round alone.
WARM_UP_BELOW = 0.25  # seconds
DIFFERENT_EXPERTS = 2
CHECKED_TOKENS = 2  # at either end of a batch
# The largest of some 10,000 Gaussian errors is 5 mean ones; twice that, for their tails.
WORST = 10
SMALL_PAGE = 4096  # bytes
ERRORS = (ImportError, AttributeError, RuntimeError, ValueError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Sizes:
    """Of a layer. max_tokens : the most that a call will have."""

    method: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    threads: int
    max_tokens: int


@dataclass(frozen=True)
class Expert:
    """The float32 weights that an expert's stored ones stand for.

    gate, up : (intermediate, hidden). down : (hidden, intermediate).
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)  # (tokens, intermediate)
        return h @ self.down.T


class Engine(ABC):
    """One layer. Expert e holds the weights of ``different[e % len(different)]``.

    arithmetic : "int8" or "bf16". tolerance : the largest mean error, relative to the mean
    magnitude of an output. arrays : the weights, where they are tensors.
    Constructors raise one of ERRORS, whose text is the reason, if the engine cannot run.
    """

    version: str
    kernel: str
    bytes_per_weight: float
    arithmetic: str
    tolerance: float
    different: list[Expert]
    ids_type = torch.int32
    arrays: tuple[torch.Tensor, ...] = ()

    @abstractmethod
    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """bf16 (tokens, hidden). x : bf16. ids : ids_type, weights : float32, (tokens, top_k)."""


def random_weights(sizes: Sizes, e: int) -> Expert:
    """Normal weights that keep the size of what they multiply."""
    g = torch.Generator().manual_seed(e)
    shapes = [(sizes.intermediate, sizes.hidden)] * 2 + [(sizes.hidden, sizes.intermediate)]
    return Expert(*(torch.randn(shape, generator=g) / shape[1] ** 0.5 for shape in shapes))


class Session:
    """An engine, and what its host asks for."""

    def __init__(self, sizes: Sizes, engine: Engine) -> None:
        self.sizes, self.engine = sizes, engine
        self.deck: list[int] = []
        torch.manual_seed(0)

    def routing(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and float32 weights (tokens, top_k); rows of weights sum to 1.

        One token's experts are dealt from a shuffled deck.
        """
        s = self.sizes
        if tokens == 1:
            if len(self.deck) < s.top_k:
                self.deck = torch.randperm(s.experts).tolist()
            ids = torch.tensor([[self.deck.pop() for _ in range(s.top_k)]])
        else:
            ids = torch.rand(tokens, s.experts).argsort(dim=1)[:, : s.top_k]
        weights = torch.rand(tokens, s.top_k) + 0.1
        weights = (weights / weights.sum(dim=1, keepdim=True)).contiguous()
        return ids.to(self.engine.ids_type).contiguous(), weights

    def reference(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float32 (tokens, hidden)."""
        outputs = torch.stack([expert(x.float()) for expert in self.engine.different])
        kinds = ids.long() % len(self.engine.different)  # (tokens, top_k)
        chosen = outputs[kinds, torch.arange(len(x))[:, None]]  # (tokens, top_k, hidden)
        return (chosen * weights[:, :, None]).sum(dim=1)

    def check(self, tokens: int) -> dict[str, float]:
        """The first and last tokens of a batch: mean and largest error, relative to the mean
        magnitude.
        """
        x = torch.randn(tokens, self.sizes.hidden).bfloat16()
        ids, weights = self.routing(tokens)
        ends = {*range(CHECKED_TOKENS), *range(tokens - CHECKED_TOKENS, tokens)}
        few = sorted(row for row in ends if 0 <= row < tokens)
        got = self.engine.forward(x, ids, weights)[few].float()
        expected = self.reference(x[few], ids[few], weights[few])
        off, mean = (got - expected).abs(), expected.abs().mean()
        tolerance = self.engine.tolerance
        return {
            "error": float(off.mean() / mean),
            "tolerance": tolerance,
            "worst": float(off.max() / mean),
            "worst_tolerance": WORST * tolerance,
        }

    def measure(self, tokens: int, seconds: float) -> dict[str, list[float]]:
        """Calls for about so many seconds, each with another routing; the first, if short, only
        warms up.
        """
        x = torch.randn(tokens, self.sizes.hidden).bfloat16()
        times: list[float] = []
        touched: list[float] = []
        for array in self.engine.arrays:
            # after the others' turns the first access to a page costs a virtual machine more
            array.view(torch.uint8).reshape(-1)[::SMALL_PAGE].max()
        for ids, weights in [self.routing(tokens) for _ in range(MAX_CALLS + 1)]:
            begin = time.perf_counter()
            self.engine.forward(x, ids, weights)
            times.append(time.perf_counter() - begin)
            touched.append(len(ids.unique()))
            if times[0] >= WARM_UP_BELOW:
                return {"seconds": times, "touched": touched}
            if len(times) > MIN_CALLS and sum(times[1:]) > seconds:
                break
        return {"seconds": times[1:], "touched": touched[1:]}

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            if "check" in asked:
                return self.check(asked["check"])
            return self.measure(asked["measure"], asked["seconds"])
        except ERRORS as error:
            return {"why_not": reason(error)}


def reason(error: BaseException) -> str:
    """One line: torch's errors go on with a backtrace."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def drive(make: Callable[[Sizes], Engine]) -> None:
    """Build the engine that the command line asks for, and answer until the host ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", required=True)
    for name in ("hidden", "intermediate", "experts", "top-k", "threads", "max-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    sizes = Sizes(**vars(parser.parse_args()))
    replies = os.dup(1)
    os.dup2(2, 1)  # engines print to stdout

    def reply(message: dict[str, Any]) -> None:
        os.write(replies, (json.dumps(message) + "\n").encode())

    try:
        torch.set_num_threads(sizes.threads)
        engine = make(sizes)
    except ERRORS as error:
        reply({"why_not": reason(error)})
        os._exit(0)
    named = ("version", "kernel", "bytes_per_weight", "arithmetic")
    reply({name: getattr(engine, name) for name in named})
    session = Session(sizes, engine)
    for line in sys.stdin:
        found = session.answer(json.loads(line))
        time.sleep(ASLEEP)
        reply(found)
    os._exit(0)  # an engine's worker threads need not end
