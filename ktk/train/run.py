"""The training loop: AdamW with a warm-up and a cosine, steps of several batches, a state written
from time to time.

It is a loop of our own, and not transformers' Trainer, because a run that was killed must go on
with the same bits: Trainer writes its checkpoints as several files one after the other, and takes
the random state of the moment. Here a step's randomness and its examples follow from the seed and
the step's number, and the state is one file that is replaced as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ktk.errors import CheckpointError
from ktk.train.data import Example
from ktk.train.loss import BatchLoss
from ktk.train.order import Order
from ktk.train.state import State, read_state, write_state


@dataclass(frozen=True)
class Recipe:
    """How a run trains.

    steps : of the optimiser. batch : examples of one forward pass; accumulate : passes of a step.
    lr : the highest learning rate, after ``warmup`` steps; a cosine then takes it to zero.
    clip : longest gradient, over all parameters. save_every : steps between two states.
    """

    steps: int
    lr: float = 2e-4
    batch: int = 1
    accumulate: int = 8
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup={self.warmup}: must be in 0..steps={self.steps}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay={self.weight_decay}: must be at least 0")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed}: must be in 0..{(1 << 32) - 1}")

    def lr_of(self, step: int) -> float:
        """Of step ``step``, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Step:
    """What a step was. number : from 1. loss : mean of its targets, nats. num_tokens : that passed
    the model. seconds : it took.
    """

    number: int
    loss: float
    lr: float
    num_tokens: int
    seconds: float


@dataclass
class Progress:
    """What a run measured. held_out_before, held_out_after : mean loss of the examples held out,
    nats; None without any, or not measured yet.
    """

    steps: list[Step] = field(default_factory=list)
    held_out_before: float | None = None
    held_out_after: float | None = None

    @property
    def speed(self) -> float:
        """Tokens/s of all steps."""
        seconds = sum(step.seconds for step in self.steps)
        return sum(step.num_tokens for step in self.steps) / seconds if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Progress:
        """CheckpointError for what is none."""
        try:
            steps = [Step(**step) for step in said["steps"]]
            return cls(steps, said["held_out_before"], said["held_out_after"])
        except (KeyError, TypeError) as error:
            raise CheckpointError("the state of the run says no progress") from error


class Run:
    """One training of a model's parameters that require gradients, in a directory.

    model : in evaluation or training mode. said : further JSON that must be the same to go on, as
    what was trained and where.
    Raises ValueError if nothing requires gradients, or the directory's state is of another run;
    CheckpointError if it is damaged.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[Example],
        held_out: Sequence[Example],
        recipe: Recipe,
        directory: Path,
        said: dict[str, Any],
    ) -> None:
        self.model, self.recipe, self.directory = model, recipe, directory
        self._train, self._held_out = train, held_out
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no parameters that require gradients")
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self._order = Order(len(train), recipe.batch * recipe.accumulate, recipe.seed)
        self._loss = BatchLoss(model)
        self._said = {
            **said,
            "recipe": {n: v for n, v in dataclasses.asdict(recipe).items() if n != "save_every"},
            "data": fingerprint(train),
            "held_out": fingerprint(held_out),
        }
        self.progress = Progress()
        self.step = 0

    def resume(self) -> bool:
        """Go on from the directory's state; False if there is none."""
        state = read_state(self.directory, self.parameters)
        if state is None:
            return False
        if state.run != self._said:
            names = sorted(
                name
                for name in self._said.keys() | state.run.keys()
                if self._said.get(name) != state.run.get(name)
            )
            changed = "; ".join(
                f"{name} was {state.run.get(name)}, is {self._said.get(name)}" for name in names
            )
            raise ValueError(f"{self.directory}: is the state of another run: {changed}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parts = state.tensors[name]
                parameter.copy_(parts["parameter"])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": parts["exp_avg"],
                    "exp_avg_sq": parts["exp_avg_sq"],
                }
        self.progress, self.step = Progress.from_json(state.progress), state.step
        return True

    def run(
        self,
        on_step: Callable[[Step], None] = lambda step: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the last step, or until ``is_stopped`` says so after a step; whether it is done.

        ValueError if the loss is no number any more; the state before is kept.
        """
        if self.progress.held_out_before is None and self._held_out:
            self.progress.held_out_before = self.measure(self._held_out)
        while self.step < self.recipe.steps:
            step = self._do_step()
            self.progress.steps.append(step)
            self.step = step.number
            on_step(step)
            is_last = is_stopped() or self.step == self.recipe.steps
            if is_last or self.step % self.recipe.save_every == 0:
                self._write()
            if is_last and self.step < self.recipe.steps:
                return False
        if self.progress.held_out_after is None and self._held_out:
            self.progress.held_out_after = self.measure(self._held_out)
            self._write()
        return True

    @torch.no_grad()
    def measure(self, examples: Iterable[Example]) -> float:
        """Mean loss of the targets, nats."""
        self.model.eval()
        total, count = 0.0, 0
        for one in examples:
            loss, targets = self._loss([one])
            total, count = total + float(loss), count + targets
        return total / count

    def _do_step(self) -> Step:
        recipe, began = self.recipe, perf_counter()
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        lr = recipe.lr_of(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        examples = [self._train[at] for at in self._order.of_step(self.step)]
        count = sum(one.num_targets for one in examples)
        total = 0.0
        self.model.train()
        for at in range(0, len(examples), recipe.batch):
            loss, _ = self._loss(examples[at : at + recipe.batch])
            (loss / count).backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ValueError(
                f"the loss of step {self.step + 1} is {total}: a lower learning rate may help; "
                f"{self.directory} has the state before"
            )
        for parameter in self.parameters.values():
            if parameter.grad is None:  # AdamW would count this one's steps apart
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(one.ids) for one in examples)
        return Step(self.step + 1, total / count, lr, tokens, perf_counter() - began)

    def _write(self) -> None:
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self._optimizer.state[parameter]
            tensors[name] = {
                "parameter": parameter,
                "exp_avg": state["exp_avg"],
                "exp_avg_sq": state["exp_avg_sq"],
            }
        self.directory.mkdir(parents=True, exist_ok=True)
        write_state(self.directory, State(self._said, self.progress.to_json(), self.step, tensors))


def fingerprint(examples: Iterable[Example]) -> str:
    """Of all tokens and targets."""
    digest = hashlib.sha256()
    for one in examples:
        digest.update(repr((one.ids, one.is_target)).encode())
    return digest.hexdigest()
