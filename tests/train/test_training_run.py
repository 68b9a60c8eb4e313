"""The training loop: it learns, it counts every target alike, and a run that went on after an
interruption has the bits of one that was not interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")
import ktk.train
from ktk.errors import CheckpointError
from ktk.integration.transformers import use_ktk
from ktk.train.data import Example
from ktk.train.loss import BatchLoss
from ktk.train.run import Recipe, Run, Step
from ktk.train.state import FILE
from ktk.train.tuning import recompute
from make.transformers_cases import make_model

RECIPE = Recipe(steps=6, lr=0.02, batch=2, accumulate=2, warmup=2, save_every=2)


def data(count: int = 12) -> list[Example]:
    """Sequences of different lengths that count up; the first tokens are no targets."""
    found = []
    for at in range(count):
        length = 5 + at % 4
        ids = tuple(3 + (7 * at + step) % 50 for step in range(length))
        found.append(Example(ids, tuple(place > 1 for place in range(length))))
    return found


def adapted(dropout: float = 0.0) -> Any:
    model = make_model("qwen3_moe")
    use_ktk(model, "int8")
    model.requires_grad_(False)
    torch.manual_seed(0)
    ktk.train.add_expert_lora(model, r=4, alpha=8, dropout=dropout)
    return model


@pytest.fixture(scope="module")
def base() -> Any:
    return adapted()


def run(folder: Path, recipe: Recipe = RECIPE, *, dropout: float = 0.2, **said: Any) -> Run:
    return Run(adapted(dropout), data(), data(3), recipe, folder, said)


def values(one: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in one.parameters.items()}


def test_a_run_that_went_on_has_the_bits_of_one_that_did_not_stop(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert whole.run()
    first = run(tmp_path / "parts")
    done: list[Step] = []
    assert not first.run(done.append, lambda: len(done) == 3)
    second = run(tmp_path / "parts")
    assert second.resume() and second.step == 3
    assert second.run()
    for name, expected in values(whole).items():
        assert torch.equal(expected, values(second)[name]), name
    losses = [step.loss for step in whole.progress.steps]
    assert losses == [step.loss for step in second.progress.steps]
    assert whole.progress.held_out_after == second.progress.held_out_after


def test_recomputing_changes_no_bit(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=2)
    kept, again = run(tmp_path / "kept", recipe), run(tmp_path / "again", recipe)
    recompute(again.model)
    assert kept.run() and again.run()
    for name, expected in values(kept).items():
        assert torch.equal(expected, values(again)[name]), name


def test_the_loss_falls(tmp_path: Path) -> None:
    one = run(tmp_path, dataclasses.replace(RECIPE, steps=12))
    assert one.run()
    losses = [step.loss for step in one.progress.steps]
    assert losses[-1] < 0.8 * losses[0]
    before, after = one.progress.held_out_before, one.progress.held_out_after
    assert before is not None and after is not None and after < before


def test_a_run_does_not_go_on_with_other_data_or_another_recipe(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=1, warmup=0)
    assert run(tmp_path, recipe, lora=4).run()
    with pytest.raises(ValueError, match="lora was 4, is 8"):
        run(tmp_path, recipe, lora=8).resume()
    with pytest.raises(ValueError, match="is the state of another run: recipe was"):
        run(tmp_path, RECIPE, lora=4).resume()
    other = Run(adapted(0.2), data(5), data(3), recipe, tmp_path, {"lora": 4})
    with pytest.raises(ValueError, match="another run: data was"):
        other.resume()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=1, warmup=0)
    assert run(tmp_path, recipe).run()
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        run(tmp_path, recipe).resume()
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(CheckpointError, match="version 9"):
        run(tmp_path, recipe).resume()


def test_logits_in_parts_give_the_loss_and_gradients_of_all_at_once(base: Any) -> None:
    loss = BatchLoss(base)
    assert loss.is_in_parts
    parameters = [p for p in base.parameters() if p.requires_grad]

    def taken(is_in_parts: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss.is_in_parts = is_in_parts
        total, count = loss(data(3))
        assert (
            count == sum(one.num_targets for one in data(3)) == sum(len(o.ids) - 2 for o in data(3))
        )
        return total.detach(), torch.autograd.grad(total, parameters)

    (expected, wanted), (total, found) = taken(False), taken(True)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    assert max(float(one.abs().max()) for one in wanted) > 0
    for want, one in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-6)


def test_a_padded_batch_has_the_loss_of_its_examples(base: Any) -> None:
    loss = BatchLoss(base)
    with torch.no_grad():
        together, _ = loss(data(4))
        alone = sum(float(loss([one])[0]) for one in data(4))
    assert float(together) == pytest.approx(alone, rel=2e-3)  # int8 enlarges what masks change


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    recipe = Recipe(steps=10, lr=1.0, warmup=2)
    rates = [recipe.lr_of(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[2:])) and 0 < rates[-1] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"lr": float("nan")}, "lr=nan: must be above 0"),
        ({"warmup": 9}, r"warmup=9: must be in 0\.\.steps=6"),
        ({"seed": -1}, r"seed=-1: must be in 0\.\.4294967295"),
    ],
)
def test_a_recipe_says_what_it_does_not_take(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)
