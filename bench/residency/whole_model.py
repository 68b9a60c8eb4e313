"""A whole model whose experts come from the disk, beside the same one in memory.

    python bench/residency/whole_model.py DIR [--layers 12] [--shares 100 75 50 25] [--rounds 3]

DIR gets a packed directory of Qwen3-30B-A3B's shape, int4, with that number of layers and random
weights, unless it is there. In each round, in turn: the model in memory as a whole, each share of
it, and the disk's rate for reads of one expert's size at random places, four at a time, past the
page cache. Tokens are drawn at random, so that experts are used evenly and the share in memory is
about the hit rate: text that has a subject does better. Each model runs in a process of its own;
before it is timed, tokens fill its slots. Printed: median ms a token, the hit rate, what was read
for a token, that over the disk's rate, and the most memory that no file backs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from streamed import SPEC, TOP_K, disk_rate, write

from ktk.checkpoint.packed import coding_of
from ktk.experts.layout import LAYOUT_VERSION

VOCAB = 32000
PROMPT, TOKENS = 128, 32  # read at once; timed one by one


def write_model(directory: Path, layers: int) -> None:
    """The experts of ``streamed.write``, and random other weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    write(directory, layers)
    config = Qwen3MoeConfig(
        hidden_size=SPEC.hidden_size,
        moe_intermediate_size=SPEC.intermediate_size,
        num_experts=SPEC.num_experts,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        norm_topk_prob=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    g = torch.Generator().manual_seed(0)
    rest = {
        name: torch.randn(p.shape, generator=g, dtype=torch.bfloat16) * 0.02
        if p.ndim > 1
        else torch.ones(p.shape, dtype=torch.bfloat16)
        for name, p in model.named_parameters()
        if ".experts." not in name
    }
    for name, weight in rest.items():
        if name.endswith("mlp.gate.weight"):
            weight *= 10
    save_file(rest, directory / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "ktk", "layout_version": LAYOUT_VERSION, "layers": list(range(layers))}
    fields = {**config.to_dict(), "quantization_config": {**said, **coding_of(SPEC)}}
    fields["architectures"] = ["Qwen3MoeForCausalLM"]
    (directory / "config.json").write_text(json.dumps(fields))


def measure(directory: Path, share: int) -> dict[str, Any]:
    """Seconds of each token, and what it took; share : per cent, 0: all are loaded."""
    import torch

    from ktk.integration.transformers import KtkConfig, load_model
    from ktk.integration.transformers.decoder_layers import native_calls
    from ktk.integration.transformers.streaming import expert_slots

    most = Peak()
    options = {"expert_memory": f"{share}%"} if share else {}
    model = load_model(directory, quantization_config=KtkConfig(linear="file"), **options).eval()
    slots = expert_slots(model)
    rng = np.random.default_rng(share)
    ids = torch.from_numpy(rng.integers(0, VOCAB, (1, PROMPT + 3 * TOKENS)))
    seconds, before = [], None
    with torch.inference_mode():
        start = time.perf_counter()
        cache = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
        prompt = time.perf_counter() - start
        for at in range(PROMPT, ids.shape[1]):
            if at == ids.shape[1] - TOKENS:
                before = slots.counters() if slots else None
                seconds.clear()
            start = time.perf_counter()
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - start)
    found: dict[str, Any] = {"seconds": seconds, "prompt": prompt, "native": native_calls(model)}
    if slots and before:
        after = slots.counters()
        uses = after.uses - before.uses
        found["hit_rate"] = (after.hits - before.hits) / uses
        found["read"] = (after.read_bytes - before.read_bytes) / TOKENS
        found["limit"] = slots.capacity * slots.slot_bytes
    return {**found, "memory": most.stop()}


class Peak:
    """The most memory of this process that no file backs, looked at twenty times a second."""

    def __init__(self) -> None:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, int(status.split("RssAnon:")[1].split()[0]) * 1024)

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def child(directory: Path, share: int) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, str(directory), "--measure", str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shares", type=int, nargs="+", default=[100, 75, 50, 25])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.directory, given.measure)))
        return
    if not (given.directory / "config.json").exists():
        given.directory.mkdir(parents=True, exist_ok=True)
        write_model(given.directory, given.layers)
    found: dict[int, list[dict[str, Any]]] = {share: [] for share in (0, *given.shares)}
    rates = []
    for _ in range(given.rounds):
        for share, runs in found.items():
            rates.append(disk_rate(given.directory, given.layers, 512))
            runs.append(child(given.directory, share))
    rate = statistics.median(rates)
    print(f"disk: {rate / 1e9:.2f} GB/s ({min(rates) / 1e9:.2f} - {max(rates) / 1e9:.2f})")
    print("| in memory | ms a token | hits | MB read | ms of the disk | prompt, s | GB of memory |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for share, runs in found.items():
        token = statistics.median(s for run in runs for s in run["seconds"]) * 1e3
        prompt = statistics.median(run["prompt"] for run in runs)
        memory = max(run["memory"] for run in runs) / 1e9
        cells = [f"{token:.1f}", "", "", "", f"{prompt:.2f}", f"{memory:.2f}"]
        if share:
            read = statistics.mean(run["read"] for run in runs)
            hits = statistics.mean(run["hit_rate"] for run in runs)
            cells[1:4] = f"{hits:.1%}", f"{read / 1e6:.0f}", f"{read / rate * 1e3:.1f}"
            cells[5] += f" (limit {runs[0]['limit'] / 1e9:.2f})"
        print(f"| {f'{share} %' if share else 'all, loaded'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
