"""The accuracy table on several texts, a line of JSON for each row as it is done; ``--dither``
makes a model without a grid.

    python bench/accuracy.py demo/smollm2-moe --dither demo/dithered
    python bench/accuracy.py demo/dithered --text docstrings.txt --text bible.txt --calibrate
    mixed.txt [--ggml FOLDER] [--imatrix FILE] [-f FORMAT ...] --output FOLDER

Each text's rows are added to FOLDER/its name.jsonl. Every variant is quantised once.

SmolLM2's weights come from a Q4_1 file, so formats with a minimum per 32 weights (Q4_1, Q5_1, Q4_K,
Q5_K) find that grid again and look better than they are. --dither adds to each weight a uniform
random number of up to half its step, what the rounding to Q4_1 took on average: a model whose
weights are as spread out as the original's, to be compared with itself. A format that ends in ! is
taken calibrated only, in = plain only. --imatrix FILE, of ktk imatrix, is what llama.cpp's
calibrated types are rounded by; without one, the inputs of --calibrate.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging

from ktk.convert.importance import ImportanceFile
from ktk.evaluate.run import evaluate_texts
from ktk.evaluate.variants import Variant, all_variants
from ktk.quantise.ggml_library import GgmlLibrary
from ktk.quantise.texts import windows

WINDOW = 256
GRID = 32  # weights of a Q4_1 block


def dither(source: Path, output: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shutil.copytree(source, output)
    for path in sorted(output.glob("*.safetensors")):
        tensors = load_file(path)
        for name, w in tensors.items():
            if ".experts." in name:
                groups = w.float().numpy().reshape(-1, GRID)
                step = (groups.max(axis=1) - groups.min(axis=1))[:, None] / 15
                noise = (rng.random(groups.shape, np.float32) - 0.5) * step
                tensors[name] = torch.from_numpy(groups + noise).reshape(w.shape).to(w.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--calibrate-tokens", type=int, default=8192)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--activation-group", type=int)
    parser.add_argument("--rotation", type=int)
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("-f", "--format", action="append", default=[])
    parser.add_argument("--dither", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.dither:
        dither(arguments.model, arguments.dither, arguments.seed)
        return
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def windows_of(path: Path, count: int) -> list[list[int]]:
        text = path.read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return windows(ids, count // WINDOW, WINDOW)

    variants = []
    for text in arguments.format:
        plain = Variant.parse(text.rstrip("!="))
        both = (plain, plain.calibrated())
        variants += both[1:] if text.endswith("!") else both[:1] if text.endswith("=") else both
    if not arguments.format:
        plains = all_variants(arguments.ggml is not None)
        variants = [v for plain in plains for v in (plain, plain.calibrated())]
    calibration = None
    if arguments.calibrate:
        calibration = torch.tensor(windows_of(arguments.calibrate, arguments.calibrate_tokens))
    ggml = GgmlLibrary(arguments.ggml) if arguments.ggml else None
    can_calibrate = calibration is not None or arguments.imatrix is not None
    arguments.output.mkdir(parents=True, exist_ok=True)
    for rows in evaluate_texts(
        arguments.model,
        [windows_of(path, arguments.tokens) for path in arguments.text],
        [v for v in variants if v and (can_calibrate or not v.is_calibrated)],
        ggml=ggml,
        calibration_ids=calibration,
        importance=ImportanceFile(arguments.imatrix) if arguments.imatrix else None,
        activation_group=arguments.activation_group,
        rotation=arguments.rotation,
    ):
        for path, row in zip(arguments.text, rows, strict=True):
            with open(arguments.output / f"{path.stem}.jsonl", "a") as file:
                print(json.dumps(row.to_json()), file=file)


main()
