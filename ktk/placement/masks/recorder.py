"""Counts which experts a running model's tokens go to. It is told by whoever runs the layers.

A forward pass is between ``begin_pass`` and ``end_pass``; what is noted between is kept only if it
ends. Modes are those of SGLang's --expert-distribution-recorder-mode:

    stat         counts, summed over passes
    stat_approx  the same here: nothing needs to be approximated
    per_pass     counts of each pass
    per_token    the experts of each token of each pass

Passes run in one thread at a time; all else may be called from any.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from ktk.log import logger
from ktk.placement.masks.files import recorder_path, write_records, write_statistics
from ktk.placement.masks.grid import ExpertGrid

MODES = ("stat", "stat_approx", "per_pass", "per_token")


class ExpertRecorder:
    """chosen : int64 (moe_layers, top_k), -1 for none. Whoever runs one token of a layer may leave
    its experts in the layer's row, instead of calling ``note``. It must stay where it is.

    grid : of the model. top_k : experts of a token, at most.
    """

    def __init__(self, grid: ExpertGrid, top_k: int, mode: str = "stat") -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        if not 1 <= top_k <= grid.num_experts:
            raise ValueError(f"top_k={top_k}: must be 1..{grid.num_experts}")
        self.grid, self.top_k, self.mode = grid, top_k, mode
        self.chosen = np.full((len(grid.moe_layers), top_k), -1, np.int64)
        self.is_recording = False
        self._starts = np.arange(len(self.chosen))[:, None] * grid.num_experts
        self._noted: list[tuple[int, np.ndarray]] | None = None  # None: between passes
        self._lock = threading.Lock()
        self._reset()

    def start(self) -> None:
        """Record from the next pass on, from nothing."""
        with self._lock:
            if self.is_recording:
                logger.warning("experts are being recorded already: what was recorded is dropped")
            self._reset()
            self.is_recording = True

    def stop(self) -> None:
        """Record no more; what was recorded stays for ``dump``."""
        with self._lock:
            if not self.is_recording:
                logger.warning("no experts are being recorded: start first")
            self.is_recording = False

    @property
    def num_passes(self) -> int:
        """Recorded since the start."""
        return self._num_passes

    def counts(self) -> np.ndarray:
        """int64 (num_layers, num_experts), of all passes since the start, a copy."""
        with self._lock:
            return self._of_all_layers(self._counts)

    def dump(self, directory: Path) -> Path:
        """Write what was recorded to a new file (``files``), and start from nothing. ValueError if
        there was no pass.
        """
        with self._lock:
            if not self._num_passes:
                raise ValueError("nothing was recorded: start, run the model, and dump then")
            if self.mode in ("per_pass", "per_token"):
                path = recorder_path(directory, rank=0)
                write_records(path, self._records, self.grid.shape)
            else:
                path = recorder_path(directory)
                write_statistics(path, self._of_all_layers(self._counts)[None])
            self._reset()
            return path

    def begin_pass(self) -> None:
        self._noted = []
        self.chosen[:] = -1

    def note(self, row: int, ids: np.ndarray) -> None:
        """Experts that tokens of a layer go to.

        row : of the layers with experts. ids : int (num_tokens, top_k); what is no expert's number
        is left out. It must not change afterwards.
        """
        if self._noted is not None:
            self._noted.append((row, ids))

    def end_pass(self) -> None:
        """The pass that ``begin_pass`` began is over; without that it was begun before anybody
        listened, and is not counted.
        """
        noted, self._noted = self._noted, None
        if noted is None or not self.is_recording:
            return
        with self._lock:
            before = self._counts.copy() if self.mode in ("per_pass", "per_token") else None
            self._count(noted)
            if before is not None:
                self._records.append(self._record(self._counts - before, noted))
            self._num_passes += 1

    def _count(self, noted: list[tuple[int, np.ndarray]]) -> None:
        experts = self.grid.num_experts
        flat = self._counts.reshape(-1)
        if self._is_one_token(noted):
            flat[self._starts + self.chosen] += 1  # no two are the same expert
            return
        rows, slots = np.nonzero(self.chosen >= 0)
        np.add.at(flat, rows * experts + self.chosen[rows, slots], 1)
        for row, ids in noted:
            valid = ids[(ids >= 0) & (ids < experts)]
            self._counts[row] += np.bincount(valid, minlength=experts)

    def _is_one_token(self, noted: list[tuple[int, np.ndarray]]) -> bool:
        """Whether native calls took it through all layers."""
        return not noted and self.chosen.min() >= 0

    def _record(self, counts: np.ndarray, noted: list[tuple[int, np.ndarray]]) -> dict[str, Any]:
        record: dict[str, Any] = {
            "forward_pass_id": self._num_passes,
            "rank": 0,
            "gatherer_key": "primary",
            "global_physical_count": self._of_all_layers(counts),
        }
        if self.mode == "per_token":
            record["topk_ids_of_layer"] = self._tokens(noted)
            record["misc_objects"] = []
        return record

    def _tokens(self, noted: list[tuple[int, np.ndarray]]) -> np.ndarray:
        """int32 (num_layers, tokens, top_k), -1 for none."""
        if self._is_one_token(noted):
            found = np.full((self.grid.num_layers, 1, self.top_k), -1, np.int32)
            found[self.grid.rows, 0] = self.chosen
            return found
        of_row: dict[int, list[np.ndarray]] = {}
        for row in np.flatnonzero((self.chosen >= 0).any(axis=1)).tolist():
            of_row.setdefault(row, []).append(self.chosen[row : row + 1])
        for row, ids in noted:
            of_row.setdefault(row, []).append(ids)
        tokens = max((sum(map(len, parts)) for parts in of_row.values()), default=0)
        found = np.full((self.grid.num_layers, tokens, self.top_k), -1, np.int32)
        for row, parts in of_row.items():
            ids = np.concatenate(parts)
            ids = np.where((ids >= 0) & (ids < self.grid.num_experts), ids, -1)
            found[self.grid.moe_layers[row], : len(ids), : ids.shape[1]] = ids
        return found

    def _of_all_layers(self, counts: np.ndarray) -> np.ndarray:
        found = np.zeros(self.grid.shape, np.int64)
        found[self.grid.rows] = counts
        return found

    def _reset(self) -> None:
        self._counts = np.zeros((len(self.grid.moe_layers), self.grid.num_experts), np.int64)
        self._records: list[dict[str, Any]] = []
        self._num_passes = 0
