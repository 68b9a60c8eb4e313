"""What every output of a conversion does, in the order in which ``ktk.convert.run`` asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights, StoredExperts
from ktk.quantise.feedback import Encode

# (what is in work, for people; bytes of the input that are done since the last call)
Report = Callable[[str, int], None]
# One expert as an output holds it, in pieces.
Pieces = list[np.ndarray]


class Sink(ABC):
    """One output, which appears complete or can be gone on with, but is never half of itself.

    Made of a source without touching the disk: what does not fit is refused then. After that
    ``open``, ``begin``, ``write_layer`` for each of ``missing``, ``write_others``, ``finish``.

    output : the path as given. folder : a directory on the disk that is written to. specs : by
    layer. coding : weight_format, group_size, activation_group, and a rotation if there is one, for
    people. other_input_bytes, other_bytes : of the tensors that are not experts', read and written.
    can_resume : what is finished may be taken over by another run. notes : a sentence each. Once it
    is open, missing : layers still to write, missing_bytes : bytes still to write, reused_others :
    of other_input_bytes, those an earlier run had done.
    """

    output: Path
    folder: Path
    specs: dict[int, MoESpec]
    coding: Mapping[str, Any]
    expert_bytes: int
    other_input_bytes: int = 0
    other_bytes: int = 0
    can_resume: bool = False
    notes: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    missing_bytes: int = 0
    reused_others: int = 0

    @abstractmethod
    def open(self, resume: bool) -> AbstractContextManager[None]:
        """Claim the output for this process; what is not finished when the block ends goes away.

        Raises FileExistsError if it is another's, or there and not to be resumed.
        """

    @abstractmethod
    def begin(self) -> None:
        """Write what comes first."""

    @abstractmethod
    def encoder(self, layer: int) -> Encode:
        """How a calibration rounds a layer's matrices."""

    @abstractmethod
    def encode(self, layer: int, weights: ExpertWeights | CodedExpert) -> Pieces:
        """One expert as this output holds it, rounded to the nearest; from any thread.

        Raises ValueError / TypeError for weights that cannot be held.
        """

    @abstractmethod
    def encode_rounded(
        self, layer: int, weights: ExpertWeights, rounded: dict[str, np.ndarray]
    ) -> Pieces:
        """The same with matrices that ``encoder`` has rounded, by projection."""

    @abstractmethod
    def write_layer(self, layer: int, experts: Iterator[Pieces]) -> None:
        """Write one layer; its experts in order, each valid until the next is asked for."""

    @abstractmethod
    def read_layer(self, layer: int) -> StoredExperts:
        """A layer as it was written."""

    @abstractmethod
    def write_others(self, threads: int, report: Report) -> None:
        """Write what is no expert's; reports add up to other_input_bytes less reused_others."""

    @abstractmethod
    def finish(self) -> None:
        """Make what is written the output, on disk to stay."""
