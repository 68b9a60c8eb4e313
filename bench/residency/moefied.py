"""SmolLM2 in many experts with a router that means something, for traces of a real text's routing.

    python bench/residency/moefied.py demo/smollm2-moe OUT --experts 32
    ktk residency record OUT --top-k 8 -o smollm2.trace

demo/smollm2-moe is what `ktk demo` writes: dense FFNs in six parts. Here each FFN's channels are
clustered anew, by which of them are active together on a text, into equal experts, and a router is
fitted (ridge regression) that foretells from the FFN's input how much each expert will give. The
idea: Z. Zhang, Y. Lin, Z. Liu, P. Li, M. Sun, J. Zhou, "MoEfication: Transformer feed-forward
layers are mixtures of experts", 2022. Without training the model would fall apart if it ran the
first 8 alone, so that every token still runs all experts, with nearly equal weights (the logits are
small, down_proj is stored times their number): the text's states are those of SmolLM2, and the
trace keeps the first 8. ``--balance 1`` has the router foretell how much more an expert gives than
usual, as one trained for equal loads does; 0 how much it gives; between them both.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktk.checkpoint import Checkpoint
from ktk.integration.transformers.calibration import run_layers
from ktk.quantise.feedback import LayerInputs
from ktk.quantise.texts import stdlib_text, windows

WINDOW = 256
LOGITS = 0.01  # their spread: weights differ by a percent or two


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def clusters(activity: np.ndarray, count: int, rounds: int = 10) -> np.ndarray:
    """int (count, channels / count): k-means over channels (rows), all clusters of one size."""
    channels, size = len(activity), len(activity) // count
    rows = activity / np.maximum(np.linalg.norm(activity, axis=1, keepdims=True), 1e-12)
    rng = np.random.default_rng(0)
    centres = rows[rng.choice(channels, count, replace=False)]
    owner = np.zeros(channels, np.int64)
    for _ in range(rounds):
        likeness = rows @ centres.T  # (channels, count)
        order = np.argsort(-likeness, axis=None, kind="stable")
        owner[:] = -1
        room = [size] * count
        for flat in order.tolist():
            channel, cluster = divmod(flat, count)
            if owner[channel] < 0 and room[cluster]:
                owner[channel] = cluster
                room[cluster] -= 1
        centres = np.stack([rows[owner == c].mean(axis=0) for c in range(count)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return np.stack([np.flatnonzero(owner == c) for c in range(count)])


def router(x: np.ndarray, given: np.ndarray, balance: float) -> np.ndarray:
    """(experts, hidden_size). x : (tokens, hidden_size); given : (tokens, experts)."""
    mean, deviation = given.mean(axis=0), given.std(axis=0) + 1e-12
    target = (1 - balance) * given / given.std() + balance * (given - mean) / deviation
    gram = x.T @ x
    ridge = 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=np.float32)
    weight = np.linalg.solve(gram + ridge, x.T @ target).T
    return LOGITS * weight / (weight @ x.T).std()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--balance", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=2048)
    a = parser.parse_args()
    config = json.loads((a.source / "config.json").read_text())
    parts = config["num_local_experts"]
    tokenizer = AutoTokenizer.from_pretrained(a.source)
    ids = tokenizer(stdlib_text(), add_special_tokens=False, verbose=False)["input_ids"]
    # The second half of the text: traces are recorded from its beginning.
    text = torch.tensor(windows(ids[len(ids) // 2 :], a.tokens // WINDOW, WINDOW))
    model = AutoModelForCausalLM.from_pretrained(a.source, dtype=torch.float32).eval()
    made: dict[str, torch.Tensor] = {}

    with Checkpoint.open(a.source) as stored:

        def read(name: str) -> np.ndarray:
            bits = stored.read(name)
            return (bits.astype(np.uint32) << 16).view(np.float32)

        def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
            name = f"model.layers.{layer}.block_sparse_moe"
            w1, w3 = (
                np.concatenate([read(f"{name}.experts.{e}.{w}.weight") for e in range(parts)])
                for w in ("w1", "w3")
            )
            down = [read(f"{name}.experts.{e}.w2.weight") for e in range(parts)]
            w2 = np.concatenate(down, axis=1) / parts  # (H, I)
            x = inputs.hidden
            h = silu(x @ w1.T) * (x @ w3.T)  # (tokens, I)
            strength = np.abs(h) * np.linalg.norm(w2, axis=0)
            own = clusters(strength.T[:, ::4], a.experts)
            given = np.stack([strength[:, rows].sum(axis=1) for rows in own], axis=1)
            made[f"{name}.gate.weight"] = tensor(router(x, given, a.balance))
            for e, rows in enumerate(own):
                made[f"{name}.experts.{e}.w1.weight"] = tensor(w1[rows])
                made[f"{name}.experts.{e}.w3.weight"] = tensor(w3[rows])
                made[f"{name}.experts.{e}.w2.weight"] = tensor(w2[:, rows] * a.experts)
            print(f"layer {layer}", flush=True)
            return np.asarray(h @ w2.T)

        run_layers(model, text, on_layer)
        for name in stored.tensors:
            if "block_sparse_moe" not in name:
                made[name] = tensor(read(name))
    a.output.mkdir(parents=True)
    save_file(made, str(a.output / "model.safetensors"), metadata={"format": "pt"})
    for file in a.source.iterdir():
        if file.suffix in (".json", ".jinja") and "safetensors" not in file.name:
            shutil.copy(file, a.output)
    size = config["intermediate_size"] * parts // a.experts
    config |= {"num_local_experts": a.experts, "num_experts_per_tok": a.experts}
    config["intermediate_size"] = size
    (a.output / "config.json").write_text(json.dumps(config, indent=2))


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.bfloat16)


if __name__ == "__main__":
    main()
