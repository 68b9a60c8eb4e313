"""Adapters of tiny models, and what they compute; for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ktk.integration.transformers import use_ktk
from ktk.train.tuning import adapted, write_adapter
from make.transformers_cases import make_model, prompt

RANK = 3


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(prompt(), use_cache=False).logits
    return found


def make_adapter(folder: Path, family: str, parts: tuple[str, ...]) -> tuple[Path, torch.Tensor]:
    """The directory of an adapter without zeros, its base's beside it, and what the packed model
    computes with it.
    """
    base = folder / "base"
    make_model(family).save_pretrained(base)
    model = make_model(family)
    model.config._name_or_path = model.name_or_path = str(base)
    use_ktk(model, "fp32")
    tuned = adapted(model, parts, RANK, 2.0 * RANK, 0.0, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    write_adapter(tuned, folder / "adapter")
    return folder / "adapter", logits(tuned.eval())
