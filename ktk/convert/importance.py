"""Importance matrices of a model's experts: recorded on a text, and what a conversion takes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint.imatrix import Imatrix, Importance, read_imatrix
from ktk.convert.exact import run_layer
from ktk.convert.recipe import experts_name, projections_of
from ktk.convert.sources import Calibration, open_source
from ktk.errors import CheckpointError
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.machine.cpu import num_physical_cores
from ktk.paths import user_path
from ktk.quantise.feedback import LayerInputs
from ktk.quantise.importance import LayerImportance

F = np.float32


@dataclass(frozen=True)
class ImportanceFile:
    """A file of llama.cpp's, to round by. Raises CheckpointError for one that is none."""

    path: Path

    def provenance(self) -> dict[str, Any]:
        """What the output tells of it."""
        digest = hashlib.sha256(user_path(self.path).read_bytes()).hexdigest()
        return {"imatrix_sha256": digest}

    def read(self) -> Imatrix:
        return read_imatrix(self.path)


def layer_importance(imatrix: Imatrix, path: Path, layer: int, spec: MoESpec) -> LayerImportance:
    """What a file says of one layer. Raises CheckpointError, with the tensor, if it does not fit.

    Where it has one of gate and up, that is both's: their inputs are the same.
    """
    squares, counts = {}, {}
    for name in projections_of(spec.has_gate):
        twin = {"gate": "up", "up": "gate"}.get(name, name)
        known = [experts_name(layer, n) for n in (name, twin)]
        entry = next((imatrix.entries[n] for n in known if n in imatrix.entries), None)
        if entry is None:
            raise CheckpointError(f"{path}: has no {known[0]}: is it of this model?")
        columns = spec.intermediate_size if name == "down" else spec.hidden_size
        try:
            entry = entry.by_matrix(spec.num_experts)
            if entry.mean_squares.shape[1] != columns:
                raise ValueError(f"{entry.mean_squares.shape[1]} columns: must be {columns}")
        except ValueError as error:
            raise CheckpointError(f"{path}: {known[0]}: {error}") from None
        squares[name], counts[name] = entry.mean_squares, entry.counts
    return LayerImportance(spec, squares, counts)


def record(
    input_path: str | os.PathLike[str],
    calibration: Calibration,
    *,
    dataset: str = "",
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imatrix:
    """The mean squares of all experts' inputs while the model reads a calibration's text.

    dataset : a name of the text. progress : (layers done, all). Raises CheckpointError for a bad
    input.
    """
    entries: dict[str, Importance] = {}
    with open_source(user_path(input_path), None) as source:
        specs = {layer: MoESpec(**source.spec_fields(layer)) for layer in source.layers}

        def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
            spec = specs[layer]

            def visit(
                expert: int, weights: ExpertWeights, token: np.ndarray, h: np.ndarray
            ) -> tuple[int, np.ndarray, np.ndarray]:
                return len(token), _mean_square(inputs.hidden[token]), _mean_square(h)

            made, output = run_layer(
                spec,
                inputs,
                lambda expert: source.read(layer, expert),
                threads or num_physical_cores(),
                visit,
            )
            count = np.array([number for number, _, _ in made], F)
            hidden, down = (np.stack([found[at] for found in made]) for at in (1, 2))
            for name in projections_of(spec.has_gate):
                squares = down if name == "down" else hidden
                entries[experts_name(layer, name)] = Importance(squares, count)
            progress(len(entries), len(specs) * len(projections_of(spec.has_gate)))
            return output

        source.layer_inputs(calibration, on_layer)
    return Imatrix(entries, dataset=dataset)


def _mean_square(x: np.ndarray) -> np.ndarray:
    """Of each column, float32; zeros without rows."""
    if not len(x):
        return np.zeros(x.shape[1], F)
    squares: np.ndarray = np.square(x, dtype=np.float64).mean(axis=0).astype(F)
    return squares
