"""``ktk convert --recipe``: a recipe read from a file, or chosen for a budget of bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ktk.convert.choose import Choice, choose
from ktk.convert.recipe import Recipe
from ktk.paths import user_path

AUTO = "auto"


@dataclass(frozen=True)
class Asked:
    """The options of a recipe as they were given. source : a file's path, or "auto"."""

    source: str | None
    bits: float | None
    among: list[str] | None
    save: Path | None

    def check(self, is_calibrated: bool, resume: bool) -> None:
        """ValueError for options that do not go together."""
        if self.source != AUTO:
            others = {"--bits": self.bits, "--among": self.among, "--save-recipe": self.save}
            for name, value in others.items():
                if value is not None:
                    raise ValueError(f"{name}: goes with --recipe auto alone")
            return
        if self.bits is None or not 1 <= self.bits <= 32:
            raise ValueError(f"--recipe auto: needs --bits, 1 to 32; given {self.bits}")
        if not is_calibrated:
            raise ValueError("--recipe auto: measures on a text, name it with --calibrate")
        if resume:
            raise ValueError(
                "--recipe auto: does not go with --resume; take the file of --save-recipe"
            )

    def recipe(
        self,
        input_path: Path,
        output: Path,
        calibration: Any,
        threads: int | None,
        progress: Callable[[int, int], None],
    ) -> tuple[Recipe | None, Choice | None]:
        """What to convert by, and how it was chosen, if it was. ValueError for a bad file."""
        if self.source is None:
            return None, None
        if self.source != AUTO:
            return Recipe.read(user_path(self.source)), None
        assert self.bits is not None
        choice = choose(
            input_path,
            self.bits,
            calibration,
            to_gguf=output.name.lower().endswith(".gguf"),
            among=self.among,
            threads=threads,
            progress=progress,
        )
        if self.save is not None:
            self.save.write_text(
                f"# {choice.bits_per_weight:.3f} bits per weight, loss {choice.loss:.3g}\n"
                + str(choice.recipe),
                encoding="utf-8",
            )
        return choice.recipe, choice


def print_choice(choice: Choice) -> None:
    """A table of layers by projections."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("layer", justify="right")
    names = list(dict.fromkeys(name for row in choice.rows for name in row.projections))
    for name in names:
        table.add_column(name)
    table.add_column("loss", justify="right")
    for layer in dict.fromkeys(row.layer for row in choice.rows):
        rows = [row for row in choice.rows if row.layer == layer]
        coding = {name: str(row.coding) for row in rows for name in row.projections}
        loss = sum(row.loss for row in rows)
        table.add_row(str(layer), *(coding.get(name, "-") for name in names), f"{loss:.2e}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{choice.bits_per_weight:.3f} bits per weight. Loss: the change of the layer's output, "
        "squared, as a share of what it is added to."
    )
