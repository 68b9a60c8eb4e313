"""In which order examples are taken. It follows from the seed alone, so a run that goes on after an
interruption takes those that it would have taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ktk.train.data import Example


@dataclass(frozen=True)
class Order:
    """Examples anew shuffled for each epoch, one epoch behind the other.

    num_examples : at least 1. per_step : examples that a step takes.
    """

    num_examples: int
    per_step: int
    seed: int

    def of_step(self, step: int) -> list[int]:
        """The places of the examples that step ``step``, from 0, takes."""
        start = step * self.per_step
        places = range(start, start + self.per_step)
        epochs = {at // self.num_examples for at in places}
        orders = {epoch: self._epoch(epoch) for epoch in epochs}
        return [orders[at // self.num_examples][at % self.num_examples] for at in places]

    def steps(self, epochs: float) -> int:
        """Steps that take every example ``epochs`` times, rounded up."""
        return max(1, -int(-epochs * self.num_examples // self.per_step))

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        found: list[int] = torch.randperm(self.num_examples, generator=generator).tolist()
        return found


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those that are measured on instead: ``share`` of them, at least one
    if it is not 0.

    ValueError if none would be left to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out={share}: must be at least 0 and below 1")
    count = max(1, round(share * len(examples))) if share else 0
    if count >= len(examples):
        raise ValueError(
            f"{len(examples)} examples are too few to hold some out: take --held-out 0, or a file"
        )
    generator = torch.Generator().manual_seed(seed)
    held = set(torch.randperm(len(examples), generator=generator)[:count].tolist())
    return (
        [one for at, one in enumerate(examples) if at not in held],
        [one for at, one in enumerate(examples) if at in held],
    )
