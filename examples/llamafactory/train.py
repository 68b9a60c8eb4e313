"""LLaMA-Factory over ktk's packed experts: python train.py sft.yaml, in place of llamafactory-cli
train sft.yaml.

Two things are ktk's. Its import tells transformers how to load a packed directory. peft is told
that experts may have adapters, where LLaMA-Factory makes its LoraConfig, so lora_target may name
experts; without that attention alone can be trained, and no second thing is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from llamafactory.model import adapter
from llamafactory.train.tuner import run_exp
from peft import get_peft_model

from ktk.train.peft_lora import with_experts


def with_experts_too(model: Any, config: Any, *arguments: Any, **named: Any) -> Any:
    """peft's get_peft_model, where experts may be among the targets."""
    return get_peft_model(model, with_experts(config), *arguments, **named)


if __name__ == "__main__":
    adapter.get_peft_model = with_experts_too
    run_exp(yaml.safe_load(Path(sys.argv[1]).read_text()))
