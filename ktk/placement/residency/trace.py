"""Traces: which experts a model's tokens went to, layer by layer, in the order of the calls.

A trace is a .npz file of arrays, one row for each token of each layer's call:

    layers      int32 (rows,)           among the layers with experts, 0..num_layers-1
    calls       int64 (rows,)           rows of one call have one number, which never falls
    tokens      int64 (rows,)           position in its text
    expert_ids  int32 (rows, top_k)     -1 = none
    weights     float32 (rows, top_k)   as the router gave them

and version = 1, num_layers, num_experts, expert_bytes (0 = unknown) and source, one value each.
"""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ktk.errors import CheckpointError
from ktk.paths import user_path

VERSION = 1
_ARRAYS = {
    "layers": (np.int32, 1),
    "calls": (np.int64, 1),
    "tokens": (np.int64, 1),
    "expert_ids": (np.int32, 2),
    "weights": (np.float32, 2),
}
_NUMBERS = ("version", "num_layers", "num_experts", "expert_bytes")
_MOST_KEYS = 1 << 24  # layers x experts: no model is near


class Call(NamedTuple):
    """One layer's call.

    keys : its experts, layer * num_experts + expert, each once, ascending. scores : float32
    (num_experts,), the largest weight over the call's tokens.
    """

    layer: int
    keys: list[int]
    scores: np.ndarray


@dataclass(frozen=True)
class Trace:
    """The arrays of the file; ValueError if they do not fit each other."""

    num_layers: int
    num_experts: int
    layers: np.ndarray
    calls: np.ndarray
    tokens: np.ndarray
    expert_ids: np.ndarray
    weights: np.ndarray
    expert_bytes: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        for name, (dtype, dimensions) in _ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != dimensions or len(array) != len(self.layers):
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}: must be {np.dtype(dtype)} of "
                    f"{dimensions} dimensions and {len(self.layers)} rows"
                )
        if self.num_layers < 1 or self.num_experts < 1 or self.expert_bytes < 0:
            raise ValueError(
                f"num_layers={self.num_layers}, num_experts={self.num_experts}, "
                f"expert_bytes={self.expert_bytes}: must be at least 1, 1 and 0"
            )
        if self.num_layers * self.num_experts > _MOST_KEYS:
            raise ValueError(
                f"{self.num_layers} layers of {self.num_experts} experts: must be at most "
                f"{_MOST_KEYS} experts"
            )
        if self.expert_ids.shape != self.weights.shape or not len(self.layers):
            raise ValueError(
                f"expert_ids {self.expert_ids.shape}, weights {self.weights.shape}: must be equal, "
                "and one row at least"
            )
        if self.layers.min() < 0 or self.layers.max() >= self.num_layers:
            raise ValueError(f"layers must be 0..{self.num_layers - 1}")
        if self.expert_ids.size and not (
            self.expert_ids.min() >= -1 and self.expert_ids.max() < self.num_experts
        ):
            raise ValueError(f"expert_ids must be -1..{self.num_experts - 1}")
        if not np.isfinite(self.weights).all():
            raise ValueError("weights must be finite")
        step, same = np.diff(self.calls), np.diff(self.layers) == 0
        if (step < 0).any() or ((step == 0) & ~same).any():
            raise ValueError("calls must not fall, and each must be one layer's")

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[1])

    def each_call(self) -> Iterator[Call]:
        """Every call in its order; those that use no expert are left out."""
        cuts = np.flatnonzero(np.diff(self.calls)) + 1
        starts = np.concatenate([[0], cuts, [len(self.calls)]]).tolist()
        for start, end in itertools.pairwise(starts):
            ids, weights = self.expert_ids[start:end], self.weights[start:end]
            valid = ids >= 0
            experts = np.unique(ids[valid])
            if not len(experts):
                continue
            scores = np.zeros(self.num_experts, np.float32)
            np.maximum.at(scores, ids[valid], weights[valid])
            layer = int(self.layers[start])
            yield Call(
                layer, (experts.astype(np.int64) + layer * self.num_experts).tolist(), scores
            )

    def first(self, top_k: int) -> Trace:
        """The same trace with only the first experts of each token, the likeliest as routers give
        them. ValueError unless 1 <= top_k <= self.top_k.
        """
        if not 1 <= top_k <= self.top_k:
            raise ValueError(f"top_k={top_k}: must be 1..{self.top_k}")
        ids, weights = self.expert_ids[:, :top_k], self.weights[:, :top_k]
        return dataclasses.replace(self, expert_ids=ids, weights=weights)

    def stepped(self, prompt: int) -> Trace:
        """The same tokens in the calls that generating them makes: the first ``prompt`` in one call
        of each layer, the others one by one.

        For the trace of one text. ValueError if a token stands twice in a layer.
        """
        step = np.maximum(self.tokens - prompt + 1, 0) if prompt else self.tokens
        calls = step * self.num_layers + self.layers
        order = np.lexsort((self.tokens, calls))
        same = (np.diff(self.tokens[order]) == 0) & (np.diff(calls[order]) == 0)
        if same.any():
            raise ValueError("a token stands twice in a layer: must be the trace of one text")
        names = ("layers", "tokens", "expert_ids", "weights")
        rows = {name: getattr(self, name)[order] for name in names}
        return dataclasses.replace(self, calls=calls[order], **rows)

    def save(self, path: Path) -> None:
        """Writes the file, compressed."""
        stored: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        stored |= {name: np.int64(getattr(self, name)) for name in _NUMBERS if name != "version"}
        stored |= {"version": np.int64(VERSION), "source": np.str_(self.source)}
        with user_path(path).open("wb") as file:  # given a path, NumPy would add to its name
            np.savez_compressed(file, **stored)


def read_trace(path: Path) -> Trace:
    """A trace's file, read as hostile. CheckpointError names the file and what is wrong."""
    path = user_path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return _trace_of({name: stored[name] for name in (*_ARRAYS, *_NUMBERS, "source")})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: no trace, {error.args[0]}") from error
    except (
        ValueError,
        TypeError,
        EOFError,
        MemoryError,
        AttributeError,
        OverflowError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise CheckpointError(f"{path}: no trace that can be read: {error}") from error


def _trace_of(stored: dict[str, np.ndarray]) -> Trace:
    numbers = {}
    for name in _NUMBERS:
        if stored[name].shape != () or stored[name].dtype.kind not in "iu":
            raise ValueError(f"{name} must be one integer")
        numbers[name] = int(stored[name])
    if numbers.pop("version") != VERSION:
        raise ValueError(f"version {int(stored['version'])}: must be {VERSION}")
    fields: dict[str, Any] = {name: stored[name] for name in _ARRAYS} | numbers
    return Trace(**fields, source=str(stored["source"]))


@dataclass(frozen=True)
class Spread:
    """What of a trace decides hits. All are shares, 0 to 1, averages over layers.

    reuse : of a token's experts, how many the token before used, too. top_tenth, top_half : of all
    uses, those of the most used tenth, and half, of a layer's experts.
    """

    reuse: float
    top_tenth: float
    top_half: float


def spread(trace: Trace) -> Spread:
    """Measured over the tokens in their order, prompts' tokens one by one."""
    reuse, tenth, half = [], [], []
    for layer in range(trace.num_layers):
        ids = trace.expert_ids[trace.layers == layer]
        uses = np.bincount(ids[ids >= 0], minlength=trace.num_experts)
        if not uses.sum():
            continue
        falling = np.sort(uses)[::-1] / uses.sum()
        tenth.append(falling[: max(1, round(trace.num_experts / 10))].sum())
        half.append(falling[: max(1, trace.num_experts // 2)].sum())
        if len(ids) > 1:
            again = (ids[1:, :, None] == ids[:-1, None, :]).any(axis=2) & (ids[1:] >= 0)
            reuse.append(again.sum() / max(1, (ids[1:] >= 0).sum()))
    return Spread(*(float(np.mean(part)) if part else 0.0 for part in (reuse, tenth, half)))
