"""KL divergence and top-1 agreement of every format on SmolLM2 cut into experts; searched scales against absmax.

python bench/accuracy.py DEMO_DIR/smollm2-moe   (`make demo` writes it to demo/smollm2-moe)
Weights and activations both quantised; everything but the experts in fp32; 8 x 256 tokens as in the demo.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktk import pack
from ktk.demo import evaluate, text
from ktk.formats import FORMATS, get_format
from ktk.integration.transformers import use_ktk
from ktk.reference.pack import absmax_ladder


def load(path: str) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def main(path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    token_ids = tokenizer(text.stdlib_text(), add_special_tokens=False)["input_ids"]
    windows = text.windows(token_ids, 8, 256)
    model = load(path)
    reference = [evaluate.window_logits(model, w) for w in windows]
    print("| format | activation group | scales | KL | top-1 |\n|---|---|---|---|---|")
    cases = [(f.name, g, None) for f in FORMATS.values() if f.is_integer for g in f.group_sizes]
    cases += [("int8", 0, 64), ("int8", 0, 128), ("int4", 32, 32)]
    for name, group, activation_group in cases:
        for scales in ("searched", "absmax"):
            if scales == "absmax" and activation_group is not None:
                continue
            model = load(path)
            ladder = absmax_ladder(get_format(name))
            patches = (
                mock.patch.object(pack, "search_ladder", lambda *a, ladder=ladder: ladder),
                mock.patch.object(pack, "REFITS", 0),
            )
            if scales == "absmax":
                with patches[0], patches[1]:
                    use_ktk(model, name, group, activation_group)
            else:
                use_ktk(model, name, group, activation_group)
            d = evaluate.distance(model, windows, reference)
            shown = activation_group or get_format(name).default_activation_group
            label = f"{name}, " + (f"group {group}" if group else "per channel")
            print(f"| {label} | {shown} | {scales} | {d.kl:.4f} | {d.top1:.1%} |", flush=True)


main(sys.argv[1])
