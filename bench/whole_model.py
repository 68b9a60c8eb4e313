"""A whole model, ktk beside llama.cpp on the same GGUF file: prefill and decode, in turns.

    python bench/whole_model.py [--layers 12] [--linear file none] [--rounds 3] [--json]

The file is of Qwen3-30B-A3B's shape but for the number of layers, with random weights: experts
Q4_0, the rest Q8_0. ktk runs the experts as they lie and the linear layers each way that --linear
names: as they lie (file), as bf16 (none), packed (int8, int4);
llama.cpp (llama-cpp-python, if it is installed) runs all as it lies. Each engine runs in a process
of its own, on as many threads as there are cores. ktk decodes twice: each layer by one native call,
as `ktk run` does, and by torch, layer by layer, with the time inside the experts' and the linear
layers' calls. Loading is timed with the file in the page cache; memory is what no file backs, the
most of it while loading and what stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ktk.bench.blocks import random_matrix
from ktk.machine import cpu

HIDDEN, WIDTH, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD, VOCAB = 2048, 768, 128, 8, 32, 4, 128, 151936
EXPERT_TYPE, REST_TYPE = "Q4_0", "Q8_0"
PROMPT, DECODE = 512, 48  # tokens


def write_model(path: Path, layers: int) -> None:
    """The random model; a layer's tensors are the same in every layer."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in {
        "block_count": layers,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "feed_forward_length": 6144,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "expert_count": EXPERTS,
        "expert_used_count": TOP_K,
        "expert_feed_forward_length": WIDTH,
    }.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.rope.freq_base", 1e6)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    letters = [chr(33 + i) for i in range(94)]
    tokens = [*letters, "ab", *(f"<{i}>" for i in range(VOCAB - 95))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCAB - 1)

    def blocks(kind: str, out_features: int, in_features: int, count: int = 0) -> np.ndarray:
        data = random_matrix(kind, 1, out_features, in_features, out_features + in_features).data
        return np.broadcast_to(data, (count, *data.shape[1:])) if count else data[0]

    def add(name: str, data: np.ndarray, kind: str) -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    ones = {n: np.ones(n, np.float32) for n in (HIDDEN, HEAD)}
    add("token_embd.weight", blocks(REST_TYPE, VOCAB, HIDDEN), REST_TYPE)
    add("output.weight", blocks(REST_TYPE, VOCAB, HIDDEN), REST_TYPE)
    writer.add_tensor("output_norm.weight", ones[HIDDEN])
    rest = {
        "attn_q": (HEADS * HEAD, HIDDEN),
        "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD),
    }
    made = {name: blocks(REST_TYPE, *shape) for name, shape in rest.items()}
    experts = {
        name: blocks(EXPERT_TYPE, *shape, EXPERTS)
        for name, shape in (
            ("ffn_gate_exps", (WIDTH, HIDDEN)),
            ("ffn_up_exps", (WIDTH, HIDDEN)),
            ("ffn_down_exps", (HIDDEN, WIDTH)),
        )
    }
    router = np.random.default_rng(0).standard_normal((EXPERTS, HIDDEN), np.float32) * 0.1
    for layer in range(layers):
        for name, data in made.items():
            add(f"blk.{layer}.{name}.weight", data, REST_TYPE)
        for name, data in experts.items():
            add(f"blk.{layer}.{name}.weight", data, EXPERT_TYPE)
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
        for name, size in (
            ("attn_norm", HIDDEN),
            ("ffn_norm", HIDDEN),
            ("attn_q_norm", HEAD),
            ("attn_k_norm", HEAD),
        ):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones[size])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompt() -> list[int]:
    return np.random.default_rng(1).integers(100, VOCAB - 1, PROMPT).tolist()


def anonymous_bytes() -> int:
    """Of this process, what no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def run_ktk(path: Path, linear: str) -> dict[str, float]:
    """Milliseconds: load, prefill, decode of a token (median); torch_decode,
    of it the experts and the linear layers. GB: anonymous memory.
    """
    import torch
    from transformers import DynamicCache

    from ktk.integration.transformers.attention import use_attention
    from ktk.integration.transformers.decoder_layers import fuse_decoder_layers
    from ktk.integration.transformers.experts import find_experts
    from ktk.integration.transformers.gguf import load_gguf_model
    from ktk.integration.transformers.linear import KtkLinear
    from ktk.integration.transformers.names import CACHE

    torch.set_num_threads(cpu.num_physical_cores())
    most, over, before = 0, threading.Event(), anonymous_bytes()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    model = load_gguf_model(path, linear=linear)
    load, stays = time.perf_counter() - begin, anonymous_bytes()
    over.set()
    watcher.join()
    use_attention(model)
    inside = {"experts": 0.0, "linear": 0.0}
    clocked = []

    def clock(module: Any, what: str) -> None:
        forward = module.forward

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            out = forward(*arguments, **named)
            inside[what] += time.perf_counter() - begin
            return out

        module.forward = timed
        clocked.append(module)

    for _, module in find_experts(model):
        clock(module, "experts")
    for module in model.modules():
        if isinstance(module, KtkLinear | torch.nn.Linear):
            clock(module, "linear")
    ids = torch.tensor([prompt()])
    with torch.inference_mode():
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            begin = time.perf_counter()
            out = model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            prefill = time.perf_counter() - begin

        def decode() -> float:
            nonlocal out
            cache.crop(PROMPT - cache.get_seq_length())
            steps = []
            for _ in range(DECODE):
                begin = time.perf_counter()
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, **{CACHE: cache}, use_cache=True)
                steps.append(time.perf_counter() - begin)
            return statistics.median(steps)

        inside.update(experts=0.0, linear=0.0)
        torch_decode = decode()
        for module in clocked:
            del module.forward
        fuse_decoder_layers(model)
        found = {"load": load, "prefill": prefill, "decode": decode(), "torch_decode": torch_decode}
    found |= {name: seconds / DECODE for name, seconds in inside.items()}
    memory = {"peak": (max(most, stays) - before) / 1e9, "memory": (stays - before) / 1e9}
    return {name: 1e3 * seconds for name, seconds in found.items()} | memory


def run_llama(path: Path) -> dict[str, float]:
    """As ``run_ktk``, without the split."""
    from llama_cpp import Llama, llama_cpp

    if "amx_tile" in cpu.detect():
        # llama-cpp-python 0.3.36 crashes decoding Q8_0 out of ggml's buffers for AMX. Elsewhere the
        # same switch would take its repacked kernels away.
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        llama_cpp.llama_model_default_params = lambda: params
    threads = cpu.num_physical_cores()
    model = Llama(
        str(path),
        n_ctx=1024,
        n_batch=PROMPT,
        n_ubatch=PROMPT,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    for _ in range(2):
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt())
        prefill = time.perf_counter() - begin
    steps = []
    for token in prompt()[:DECODE]:
        begin = time.perf_counter()
        model.eval([token])
        steps.append(time.perf_counter() - begin)
    return {"prefill": 1e3 * prefill, "decode": 1e3 * statistics.median(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--linear", nargs="+", choices=["file", "int8", "int4", "none"], default=["file"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", choices=["ktk", "llama"], help="run one, once, on --file")
    parser.add_argument("--file", type=Path)
    a = parser.parse_args()
    if a.engine:
        found = run_ktk(a.file, a.linear[0]) if a.engine == "ktk" else run_llama(a.file)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="ktk-") as folder:
        file = a.file or Path(folder) / "model.gguf"
        if not file.exists():
            write_model(file, a.layers)
        engines = {
            f"ktk, linear {linear}": ["--engine", "ktk", "--linear", linear] for linear in a.linear
        }
        engines["llama.cpp"] = ["--engine", "llama"]
        results: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for _ in range(a.rounds):
            for name, arguments in engines.items():
                command = [sys.executable, __file__, "--file", str(file), *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{name} left out: {done.stderr.strip()[-300:]}", file=sys.stderr)
                    continue
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for name, runs in results.items()
        if runs
    }
    if a.json:
        print(json.dumps(medians, indent=1))
        return
    for name, found in medians.items():
        split = ""
        if "torch_decode" in found:
            split = (
                f"; by torch {found['torch_decode']:.1f} ms, experts {found['experts']:.1f}, "
                f"linear {found['linear']:.1f}"
            )
        rate = PROMPT / found["prefill"] * 1e3
        print(
            f"{name}: prefill {rate:.0f} tokens/s, decode {1e3 / found['decode']:.1f} tokens/s "
            f"({found['decode']:.1f} ms{split})"
        )
        if "load" in found:
            print(
                f"  loaded in {found['load'] / 1e3:.1f} s, {found['memory']:.2f} GB of memory, "
                f"{found['peak']:.2f} at most"
            )


if __name__ == "__main__":
    main()
