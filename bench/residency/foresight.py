"""How much of what a layer's router will choose is known before: from the layer before, or from the
residual just before the layer attends.

    python bench/residency/foresight.py DIR [--layers 12] [--tokens 160]

DIR is that of ``whole_model.py``. Tokens drawn at random go through the model at once, in float32,
its experts by ktk. Each token's misses are counted with the experts used last in memory, one list
over all layers; the second half of the tokens counts. Of the 8 that a guess names, those that are
not in memory are read ahead, the likeliest first, so many a layer at most: printed are how many a
token, and how many of them are used, in the layers that have one before.

    input   the next layer's router on the input of this layer's experts
    residual    a layer's own router on its norm of the residual as the layer begins
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from mapped import mapped
from safetensors import safe_open
from streamed import SPEC, TOP_K
from whole_model import VOCAB, write_model

HEADS, KV_HEADS, HEAD_DIM, THETA = 32, 4, 128, 10000.0
EPSILON, AHEAD, SHARES = 1e-6, (1, 2, 3, 4), (25, 50)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotated by position. x : (tokens, heads, HEAD_DIM)."""
    frequencies = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(len(x)), frequencies).repeat(1, 2)[:, None]
    half = HEAD_DIM // 2
    return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()


def attention(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, hidden_size), causal. x likewise, normed."""
    heads = {}
    for name, many in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        rows = (x @ weights[f"{name}_proj"].T).view(len(x), many, HEAD_DIM)
        if name != "v":
            rows = turned(rms_norm(rows, weights[f"{name}_norm"]))
        heads[name] = rows.repeat_interleave(HEADS // many, 1).transpose(0, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    y = attend(heads["q"], heads["k"], heads["v"], is_causal=True)
    return y.transpose(0, 1).reshape(len(x), -1) @ weights["o_proj"].T


def guesses(
    directory: Path, num_layers: int, tokens: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The experts chosen, and each kind's guess, best first: int (tokens, layers, TOP_K); -1 where
    there is none.
    """
    with safe_open(directory / "model.safetensors", "pt") as file:
        x = file.get_tensor("model.embed_tokens.weight")
        x = x[np.random.default_rng(25).integers(0, VOCAB, tokens)].float()
        chosen = np.full((tokens, num_layers, TOP_K), -1)
        named = {"input": chosen.copy(), "residual": chosen.copy()}
        before: torch.Tensor | None = None
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}."
            own = {
                name.removeprefix(prefix).removeprefix("self_attn.").removesuffix(".weight"): (
                    file.get_tensor(name).float()
                )
                for name in file.keys()  # noqa: SIM118 (no mapping)
                if name.startswith(prefix)
            }
            router, norm = own["mlp.gate"], own["post_attention_layernorm"]
            named["residual"][:, layer] = (rms_norm(x, norm) @ router.T).topk(TOP_K).indices
            if before is not None:
                named["input"][:, layer] = (before @ router.T).topk(TOP_K).indices
            x = x + attention(rms_norm(x, own["input_layernorm"]), own)
            before = rms_norm(x, norm)
            weights, ids = (before @ router.T).softmax(-1).topk(TOP_K)
            weights = weights / weights.sum(-1, keepdim=True)
            chosen[:, layer] = ids
            y = mapped(directory, layer)(before.numpy(), ids.numpy(), weights.numpy())
            x = x + torch.from_numpy(np.asarray(y))
    return chosen, named


def missing(chosen: np.ndarray, capacity: int) -> tuple[float, list[list[set[int]]]]:
    """Misses a token, and who of a layer is in memory before its call: [token][layer]."""
    used: OrderedDict[tuple[int, int], None] = OrderedDict()
    here, misses = [], 0
    for token, of_layers in enumerate(chosen):
        here.append([])
        for layer, experts in enumerate(of_layers.tolist()):
            here[-1].append({expert for at, expert in used if at == layer})
            for expert in experts:
                misses += token >= len(chosen) // 2 and (layer, expert) not in used
                used[layer, expert] = None
                used.move_to_end((layer, expert))
            while len(used) > capacity:
                used.popitem(last=False)
    return misses / (len(chosen) - len(chosen) // 2), here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=160)
    a = parser.parse_args()
    if not (a.directory / "config.json").exists():
        a.directory.mkdir(parents=True, exist_ok=True)
        write_model(a.directory, a.layers)
    chosen, named = guesses(a.directory, a.layers, a.tokens)
    print("| in memory | misses a token | guess |" + "".join(f" {n} a layer |" for n in AHEAD))
    print("|--:|--:|---|" + "--:|" * len(AHEAD))
    half = a.tokens // 2
    for share in SHARES:
        misses, here = missing(chosen, share * a.layers * SPEC.num_experts // 100)
        for kind, guess in named.items():
            cells = []
            for most in AHEAD:
                read = used = 0
                for token in range(half, a.tokens):
                    for layer in range(1, a.layers):
                        row = guess[token, layer].tolist()
                        ahead = [e for e in row if e not in here[token][layer]][:most]
                        read += len(ahead)
                        used += len(set(ahead).intersection(chosen[token, layer].tolist()))
                per = a.tokens - half
                cells.append(f"{used / per:.1f} of {read / per:.1f} ({used / max(read, 1):.0%})")
            print(f"| {share} % | {misses:.1f} | {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
